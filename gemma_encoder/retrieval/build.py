"""Builds an index: encodes a collection block by block, resumable and shared by processes.

    OUTPUT.part/    what is done so far: index.json, blocks
    OUTPUT.lock     names the process that writes
    OUTPUT/         the index, once it is complete

Process p of P encodes the blocks p, p + P, …; the main process completes the folder. A block is
written whole and depends only on its own documents, so that an index that was built in several
starts, or by several processes, equals any other to the bit.
"""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator

from etils import epath

from gemma_encoder import digests, distributed, terminal
from gemma_encoder.data import cache
from gemma_encoder.data.files.corpus import Corpus
from gemma_encoder.embedding import Embedder, SparseVectors, sparse_head, task_with_roles
from gemma_encoder.identity import identify
from gemma_encoder.inputs.errors import InputError, in_one_line, unknown
from gemma_encoder.inputs.task import Task
from gemma_encoder.progress import progress
from gemma_encoder.retrieval.approximate import write_approximate
from gemma_encoder.retrieval.blocks import FOLDER, Arrays, holds_block, write_block
from gemma_encoder.retrieval.bm25 import write_bm25
from gemma_encoder.retrieval.collection import document_inputs, open_collection
from gemma_encoder.retrieval.dense import dense_arrays
from gemma_encoder.retrieval.description import (
    APPROXIMATE,
    KINDS,
    NAME,
    PRECISIONS,
    IndexDescription,
    read_index_description,
)
from gemma_encoder.retrieval.sparse import sparse_arrays
from gemma_encoder.runtime import require_retrieval
from gemma_encoder.weights.native import InferenceSpec
from gemma_encoder.weights.new_folders import check_is_new
from gemma_encoder.weights.sentence_prompts import SIMILARITIES, role_prompt
from gemma_encoder.whole_files import claim, is_remote, move_whole, sync_tree

BLOCK = 4096  # documents
IDS = "ids"
ADVICE = "wait for it, or name another output"


@dataclasses.dataclass(frozen=True)
class IndexOptions:
    """Options of an index.

    Attributes:
        task: the task whose templates format queries and documents; by default the only one with
            roles; without any, texts are embedded as they are.
        kind: "dense", "sparse" or "bm25"; by default sparse if the model has a sparse head.
        width: number of first dimensions to store; by default all.
        precision: "float32", or "int8" with a scale per vector.
        approximate: "hnsw" or "ivf" to build FAISS's index, too; "" for exact search only.
        k1, b: of BM25.
        block: documents of a block, which a killed command encodes anew.
    """

    task: str | None = None
    kind: str | None = None
    width: int | None = None
    precision: str = "float32"
    approximate: str = ""
    k1: float = 0.9
    b: float = 0.4
    block: int = BLOCK

    def __post_init__(self):
        valid = {"kind": KINDS, "precision": PRECISIONS, "approximate": APPROXIMATE}
        for name, values in valid.items():
            if (value := getattr(self, name)) and value not in values:
                raise unknown(f"{name} of an index", value, values)
        if self.kind == "bm25" and (self.task or self.is_compressed):
            raise InputError("a bm25 index has no task, width, precision or approximate search")
        if self.block < 1:
            raise InputError(f"a block has at least 1 document, got {self.block}")
        if not (self.k1 >= 0 and 0 <= self.b <= 1):
            raise InputError(f"k1 is at least 0 and b from 0 to 1; got {self.k1} and {self.b}")

    @property
    def is_compressed(self) -> bool:
        """True if dense vectors are changed, or indexed for approximate search."""
        return bool(self.width or self.precision != "float32" or self.approximate)


def build_index(
    predictor: Embedder | None,
    model: str,
    collection: pathlib.Path,
    output: pathlib.Path,
    options: IndexOptions,
) -> IndexDescription:
    """Indexes a collection into a new folder; continues what the same call has left.

    Args:
        predictor: the model; None for BM25.
        model: its path, which searches load; "" if it has none.
        collection: the collection, see `open_collection`.
        output: the folder.
        options: the options.

    Returns:
        The description of the index.

    Raises:
        InputError: a document is empty, an id is repeated, an option does not fit the model, or
            OUTPUT.part is of another command.
    """
    if is_remote(output):
        raise InputError(f"--output={output}: an index is written to a local or shared folder")
    check_is_new(epath.Path(output), "the index", may_be_empty=True)
    corpus = open_collection(collection)
    description = _describe(predictor, model, corpus, options)
    part = output.with_name(f"{output.name}.part")
    is_main = distributed.is_main_process()
    with _writing(output, part) as stack:
        with distributed.failing_together():
            if is_main:
                output.parent.mkdir(parents=True, exist_ok=True)
                lock = output.with_name(f"{output.name}.lock")
                stack.enter_context(claim(lock, str(output), ADVICE))
                _begin(part, description)
        with distributed.failing_together():
            if predictor is not None:
                _write_blocks(part, description, predictor, corpus)
        with distributed.failing_together():
            if is_main:
                _finish(part, output, description, corpus)
    return description


@contextlib.contextmanager
def _writing(output: pathlib.Path, part: pathlib.Path) -> Iterator[contextlib.ExitStack]:
    """Turns errors of the file system into an InputError."""
    advice = f"free space there; what is done is in {part.name}, rerun the command to resume"
    with (
        in_one_line(f"{output} cannot be written", advice, OSError),
        contextlib.ExitStack() as stack,
    ):
        yield stack


def _describe(
    predictor: Embedder | None, model: str, corpus: Corpus, options: IndexOptions
) -> IndexDescription:
    """Returns the description of the index, and checks the options against the model."""
    common = {
        "collection": corpus.path.name,
        "fingerprint": cache.fingerprint_as_read(corpus.path),
        "count": len(corpus),
        "id_name": corpus.id_name,
        "block": options.block,
    }
    if options.kind == "bm25":
        require_retrieval("bm25s")
        return IndexDescription("bm25", **common, k1=options.k1, b=options.b)
    if predictor is None:
        raise InputError("--model is missing: name the folder of a run, or use --kind=bm25")
    encoder = predictor.spec.encoder
    task = selected_task(predictor, options.task)
    head = sparse_head(encoder, task)
    kind = options.kind or ("dense" if head is None else "sparse")
    common |= {"model": model, "task": task.name if task else ""}
    common["digest"] = identify(predictor, task)
    if kind == "sparse":
        if head is None:
            raise InputError("the model has no sparse head; leave --kind out for its vectors")
        if options.is_compressed:
            raise InputError("a sparse index has no width, precision or approximate search")
        require_retrieval("scipy")
        return IndexDescription(kind, **common, full_width=encoder.transformer.vocab_size)
    full = encoder.pooled_dim
    width = full if options.width is None else options.width
    if not 1 <= width <= full:
        raise InputError(f"--width={width}: the model's vectors have {full} dimensions")
    if options.approximate:
        require_retrieval("faiss")
    return IndexDescription(
        kind,
        **common,
        full_width=full,
        width=width,
        precision=options.precision,
        similarity=_similarity(predictor.spec),
        approximate=options.approximate,
    )


def _similarity(spec: InferenceSpec) -> str:
    """Returns how vectors are compared: cosines of unit vectors, else as a loaded folder states."""
    if spec.encoder.pooling.normalize:
        return "cosine"
    similarity = spec.similarity or "dot"
    if similarity not in SIMILARITIES:
        raise InputError(
            f"the model's vectors are compared by similarity {similarity!r}; an index has "
            f"{' or '.join(SIMILARITIES)}"
        )
    return similarity


def selected_task(predictor: Embedder, name: str | None) -> Task | None:
    """Returns the task whose templates format texts; None for texts as they are."""
    return predictor.task(name) if name else task_with_roles(predictor.tasks.values())


def role_of(predictor: Embedder, task: Task | None, role: str) -> str:
    """Returns the role to embed texts with: "" if one template or prompt is for all texts."""
    if task is None:
        return role if role_prompt(predictor.spec, role) else ""
    return role if role in dict(task.role_templates) else ""


def _begin(part: pathlib.Path, description: IndexDescription) -> None:
    """Creates the folder of an unfinished index, or accepts that of the same settings."""
    if (part / NAME).is_file():
        stored = read_index_description(part)
        if changed := stored.differences(description):
            raise InputError(
                f"{part} was left by another command ({'; '.join(changed)}); remove it, or name "
                "another --output"
            )
        return
    # A killed start may have left an empty folder, or the temporary file of the description.
    if any(path.is_file() and not path.name.startswith(".") for path in part.rglob("*")):
        raise InputError(f"{part} exists and is no unfinished index; remove it, or name another")
    (part / FOLDER).mkdir(parents=True, exist_ok=True)
    description.write(part)


def _write_blocks(
    part: pathlib.Path, description: IndexDescription, predictor: Embedder, corpus: Corpus
) -> None:
    """Encodes the blocks of this process that are not there yet."""
    first, processes = distributed.process_share()
    mine = range(first, description.blocks, processes)
    missing = [block for block in mine if not holds_block(part, block)]
    done = sum(len(description.rows(block)) for block in mine if block not in missing)
    if done:
        terminal.print_one_line(f"resuming after {done} documents of {part}")
    total = sum(len(description.rows(block)) for block in mine)
    with (
        progress("indexing", done, "documents", total) as advance,
        predictor.reporting_truncated_once(total - done),
    ):
        for block in missing:
            write_block(part, block, _encode(description, predictor, corpus, block))
            advance(len(description.rows(block)))
            corpus.release()


def _encode(
    description: IndexDescription, predictor: Embedder, corpus: Corpus, block: int
) -> Arrays:
    """Returns the arrays of a block."""
    rows = description.rows(block)
    task = selected_task(predictor, description.task)
    role = role_of(predictor, task, "document")
    documents = [corpus.text(row) for row in rows]
    texts = document_inputs(task, role, documents)
    names = [f"{corpus.path}: {corpus.id_name} {corpus.ids[row]!r}" for row in rows]
    options = {"role": role, "names": names, "progress": False}
    if description.kind == "sparse":
        vectors = SparseVectors(*predictor.embed_sparse(texts, description.task or None, **options))
        return sparse_arrays(vectors, description)
    return dense_arrays(predictor.embed(texts, description.task or None, **options), description)


def _finish(
    part: pathlib.Path, output: pathlib.Path, description: IndexDescription, corpus: Corpus
) -> None:
    """Completes the folder and gives it its name."""
    if description.kind == "bm25":
        texts = (corpus.text(row) for row in range(len(corpus)))
        with progress("reading words", 0, "documents", len(corpus)) as advance:
            write_bm25(part, texts, description, advance)
    elif description.approximate:
        with progress("linking neighbors", 0, "documents", len(corpus)) as advance:
            write_approximate(part, description, advance)
    shutil.rmtree(part / IDS, ignore_errors=True)
    (part / IDS).mkdir()
    corpus.copy_ids(part / IDS)
    digests.write(part)
    sync_tree(part)
    move_whole(part, output)
