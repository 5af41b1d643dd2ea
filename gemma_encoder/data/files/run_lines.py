"""Lines of qrels and of first-stage runs in all their formats, block by block.

Shapes: n lines.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np

from gemma_encoder.data.files.corpus import Ids
from gemma_encoder.data.files.lines import Lines, Spans, columns, read_lines
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.ids import OUR_TAGS, decode_id

BEIR_HEADER = ("query-id", "corpus-id", "score")


@dataclasses.dataclass(frozen=True)
class RunLines:
    """Lines of a run; n of them.

    Attributes:
        lines: the lines.
        queries, documents: ids as the file has them; `find_ids` reads encoded ones.
        keys: [n] int64, lowest for the best document of a query.
        scores: [n] float32; None if the run has no scores.
        is_ours: the run is one of ours, whose ids are encoded.
        has_order: False for a top1000 file, which has neither ranks nor scores.
    """

    lines: Lines
    queries: Spans
    documents: Spans
    keys: np.ndarray
    scores: np.ndarray | None
    is_ours: bool
    has_order: bool


def read_run(path: pathlib.Path) -> Iterator[RunLines]:
    """Yields the lines of a run, block by block; the formats are those of `Candidates`.

    Raises:
        InputError: a line is malformed.
    """
    names: tuple[str, ...] = ()
    ours = False
    for lines in read_lines(path):
        names = names or _run_columns(lines)
        spans = columns(lines, names) if "query" in names else _fields(lines, names)
        by_name = dict(zip(names, spans, strict=True))
        ours = ours or ("tag" in names and lines.text(0).split()[-1] in OUR_TAGS)
        scores = None
        if "score" in by_name:
            scores = _scores(lines, by_name["score"])
            keys = _descending(scores).astype(np.int64)
        elif "rank" in by_name:
            keys = _integers(lines, by_name["rank"], "rank")
        else:
            keys = np.zeros(len(lines.starts), np.int64)  # file order, since the sort is stable
        ids = by_name["qid"], by_name["pid"]
        yield RunLines(lines, *ids, keys, scores, ours, "query" not in names)


def _run_columns(lines: Lines) -> tuple[str, ...]:
    """Infers the columns of a run from its first line."""
    line = lines.text(0)
    if len(line.split("\t")) == 4:
        return ("qid", "pid", "query", "passage")
    for fields in (line.split("\t"), line.split()):  # ids between tabs may contain blanks
        if len(fields) == 3:
            return ("qid", "pid", "rank")
        if len(fields) == 6:
            return ("qid", "Q0", "pid", "rank", "score", "tag")
    raise InputError(
        f"{lines.where(0)}: not a line of a run; expected qid, pid, rank, or qid, Q0, docid, rank, "
        f"score, tag, or qid, pid, query, passage separated by tabs; got {line[:80]!r}"
    )


def _fields(lines: Lines, names: tuple[str, ...]) -> list[Spans]:
    """Splits lines at any whitespace, or only at tabs if fields contain blanks."""
    try:
        return columns(lines, names, whitespace=True)
    except InputError:
        with contextlib.suppress(InputError):
            return columns(lines, names)
        raise


def read_qrels(path: pathlib.Path) -> Iterator[tuple[Lines, Spans, Spans, np.ndarray]]:
    """Yields lines of a qrels file, their queries, documents and grades [n] int64.

    Raises:
        InputError: a line is malformed.
    """
    has_header = None
    for lines in read_lines(path):
        if has_header is None:
            has_header = tuple(lines.text(0).split("\t")) == BEIR_HEADER
            lines = lines.without_first() if has_header else lines
        if has_header:
            query, document, grade = columns(lines, BEIR_HEADER)
        else:
            query, _, document, grade = _fields(lines, ("qid", "0", "pid", "relevance"))
        yield lines, query, document, _integers(lines, grade, "relevance")


def find_ids(spans: Spans, ids: Ids, ours: bool = False) -> np.ndarray:
    """Returns [n] int32, the indices of ids in runs and qrels, -1 for unknown ones.

    Ids of other programs are taken as they are; only unknown ones are read as `encode_id` writes
    them. In a run of ours it is the other way round.
    """
    indices = ids.find(spans)
    encoded = np.flatnonzero(spans.contain(ord("%")) & (ours | (indices < 0)))
    decoded = [decode_id(spans.text(index)).encode() for index in encoded]
    read = ids.find(Spans.of(decoded))
    indices[encoded] = np.where(read < 0, indices[encoded], read)
    return indices


def _integers(lines: Lines, spans: Spans, column: str) -> np.ndarray:
    """Returns [n] int64; raises InputError naming the first that is not a 32-bit integer."""
    values, is_valid = spans.whole_numbers()
    for line in np.flatnonzero(~is_valid | (np.abs(values) >= 2**31))[:1]:
        text = spans.text(line)
        raise InputError(f"{lines.where(line)}: {column} must be a whole number, got {text!r}")
    return values


def _scores(lines: Lines, spans: Spans) -> np.ndarray:
    """Returns [n] float32; raises InputError naming the first that is not a finite number."""
    values, is_valid = spans.floats()
    is_valid &= np.abs(values) <= np.finfo(np.float32).max
    for line in np.flatnonzero(~is_valid)[:1]:
        text = spans.text(line)
        raise InputError(f"{lines.where(line)}: score must be a finite number, got {text!r}")
    return values.astype(np.float32)


def _descending(scores: np.ndarray) -> np.ndarray:
    """Maps float32 to int32 in the opposite order; -0 and 0 are equal."""
    bits = (scores + np.float32(0)).view(np.int32)
    return ~np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def from_descending(keys: np.ndarray) -> np.ndarray:
    """Returns the float32 scores of the keys of a run that has scores; -0 becomes 0."""
    bits = ~keys
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).view(np.float32)
