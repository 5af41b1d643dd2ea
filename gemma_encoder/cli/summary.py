"""Summary printed at the end of a run: metrics, baselines, some predictions, the next command."""

import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gemma_encoder.inputs.json_text import to_json

if TYPE_CHECKING:
    from gemma_encoder.evaluation.predictions import Predictions
    from gemma_encoder.training.loop import TrainingResult


def summarize(outcome: "TrainingResult", split: str) -> int:
    """Prints the results of a run on its main process and returns the exit code.

    Args:
        outcome: result of training or evaluation.
        split: split that was evaluated.
    """
    from gemma_encoder import distributed

    if outcome.preempted:
        return distributed.EXIT_PREEMPTED
    if distributed.is_main_process():
        print(_summary(outcome, split))
    return 0


def _summary(outcome: "TrainingResult", split: str) -> str:
    lines = [
        *outcome.notes,
        *_metric_lines(outcome, split),
        *_example_lines(outcome),
        "",
        f"checkpoint: {outcome.checkpoint}",
    ]
    if outcome.best and outcome.best[0] != outcome.step:
        best_step, best_value = outcome.best
        best_checkpoint = outcome.checkpoint.parent / str(best_step)
        lines.append(f"best checkpoint: {best_checkpoint}, {best_value:.3f}")
    if outcome.seconds:
        lines.append(f"training took {outcome.seconds:.0f} s, without evaluation and checkpointing")
    task, predictions = next(iter(outcome.predictions.items()))
    folder = outcome.checkpoint.parent.parent
    texts = folder / "predictions" / f"{task}.examples.jsonl"
    examples = predictions[0].table.fields[:10]
    texts.write_text("".join(to_json(fields) + "\n" for fields in examples))
    lines += [
        "",
        "next, score texts; replace the file with one of your own:",
        f"  {_program()} predict --workdir={folder} --task={task} --input={texts}",
    ]
    return "\n".join(lines)


def _metric_lines(outcome: "TrainingResult", split: str) -> Iterator[str]:
    """Yields a table of metrics and their baselines."""
    yield ""
    yield f"{'task':<18} {'metric':<24} {split:>10} {'baseline':>9}"
    for name, values in outcome.metrics.items():
        baselines = _baselines(outcome.predictions[name], split)
        for metric, value in values.items():
            baseline = f"{baselines[metric]:.3f}" if metric in baselines else "-"
            yield f"{name:<18} {metric:<24} {value:>10.3f} {baseline:>9}"
        if not values:
            yield f"{name:<18} predictions only: the {split} split has no labels"


def _example_lines(outcome: "TrainingResult") -> Iterator[str]:
    """Yields the first three predictions of each task."""
    for name, predictions in outcome.predictions.items():
        yield ""
        yield f"{name}:"
        for index, fields in enumerate(predictions[0].table.fields[:3]):
            text = " | ".join(fields.values())
            if len(text) > 100:
                text = f"{text[:100]}…"
            yield f"  {text}  ->  {_prediction(predictions[0], index)}"


def _baselines(predictions: "Sequence[Predictions]", split: str) -> dict[str, float]:
    """Returns baselines by metric name: the task's own, or that of the best constant prediction."""
    from gemma_encoder.evaluation import metrics

    baselines = {}
    for of_split in predictions:
        task = of_split.task
        values = {} if task.kind.ranks else metrics.baseline(task, of_split.table)
        if task.chance is not None:
            values[task.metrics[0]] = task.chance
        suffix = of_split.split.removeprefix(split)  # "_matched" of validation_matched
        baselines |= {f"{metric}{suffix}": value for metric, value in values.items()}
    return baselines


def _program() -> str:
    """Returns the command `gemma-encoder` as callable from here, e.g. .venv/bin/gemma-encoder."""
    script = pathlib.Path(sys.executable).with_name("gemma-encoder")
    if script.exists():
        return _relative_path(script)
    return f"{_relative_path(sys.executable)} -m gemma_encoder"


def _relative_path(path: os.PathLike | str) -> str:
    """Returns the path relative to the current folder if it is inside, else unchanged."""
    relative = os.path.relpath(path)
    return os.fspath(path) if relative.startswith("..") else relative


def _prediction(predictions: "Predictions", index: int) -> str:
    """Returns a prediction as text, with its label if it has one."""
    task = predictions.task
    label = predictions.table.labels[index]
    prediction = task.kind.show(task, predictions.outputs[index])
    label_text = "" if task.is_unlabeled(label) else task.kind.show_label(task, label)
    return f"{prediction} (label: {label_text})" if label_text else prediction
