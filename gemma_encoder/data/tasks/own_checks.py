"""Checks of the columns of the user's files: indices, ids, and words for missing values."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from gemma_encoder.data.files import rows
from gemma_encoder.data.table import numeric_values, to_array
from gemma_encoder.data.tasks.own_cells import split_names
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import Kind

if TYPE_CHECKING:
    from gemma_encoder.data.tasks.own_rows import Columns, Rows

# Columns that programs add to number the rows. Columns without a name are "Unnamed: 0" and so on.
_INDEX = re.compile(
    r"\s*(unnamed: ?\d+(\.\d+)*|__index_level_\d+__|level_\d+|id|idx|index|row[._]?names?)?\s*",
    re.IGNORECASE,
)
_CODE = r"^[+-]?[A-Za-z0-9]+([_.:#/+-][A-Za-z0-9]+)*$"  # an id, a number or a date
_MISSING = ("nan", "-nan", "none", "null", "n/a", "#n/a", "na", "<na>", "nat")  # in lower case
LONGEST_WORD = 16  # bytes of a text that may be one of them, with blanks
LEAST_ROWS = 3  # of a column that looks like ids
TEXT_NAMES = ("text", "sentence")  # of columns that are text, whatever they contain, in lower case


def is_index(column: str) -> bool:
    """Returns True for the name of a column that numbers the rows, or of one without a name."""
    return bool(_INDEX.fullmatch(column))


def without_indices(names: Sequence[str], used: Sequence[str], file: str) -> list[str]:
    """Removes index columns that are not used from names of columns, and logs which."""
    indices = [name for name in names if is_index(name) and name not in used]
    if indices:
        logging.warning(
            "%s: the columns %s are taken for indices and left out of the text; own.fields names "
            "the columns of the text",
            file,
            ", ".join(map(repr, indices)),
        )
    return [name for name in names if name not in indices]


def refuse_labels(
    options: OwnOptions, names: Sequence[str], label: str, ids: Mapping[str, str]
) -> None:
    """Raises InputError if a field is the label, or an id that no option names."""
    if label in names:
        raise InputError(
            f"own.fields names {label!r}, which is the label: the text would contain the answer; "
            "leave it out, or set own.label to another column"
        )
    for field, column in ids.items():
        if column in names and not getattr(options, field):
            raise InputError(
                f"own.fields names {column!r}, which is taken for the ids; leave it out, or set "
                f"own.{field} to the column of the ids"
            )


def common_columns(paths: Sequence[pathlib.Path], required: Sequence[str]) -> tuple[str, ...]:
    """Returns the columns of the files; raises InputError if they differ, but for indices."""
    first = rows.read_rows(paths[0])[0]
    for path in paths[1:]:
        differing = sorted(set(first) ^ set(rows.read_rows(path)[0]))
        differing = [name for name in differing if name in required or not is_index(name)]
        if differing:
            raise InputError(
                f"{path} and {paths[0]} differ in the column {differing[0]!r}; all files of a "
                "split must have the same columns"
            )
    return first


def check_present(
    columns: "Columns",
    required: Sequence[str],
    present: Sequence[str],
    path: pathlib.Path,
    origin: str,
) -> None:
    """Raises InputError naming the first required column that a file lacks, and who needs it."""
    for name in required:
        if name and name not in present:
            need = f"{name!r} is a column of {origin}"
            if name == columns.label:
                need = "own.label names the column of the labels"
            listed = ", ".join(map(repr, present))
            raise InputError(f"{path} has no column {name!r}; it has {listed}; {need}")


def report_unused_ids(
    columns: "Columns", kind: Kind, present: Sequence[str], file: str, origin: str
) -> None:
    """Logs columns of ids that are not used since the training data lack them."""
    if not kind.is_list:
        return
    for column, used, units in (
        ("query_id", columns.query_id, "queries are told apart by their texts"),
        ("document_id", columns.document_id, "documents are named by their rows"),
    ):
        if not used and column in present and column not in columns.fields.values():
            logging.warning(
                "%s: the column %r is not used, since %s lacks it: %s", file, column, origin, units
            )


def check_columns(options: OwnOptions, columns: "Columns", files: Mapping[str, "Rows"]) -> None:
    """Checks the columns of all splits.

    Raises:
        InputError: a column that would be text by default contains ids.
    """
    names = tuple(columns.fields.values())
    if not options.fields and names != ("query", "document"):
        _refuse_ids(names, options.columns_of_template(names), files["train"])
    for file in files.values():
        table = file.table
        checked = dict(zip(file.text_columns, names, strict=True))
        for column in (name for name in ("query_id", "document_id") if name in table.columns):
            checked[column] = getattr(columns, column)
        for column, name in checked.items():
            _report_missing(options.name, name, _missing_texts(table.arrow.column(column)), file)
        if file.has_classes:
            _report_missing(options.name, columns.label, _missing_classes(file), file)


def _refuse_ids(names: Sequence[str], used: Sequence[str], file: "Rows") -> None:
    """Raises InputError if a text that is not `used` has another code in every row."""
    ids = [
        name
        for name, column in zip(names, file.text_columns, strict=True)
        if name not in used
        and name.strip().lower() not in TEXT_NAMES
        and _are_ids(file.table.arrow.column(column))
    ]
    if not ids:
        return
    others = tuple(name for name in names if name not in ids) or tuple(names)
    fields = repr(others).replace(", ", ",")
    column = file.text_columns[names.index(ids[0])]
    raise InputError(
        f"{file.name}: column {ids[0]!r} has another value in every row, such as "
        f"{file.table.value(column, 0)!r}, as ids have; set own.fields to the columns of the text, "
        f'e.g. --config.own.fields="{fields}", and name {ids[0]!r} there if it is text'
    )


def _are_ids(column: Any) -> bool:
    """Returns True for a different code in every row, most of them with digits."""
    import pyarrow.compute as pc

    if len(column) < LEAST_ROWS:
        return False
    with_digits = 0
    for chunk in column.chunks:  # texts end the loop at once
        if not pc.all(pc.match_substring_regex(chunk, _CODE)).as_py():
            return False
        with_digits += pc.sum(pc.match_substring_regex(chunk, "[0-9]")).as_py() or 0
    return with_digits >= len(column) / 2 and pc.count_distinct(column).as_py() == len(column)


def _missing_texts(column: Any) -> dict[str, tuple[int, int]]:
    """Returns (number of rows, first row) of each text that is a word for a missing value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    words = to_array(_MISSING, pa.large_string())
    result: dict[str, tuple[int, int]] = {}
    first = 0
    for chunk in column.chunks:
        short = np.flatnonzero(numeric_values(pc.binary_length(chunk)) <= LONGEST_WORD)
        texts = pc.utf8_trim_whitespace(chunk.take(to_array(short, pa.int64())))
        hits = pc.indices_nonzero(pc.is_in(pc.utf8_lower(texts), words))
        rows = short[numeric_values(hits)] + first
        encoded = texts.take(hits).dictionary_encode()
        codes = numeric_values(encoded.indices)
        for code, text in enumerate(encoded.dictionary.to_pylist()):
            is_equal = codes == code
            count, first_row = result.get(text, (0, int(rows[is_equal.argmax()])))
            result[text] = count + int(is_equal.sum()), first_row
        first += len(chunk)
    return result


def _missing_classes(file: "Rows") -> dict[str, tuple[int, int]]:
    """Returns (number of rows, first row) of each class that is a word for a missing value."""
    first_rows = file.table.summary["values"]
    names = [name for name in first_rows if name.lower() in _MISSING]
    if not names:
        return {}
    labels, codes = file.table.codes("label")
    frequencies = np.bincount(codes)
    return {
        name: (
            int(
                sum(frequencies[i] for i, label in enumerate(labels) if name in split_names(label))
            ),
            first_rows[name],
        )
        for name in names
    }


def _report_missing(
    task: str, column: str, missing: Mapping[str, tuple[int, int]], file: "Rows"
) -> None:
    """Logs the words for missing values in a column."""
    if not missing:
        return
    parts = [
        f"{value!r} in {count} of {len(file)} rows, the first {file.where(row)}"
        for value, (count, row) in missing.items()
    ]
    logging.warning(
        "%s: column %r contains %s: is a value missing there? It is read as it is",
        task,
        column,
        "; ".join(parts),
    )
