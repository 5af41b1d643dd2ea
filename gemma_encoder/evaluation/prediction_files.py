"""The folder `predictions/` of a workdir: written with digests, which every reader checks."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from gemma_encoder import digests
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import to_json

FOLDER = "predictions"
ADVICE = "run gemma-encoder evaluate again"


def prediction_file(folder: pathlib.Path, task: str, split: str) -> pathlib.Path:
    """Path of the predictions of a task's split, one JSON object per example."""
    return folder / f"{task}.{split}.jsonl"


def mistake_file(folder: pathlib.Path, task: str, split: str) -> pathlib.Path:
    """Path of the worst mistakes of a task's split, with their texts."""
    return folder / f"{task}.{split}.mistakes.jsonl"


def json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yields each row as a line of JSON."""
    for row in rows:
        yield to_json(row) + "\n"


def write_prediction_files(folder: pathlib.Path, lines: Mapping[str, Iterable[str]]) -> None:
    """Writes files of a folder of predictions, each as a whole, and their digests.

    Args:
        folder: the folder, local or `gs://`; created if absent.
        lines: the lines of each file by its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        digests.check(folder, ())  # of no file: whether they can be read
    except digests.DamagedFileError as error:
        logging.warning("%s; it is made anew, for the files that are written now", error)
        (folder / digests.NAME).unlink()
    digests.update(folder, {name: map(str.encode, content) for name, content in lines.items()})


def check_prediction_files(folder: pathlib.Path, names: Sequence[str] = ("",)) -> None:
    """Checks files of a folder of predictions; folders of former versions have no digests.

    Args:
        folder: the folder, which need not exist.
        names: the files to check; by default all.

    Raises:
        InputError: a file was changed, cut or deleted.
    """
    path = folder / digests.NAME
    while True:
        before = _content(path)
        try:
            digests.check(folder, names)
        except digests.DamagedFileError as error:
            if _content(path) != before:
                continue  # a run wrote its predictions meanwhile
            raise InputError(f"{error}; {ADVICE}") from error
        return


def _content(path: pathlib.Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
