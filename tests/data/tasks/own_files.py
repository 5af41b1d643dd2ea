"""Small files in every format, and sources over them."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet

from gemma_encoder.data import registry
from gemma_encoder.data.source import DataOptions


def write(path, rows):
    """Writes rows (dictionaries) in the format of the path's suffix; returns the path."""
    names = list(rows[0])
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        return path
    if kind == "jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif kind == "tsv":
        content = "".join(
            "\t".join(str(value) for value in values) + "\n"
            for values in [names, *(row.values() for row in rows)]
        )
    else:
        content = "".join(
            ",".join('"' + str(value).replace('"', '""') + '"' for value in values) + "\r\n"
            for values in [names, *(row.values() for row in rows)]
        )
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def source(train, limits=None, **options):
    """Returns the source of `config.own` with these options; limits are other data options."""
    own = {"train": str(train)} | options
    own |= {split: str(own[split]) for split in ("validation", "test") if split in own}
    return registry.get("own", DataOptions(own=own, **(limits or {})))


def everything(made, split):
    """Returns the examples of every record of a split."""
    return [made.examples(split, index) for index in range(made.size(split))]


# The rows of a query are not contiguous.
RANKED = [
    {
        "query_id": f"q{q}",
        "query": f"query {q}",
        "document_id": f"d{d}",
        "document": f"document {d} of {q}",
        "label": (d == 0) * 2 + (d == 1),
    }
    for d in range(6)
    for q in range(8)
]
