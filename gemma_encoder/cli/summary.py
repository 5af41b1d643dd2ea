"""The end of a run, for a person: metrics beside a baseline, some predictions, the next command."""

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma_encoder.evaluation.predictions import Predictions
    from gemma_encoder.training.loop import TrainingResult


def summarize(outcome: "TrainingResult", split: str) -> int:
    """Prints what a run reached, on its main process, and returns the program's exit code."""
    from gemma_encoder import distributed

    if outcome.preempted:
        return processes.EXIT_PREEMPTED
    if distributed.is_main_process():
        print(_summary(outcome, split))
    return 0


def _summary(outcome, split: str) -> str:
    """Metrics beside a baseline, some predictions, the checkpoint, and what to do next."""
    lines = ["", f"{'task':<18} {'metric':<24} {split:>10} {'baseline':>9}"]
    for name, values in outcome.metrics.items():
        baseline = _baseline(outcome.predictions[name], split)
        for metric, value in values.items():
            without = f"{baseline[metric]:.3f}" if metric in baseline else "-"
            lines.append(f"{name:<18} {metric:<24} {value:>10.3f} {without:>9}")
        if not values:
            lines.append(f"{name:<18} predictions only: the {split} split has no labels")
    for name, predictions in outcome.predictions.items():
        lines += ["", f"{name}:"]
        for number, fields in enumerate(predictions[0].table.fields[:3]):
            text = " | ".join(fields.values())
            lines.append(
                f"  {text[:100]}{'…' if len(text) > 100 else ''}  ->  {_shown(predictions[0], number)}"
            )
    task, predictions = next(iter(outcome.predictions.items()))
    folder = outcome.checkpoint.parent.parent
    texts = folder / "predictions" / f"{task}.examples.jsonl"
    texts.write_text(
        "".join(json.dumps(fields) + "\n" for fields in predictions[0].table.fields[:10])
    )
    lines += ["", f"checkpoint: {outcome.checkpoint}"]
    if outcome.best and outcome.best[0] != outcome.step:
        lines.append(
            f"best checkpoint: {outcome.checkpoint.parent / str(outcome.best[0])}, {outcome.best[1]:.3f}"
        )
    if outcome.seconds:
        lines.append(f"training took {outcome.seconds:.0f} s, evaluation and checkpoints apart")
    lines += [
        "",
        "next, score texts; replace the file by one of your own:",
        f"  {_program()} predict --workdir={folder} --task={task} --input={texts}",
    ]
    return "\n".join(lines)


def _baseline(predictions: "Sequence[Predictions]", split: str) -> dict[str, float]:
    """By metric, as a run names it, what is reached without learning.

    That is what the task says, else the metric of the best constant prediction.
    """
    from gemma_encoder.evaluation import metrics

    result = {}
    for one in predictions:
        values = {} if one.task.kind.ranks else metrics.baseline(one.task, one.table)
        if one.task.chance is not None:
            values[one.task.metrics[0]] = one.task.chance
        part = one.split.removeprefix(split)  # "_matched" of validation_matched
        result |= {f"{metric}{part}": value for metric, value in values.items()}
    return result


def _program() -> str:
    """The command `gemma-encoder` as it is called from here, e.g. .venv/bin/gemma-encoder."""
    script = pathlib.Path(sys.executable).with_name("gemma-encoder")
    if script.exists():
        return _from_here(script)
    return f"{_from_here(sys.executable)} -m gemma_encoder"


def _from_here(path: os.PathLike | str) -> str:
    relative = os.path.relpath(path)
    return os.fspath(path) if relative.startswith("..") else relative


def _shown(predictions, index: int) -> str:
    """A prediction, and the label where there is one."""
    task, label = predictions.task, predictions.table.labels[index]
    shown = task.kind.show(task, predictions.outputs[index])
    text = "" if task.is_unlabeled(label) else task.kind.show_label(task, label)
    return f"{shown} (label: {text})" if text else shown
