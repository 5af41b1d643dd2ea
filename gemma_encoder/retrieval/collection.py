"""Collections and queries in the layouts of MS MARCO and BEIR, as fields of a task's template."""

import pathlib
from collections.abc import Sequence

from gemma_encoder.data.files.corpus import Corpus, Layout, TsvLayout
from gemma_encoder.data.files.lines import COMPRESSED, without_compression
from gemma_encoder.data.tasks.beir import JsonLayout
from gemma_encoder.embedding import TextInputs
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import from_json
from gemma_encoder.inputs.task import Task

TABLES = (".tsv", ".txt")
TITLED = {"title", "text"}  # fields that are filled by name


class Document(str):
    """A document, its title and text joined, which it also holds apart.

    Attributes:
        title: "" without one.
        body: the text alone.
    """

    title: str
    body: str

    def __new__(cls, joined: str, title: str, body: str) -> "Document":
        """Joins the parts as the layout does."""
        document = super().__new__(cls, joined)
        document.title = title
        document.body = body
        return document


class DocumentLayout(JsonLayout):
    """BEIR's corpus.jsonl, whose documents keep their titles apart and are never empty."""

    condition = " with a text each"  # checked once, when the cached index is built

    def __init__(self):
        super().__init__(may_be_empty=False)

    def parse(self, line: str) -> tuple[str, Document]:
        """Returns the id and the document; raises ValueError for a malformed line."""
        text_id, joined = super().parse(line)
        record = from_json(line)
        return text_id, Document(joined, record.get("title") or "", record["text"])


def open_collection(path: pathlib.Path) -> Corpus:
    """Opens a collection: pid and passage in a .tsv, or BEIR's corpus.jsonl; also compressed.

    Raises:
        InputError: there is no such file, a line is malformed, a document is empty, or an id is
            repeated.
    """
    return Corpus(path, _layout(path, "collection", TsvLayout("pid", "passage")))


def open_queries(path: pathlib.Path) -> Corpus:
    """Opens queries: qid and query in a .tsv, or BEIR's queries.jsonl; also compressed.

    Raises:
        InputError: as for `open_collection`.
    """
    return Corpus(path, _layout(path, "queries", TsvLayout("qid", "query")), in_memory=True)


def _layout(path: pathlib.Path, flag: str, table: Layout) -> Layout:
    if not path.is_file():
        raise InputError(f"--{flag}={path}: there is no such file")
    suffix = pathlib.Path(without_compression(path.name)).suffix
    if suffix == ".jsonl":
        return DocumentLayout()
    if suffix in TABLES:
        return table
    raise InputError(
        f"--{flag}={path}: expected a .tsv file with an id and a text a line, or a .jsonl file "
        f"with _id, title and text, plain or compressed ({', '.join(COMPRESSED)})"
    )


def document_inputs(task: Task | None, role: str, documents: Sequence[str]) -> TextInputs:
    """Returns documents as texts for a template: as they are, or as title and text.

    Args:
        task: formats the documents; None for documents as they are.
        role: the role of the template.
        documents: of `open_collection`.

    Raises:
        InputError: the template has more than two fields.
    """
    fields = ("text",) if task is None else task.template_for(role).fields
    if len(fields) == 1:
        return list(documents)
    if len(fields) > 2:
        raise InputError(
            f"task {task.name!r} formats {len(fields)} fields ({', '.join(fields)}); a document "
            "of a collection has a title and a text"
        )
    first, second = ("title", "text") if set(fields) == TITLED else fields
    return [
        {first: getattr(text, "title", ""), second: getattr(text, "body", text)}
        for text in documents
    ]
