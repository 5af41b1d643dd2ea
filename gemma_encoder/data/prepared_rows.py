"""Records of prepared tasks as rows of a table: encoded, written and read.

A row has the tokens, the truncated tokens and the labels of a record's texts, and everything else
as JSON.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from gemma_encoder.data import table
from gemma_encoder.data.segments import CHUNK, encode_examples
from gemma_encoder.data.source import Record, Source
from gemma_encoder.data.table import Table
from gemma_encoder.inputs.json_text import from_json, to_json
from gemma_encoder.inputs.task import Example
from gemma_encoder.inputs.template import EncodedText
from gemma_encoder.inputs.tokenizer import Tokenizer


def column_types() -> dict[str, Any]:
    """Returns the Arrow type of each column."""
    import pyarrow as pa

    return {
        "tokens": pa.large_list(pa.list_(pa.int32())),
        "cut": pa.list_(pa.int32()),  # truncated tokens of each text
        "labels": pa.list_(pa.float64()),
        "about": pa.large_string(),  # JSON: everything else
    }


def encoded_records(
    source: Source, split: str, indices: range, tokenizer: Tokenizer, max_length: int
) -> Iterator[list[Example]]:
    """Yields the encoded examples of some records of a split, in order."""
    is_drawn = split == "train" and source.task.is_list
    for first in range(0, len(indices), CHUNK):
        records: list[list[Example]] = []
        where: list[str] = []
        for index in indices[first : first + CHUNK]:
            record = source.record(split, index, training=is_drawn)
            records.append([record.example(i) for i in range(len(record.labels))])
            where += [source.where(split, index)] * len(record.labels)
        flat = [example for examples in records for example in examples]
        encoded = iter(encode_examples(source.task, flat, where, tokenizer, max_length))
        for examples in records:
            yield [example._replace(encoded=next(encoded)) for example in examples]


def to_row(examples: Sequence[Example], with_fields: bool) -> list[Any]:
    """Returns the row of a record: tokens, truncated tokens, labels, and JSON."""
    labels = [0.0 if isinstance(e.label, tuple) else float(e.label) for e in examples]
    return [
        [example.encoded.tokens for example in examples],
        [example.encoded.num_truncated for example in examples],
        labels,
        to_json([_about(example, with_fields) for example in examples]),
    ]


def _about(example: Example, with_fields: bool) -> dict[str, Any]:
    """Returns everything about an example that has no column of its own, for JSON."""
    about = {"query": example.query_id, "document": example.document_id}
    about |= {"info": dict(example.info), "role": example.role}
    if example.key >= 0:
        about["key"] = example.key
    if with_fields:
        about["fields"] = example.fields
    if isinstance(example.label, tuple):
        about["classes"] = example.label
    return about


def from_row(rows: Table, row: int) -> Record:
    """Returns the record of a row; its examples have fields if they were written with them.

    Raises:
        ValueError, KeyError, TypeError: the row is damaged.
    """
    facts = [
        (
            about.get("fields", {}),
            tuple(about["classes"]) if "classes" in about else label,
            about["query"],
            about["document"],
            about["info"],
            about["role"],
            about.get("key", -1),
        )
        for about, label in zip(
            from_json(rows.value("about", row)), rows.value("labels", row), strict=True
        )
    ]
    texts = rows.arrow.column("tokens")[row].values
    num_truncated = rows.value("cut", row)
    if not len(texts) == len(num_truncated) == len(facts):
        raise ValueError("the columns have different numbers of texts")

    def example(i: int) -> Example:
        *values, role, key = facts[i]
        encoded = EncodedText(table.numeric_values(texts[i].values), num_truncated[i])
        return Example(*values, encoded, role, key)

    return Record([label for _, label, *_ in facts], example)
