"""Files of texts to predict, readers of the predictions, and an interruption."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet

TEXTS = [
    f"the {word} was {'very ' * (i % 5)}good , “naïve” 😀 ."
    for i, word in enumerate(["plot", "music", "cast", "ending"] * 6)
]


def write(folder, name):
    """Writes TEXTS to a file of the format that its name says, and returns the path."""
    path = folder / name
    rows = [{"id": index, "sentence": text} for index, text in enumerate(TEXTS)]
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    if ".txt" in name:
        lines = TEXTS
    elif ".jsonl" in name:
        lines = [json.dumps(row) for row in rows]
    elif ".tsv" in name:
        lines = ["id\tsentence", *(f"{row['id']}\t{row['sentence']}" for row in rows)]
    else:
        lines = ["id,sentence", *(f'{row["id"]},"{row["sentence"]}"' for row in rows)]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(path):
    """Reads an output file; each row has its repeated columns, prediction and probabilities."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        probabilities = row.pop("probabilities")
        row |= {f"probability_{name}": value for name, value in probabilities.items()}
    return rows


class Interruption(Exception):
    pass


def interrupt(predictor, monkeypatch, chunks):
    """Makes the predictor fail after `chunks` calls."""
    num_calls = 0
    original = type(predictor).predict

    def predict(*arguments, **options):
        nonlocal num_calls
        if num_calls == chunks:
            raise Interruption
        num_calls += 1
        return original(predictor, *arguments, **options)

    monkeypatch.setattr(predictor, "predict", predict)
