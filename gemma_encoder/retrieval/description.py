"""Description of an index: index.json, written before its first block and compared on resuming."""

import dataclasses
import pathlib
from typing import Any

from gemma_encoder.inputs.descriptions import check_mapping, described_at, from_fields
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.whole_files import write_whole

NAME = "index.json"
VERSION = 1
KINDS = ("dense", "sparse", "bm25")
PRECISIONS = ("float32", "int8")
APPROXIMATE = ("hnsw", "ivf")
IGNORED = ("model",)  # the same model may have moved


@dataclasses.dataclass(frozen=True)
class IndexDescription:
    """All of an index but its documents.

    Attributes:
        kind: one of `KINDS`.
        collection: name of the collection's file.
        fingerprint: size and SHA-256 of that file.
        count: number of documents.
        id_name: name of the documents' ids, for messages.
        block: documents per block.
        model: path of the model; "" if it was given in memory.
        digest: identity of the model, see `gemma_encoder.identity`.
        task: the task whose templates format texts; "" for texts as they are.
        full_width: width of the model's vectors, or size of the vocabulary.
        width: width of the stored vectors, their first dimensions.
        precision: one of `PRECISIONS`.
        similarity: "cosine" of vectors scaled to length 1, or "dot".
        approximate: one of `APPROXIMATE`, or "" for exact search.
        k1, b: of BM25.
        version: of this format.
    """

    kind: str
    collection: str
    fingerprint: str
    count: int
    id_name: str
    block: int
    model: str = ""
    digest: str = ""
    task: str = ""
    full_width: int = 0
    width: int = 0
    precision: str = "float32"
    similarity: str = "dot"
    approximate: str = ""
    k1: float = 0.0
    b: float = 0.0
    version: int = VERSION

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.count // self.block)

    def rows(self, block: int) -> range:
        """Returns the documents of a block."""
        return range(block * self.block, min((block + 1) * self.block, self.count))

    def differences(self, other: "IndexDescription") -> list[str]:
        """Returns the settings in which another description differs, for messages."""
        mine = dataclasses.asdict(self)
        theirs = dataclasses.asdict(other)
        return [
            f"{name}: {mine[name]!r} -> {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name] and name not in IGNORED
        ]

    def write(self, folder: pathlib.Path) -> None:
        """Writes the description to a folder."""
        write_whole(folder / NAME, to_json(dataclasses.asdict(self), indent=1) + "\n")


def read_index_description(folder: pathlib.Path) -> IndexDescription:
    """Reads the description of an index.

    Raises:
        InputError: it is absent, damaged, or of a newer version.
    """
    path = folder / NAME
    if not path.is_file():
        raise InputError(f"{folder} is no index: it has no {NAME}; make one by gemma-encoder index")
    values: dict[str, Any] = read_object(path)
    with described_at(path):
        check_mapping(values, "an index", "kind", "version")
        if values["version"] != VERSION:
            raise InputError(
                f"it has version {values['version']!r}, this library reads version {VERSION}; "
                "index the collection again"
            )
        description = from_fields(IndexDescription, values, "an index")
        is_valid = (
            description.kind in KINDS
            and description.precision in PRECISIONS
            and description.approximate in ("", *APPROXIMATE)
            and description.count > 0 < description.block
        )
        if not is_valid:
            raise InputError("its fields contradict each other; it is damaged")
    return description
