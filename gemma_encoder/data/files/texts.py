"""Texts of a file: one per line, or the columns that a task's fields name."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gemma_encoder.data.files.lines import text_lines, without_compression
from gemma_encoder.data.files.rows import read_rows
from gemma_encoder.data.files.rows import where as row_name
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.text_inputs import column_of


class InputText(NamedTuple):
    """One text of the input.

    Attributes:
        name: location for messages, e.g. "texts.csv:7".
        fields: values of the task's fields.
        extra: values of the columns that the output repeats.
    """

    name: str
    fields: Mapping[str, Any]
    extra: Mapping[str, Any]


def read_texts(
    source: pathlib.Path, task: Task, columns: Sequence[str], keep: Sequence[str]
) -> Iterator[InputText]:
    """Reads the texts of a file; the columns are checked before the first text is read."""
    if pathlib.Path(without_compression(source.name)).suffix == ".txt":
        return _read_lines(source, task, columns, keep)
    return _read_columns(source, task, columns, keep)


def _read_lines(
    source: pathlib.Path, task: Task, columns: Sequence[str], keep: Sequence[str]
) -> Iterator[InputText]:
    """Reads a .txt file: one text a line, for a task of one field."""
    fields = task.template.fields
    if not source.is_file():
        raise InputError(f"{source} is not a file")
    if len(fields) != 1 or columns or keep:
        raise InputError(
            f"{source}: a .txt file has one text a line and no columns; for "
            f"{', '.join([*fields, *keep])} give a .csv, .jsonl or .parquet file"
        )
    return (
        InputText(f"{source}:{line_number}", {fields[0]: line}, {})
        for line_number, line in text_lines(source)
    )


def _read_columns(
    source: pathlib.Path, task: Task, columns: Sequence[str], keep: Sequence[str]
) -> Iterator[InputText]:
    """Reads a file with columns."""
    fields = task.template.fields
    if columns and len(columns) != len(fields):
        raise InputError(
            f"--columns names {len(columns)} columns; task {task.name!r} needs {len(fields)}, for "
            f"its fields {', '.join(fields)}"
        )
    names, rows = read_rows(source)
    columns = columns or [column_of(field, names) for field in fields]
    by_field = dict(zip(fields, columns, strict=True))
    for name in (*by_field.values(), *keep):
        if name not in names:
            raise InputError(
                f"{source} has no column {name!r}; its columns: {', '.join(names)}. Task "
                f"{task.name!r} needs {', '.join(fields)}; name their columns with --columns"
            )

    def convert() -> Iterator[InputText]:
        for row_index, values in rows:
            where = row_name(source, row_index)
            missing = [name for name in keep if name not in values]
            if missing:
                raise InputError(f"{where}: there is no {missing[0]!r}, which --keep names")
            # Predictor.predict reports missing fields.
            text = {field: values[name] for field, name in by_field.items() if name in values}
            yield InputText(where, text, {name: values[name] for name in keep})

    return convert()


def is_blank(task: Task, text: InputText) -> bool:
    """Returns True if a field of the text is null or holds nothing but blanks."""
    return bool(_blank_fields(task, text))


def _blank_fields(task: Task, text: InputText) -> list[str]:
    values = {field: text.fields.get(field, field) for field in task.template.fields}
    return [
        field
        for field, value in values.items()
        if value is None or (isinstance(value, str) and not value.strip())
    ]


def check_texts(
    texts: Iterator[InputText],
    task: Task,
    accept_blank: bool,
    progress: Callable[[int], Any] = lambda count: None,
) -> tuple[int, int]:
    """Checks all texts of a file and returns their number, and that of the blank ones.

    Args:
        texts: the texts.
        task: the task to predict.
        accept_blank: accept texts that are blank.
        progress: called with the number of texts since the last call.

    Raises:
        InputError: names the first text that is malformed or blank.
    """
    count = num_blank = 0
    for text in texts:
        count += 1
        progress(1)
        blank = _blank_fields(task, text)
        if not blank:
            task.template.render(text.fields, text.name)
        elif accept_blank:
            num_blank += 1
        else:
            names = ", ".join(map(repr, blank))
            is_whole = len(blank) == len(task.template.fields)
            problem = "the text is empty: nothing but blanks in" if is_whole else "nothing in"
            raise InputError(
                f"{text.name}: {problem} {names}; fill it in, or predict null for such rows with "
                "--blank=null"
            )
    return count, num_blank
