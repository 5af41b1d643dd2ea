"""Summary printed at the end of a run: metrics, chance, some predictions, the next command."""

import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma_encoder import terminal
from gemma_encoder.inputs.errors import reason
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.inputs.number_text import format_number
from gemma_encoder.whole_files import write_whole

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
        terminal.print_note(_summary(outcome, split))
    return 0


def _summary(outcome: "TrainingResult", split: str) -> str:
    lines = [
        *outcome.notes,
        *_metric_lines(outcome, split),
        *_class_lines(outcome),
        *_example_lines(outcome),
        "",
        f"checkpoint: {outcome.checkpoint}",
    ]
    if outcome.best and outcome.best[0] != outcome.step:
        best_step, best_value = outcome.best
        best_checkpoint = outcome.checkpoint.parent / str(best_step)
        lines.append(f"best checkpoint: {best_checkpoint}, {format_number(best_value)}")
    if outcome.seconds:
        lines.append(f"training took {outcome.seconds:.0f} s, without evaluation and checkpointing")
    return "\n".join([*lines, *_next_lines(outcome)])


def _next_lines(outcome: "TrainingResult") -> Iterator[str]:
    """Yields the next command, with texts to edit where it takes texts."""
    task, predictions = next(iter(outcome.predictions.items()))
    folder = outcome.checkpoint.parent.parent
    if predictions[0].task.kind.embeds:
        arguments = [f"--model={folder}", "--collection=collection.tsv", "--output=INDEX"]
        yield ""
        yield "next, index documents to search; collection.tsv has an id and a text per line:"
        yield f"  {_program()} {shlex.join(['index', *arguments])}"
        return
    texts = folder / "predictions" / f"{task}.examples.jsonl"
    examples = predictions[0].table.fields[:10]
    try:
        write_whole(texts, "".join(to_json(fields) + "\n" for fields in examples))
    except OSError as error:  # the run itself is complete
        yield f"{texts} cannot be written: {reason(error)}"
        return
    arguments = ["predict", f"--workdir={folder}", f"--task={task}", f"--input={texts}"]
    yield ""
    yield "next, score texts; replace the file with one of your own:"
    yield f"  {_program()} {shlex.join(arguments)}"


def _metric_lines(outcome: "TrainingResult", split: str) -> Iterator[str]:
    """Yields a table of metrics, and what chance and a first stage give."""
    from gemma_encoder.evaluation import details
    from gemma_encoder.evaluation.metrics import lowest_is_best

    width = max([len(name) for name in outcome.metrics], default=0)
    width = max(width, 18)
    yield ""
    others = {"chance": details.chance_of}
    if any(part.first_stage for parts in outcome.predictions.values() for part in parts):
        others["first stage"] = details.first_stage_of
    heads = " ".join(["    95 % interval", *(f"{name:>11}" for name in others)])
    yield f"{'task':<{width}} {'metric':<24} {split:>10} {heads}"
    for name, values in outcome.metrics.items():
        columns = [_by_metric(outcome.predictions[name], split, of) for of in others.values()]
        bounds = _by_metric(outcome.predictions[name], split, details.intervals_of)
        for metric, value in values.items():
            label = f"{metric} ↓" if lowest_is_best(metric) else metric
            shown = (
                details.format_metric(metric, other[metric]) if metric in other else "-"
                for other in columns
            )
            interval = details.format_bounds(metric, bounds[metric]) if metric in bounds else "-"
            cells = " ".join([f"{interval:>17}", *(f"{cell:>11}" for cell in shown)])
            yield f"{name:<{width}} {label:<24} {details.format_metric(metric, value):>10} {cells}"
        if not values:
            yield f"{name:<{width}} predictions only: the {split} split has no labels"
    if any(outcome.metrics.values()):
        yield "chance: a baseline that ignores the texts; ↓: lower is better"
    if "first stage" in others:
        yield "first stage: the order of the candidates as they were read, for the same queries"


def _class_lines(outcome: "TrainingResult") -> Iterator[str]:
    """Yields a table of the scores of each class, for each split of each task with classes."""
    from gemma_encoder.evaluation import class_scores

    for name, predictions in outcome.predictions.items():
        for of_split in predictions:
            scores = class_scores.class_scores(of_split.task, of_split.outputs, of_split.table)
            if not scores:
                continue
            rows = class_scores.format_scores(class_scores.selected_classes(scores))
            title = name if len(predictions) == 1 else f"{name}, {of_split.split}"
            width = min(max(len(title), *(len(row[0]) for row in rows)), 42)
            yield ""
            yield f"{title:<{width}} {'precision':>10} {'recall':>10} {'F1':>10} {'support':>10}"
            for label, *values in rows:
                shown = _shortened(label, width)
                yield f"{shown:<{width}} {' '.join(f'{value:>10}' for value in values)}"
            if note := class_scores.others_note(len(scores)):
                file = f"predictions/{name}.{of_split.split}.metrics.json"
                yield f"{note} classes in {file}"


def _shortened(name: str, width: int) -> str:
    """Leaves out the middle of a long name: such names often differ only at the end."""
    if len(name) <= width:
        return name
    end = (width - 1) // 2
    return f"{name[: width - 1 - end]}…{name[-end:]}"


def _example_lines(outcome: "TrainingResult") -> Iterator[str]:
    """Yields the first three predictions, or results of a search, of each task."""
    for name, predictions in outcome.predictions.items():
        yield ""
        yield f"{name}:"
        if predictions[0].task.kind.embeds:
            yield from _result_lines(predictions[0])
            continue
        for index, fields in enumerate(predictions[0].table.fields[:3]):
            yield f"  {_joined(fields)}  ->  {_prediction(predictions[0], index)}"


def _result_lines(predictions: "Predictions") -> Iterator[str]:
    """Yields the first three queries, each with the text of its best document."""
    from gemma_encoder.evaluation.vector_search import first_results

    table = predictions.table
    grades = predictions.relevance_grades()
    results = first_results(predictions.task.kind, table, predictions.outputs, 3)
    for query, document in results:
        name = table.document_ids[document]
        text = _joined(table.fields[document]) if document < len(table.fields) else name
        judged = grades.get(table.query_ids[query], {})
        verdict = "relevant" if judged.get(name, 0) > 0 else "not relevant"
        shown = f"{text} ({verdict})" if judged else text
        yield f"  {_joined(table.fields[query])}  ->  {shown}"


def _joined(fields: Mapping[str, str]) -> str:
    """Returns the fields of a text in a line, shortened."""
    text = " | ".join(fields.values())
    return text if len(text) <= 100 else f"{text[:100]}…"


def _by_metric(
    predictions: "Sequence[Predictions]",
    split: str,
    values_of: "Callable[[Predictions], dict[str, Any]]",
) -> dict[str, Any]:
    """Returns values, such as those of chance, by the names of metrics with their part."""
    result = {}
    for of_split in predictions:
        suffix = of_split.split.removeprefix(split)  # "_matched" of validation_matched
        values = values_of(of_split)
        result |= {f"{metric}{suffix}": value for metric, value in values.items()}
    return result


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
