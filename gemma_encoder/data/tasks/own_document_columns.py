"""Columns of the user's files of a retrieval task, in one of three layouts.

| layout | columns |
| --- | --- |
| pairs | `query`, `document`: every document is relevant |
| graded | `query`, `document`, `label`: the grade, 0 for not relevant |
| lists | `query`, `positive` and `negative`: a text each, or lists of texts |

`own.fields` names other columns: the query, then those of a document, such as a title and a body.
In lists, a document of several fields is an object. The column `score` has the scores of a teacher:
a number per document; in lists, those of the positives, then those of the negatives.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from gemma_encoder.data.retrieval import METRICS, retrieval_task
from gemma_encoder.data.retrieval_options import REPRESENTATIONS, RetrievalOptions
from gemma_encoder.data.source import DataOptions, StoredTask
from gemma_encoder.data.tasks.own_checks import without_indices
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template, identifier

DEFAULT_TEMPLATE = RetrievalOptions.document_template
BY_DEFAULT = {  # option -> columns that it is by default, if one exists
    "positive": ("positive", "positives"),
    "negative": ("negative", "negatives"),
    "score": ("score", "scores"),
    "query_id": ("query_id",),
    "document_id": ("document_id",),
}


@dataclasses.dataclass(frozen=True)
class DocumentColumns:
    """Meaning of the columns of the files. Stored in checkpoints.

    Attributes:
        query: column of the query.
        document: field of the document's template -> column; in lists, to itself.
        label, score: columns of grades and of a teacher's scores, "" for none.
        positive, negative: columns of lists, "" for none.
        query_id, document_id: columns of ids, "" for none.
    """

    query: str
    document: Mapping[str, str]
    label: str = ""
    score: str = ""
    positive: str = ""
    negative: str = ""
    query_id: str = ""
    document_id: str = ""

    class_indices: ClassVar[bool] = False  # as in the reading of other kinds
    range_is_inferred: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, JSON-ready."""
        return dataclasses.asdict(self)

    @property
    def are_lists(self) -> bool:
        """True if a row has all documents of a query."""
        return bool(self.positive)

    @classmethod
    def of(
        cls, options: OwnOptions, path: pathlib.Path, present: Sequence[str]
    ) -> "DocumentColumns":
        """Resolves the options for the training file `path` with the columns `present`.

        Raises:
            InputError: an option names a missing column, or the query or the document is missing.
        """
        listed = ", ".join(map(repr, present))
        _check_named(options, path, present)
        query, *fields = options.fields or ("query",)
        if query not in present:
            raise InputError(
                f"{path} has no column 'query'; it has {listed}; set own.fields to the columns of "
                "the query and of the document"
            )
        named = {
            option: getattr(options, option) or next((n for n in names if n in present), "")
            for option, names in BY_DEFAULT.items()
        }
        if named["positive"]:
            return cls._of_lists(query, fields, named)
        named |= {"negative": "", "label": options.label if options.label in present else ""}
        if not fields and "document" in present:
            fields = ["document"]
        elif not fields:
            fields = [name for name in present if name not in (query, *named.values())]
            fields = without_indices(fields, (), str(path))
        if not fields:
            raise InputError(
                f"{path} has the columns {listed}; a row needs a query and a document, or a query, "
                "'positive' and 'negative'; set own.fields to the columns of query and document"
            )
        return cls(query, {identifier(name): name for name in fields}, **named)

    @classmethod
    def _of_lists(
        cls, query: str, fields: Sequence[str], named: Mapping[str, str]
    ) -> "DocumentColumns":
        positive = named["positive"]
        if fields:
            raise InputError(
                f"own.fields names {fields[0]!r}, but the documents are in {positive!r}; name the "
                "query alone"
            )
        if positive in BY_DEFAULT["positive"] and not named["negative"]:  # in a later JSON object
            named = {**named, "negative": positive.replace("positive", "negative")}
        return cls(query, {}, **{**named, "document_id": ""})

    def with_template(
        self, template: str, default: str, options: OwnOptions
    ) -> tuple["DocumentColumns", Template]:
        """Returns the columns that a template of documents reads, and the template.

        Args:
            template: text of the template, with fields among the columns; a single column is also
                the field "document".
            default: text that is replaced if there are several columns.
            options: truncation.
        """
        document = dict(self.document)
        fields = Template(template).fields
        if self.are_lists:
            document = dict(zip(fields, fields, strict=True))
        elif not set(fields) <= document.keys():
            if len(document) == 1:
                document = {"document": next(iter(document.values()))}
            elif template == default:
                template = f"Document: {' '.join(f'{{{field}}}' for field in document)}"
        missing = [field for field in Template(template).fields if field not in document]
        if missing:
            raise InputError(
                f"retrieval.document_template {template!r} names {missing[0]!r}, which is not among"
                f" the fields of a document, {', '.join(document)}; set own.fields to the columns "
                "of the query and of the document"
            )
        used = {field: document[field] for field in Template(template).fields}
        truncation = [field for field in map(identifier, options.truncation) if field in used]
        made = Template(template, truncation, options.protected_share)
        return dataclasses.replace(self, document=used), made


def _check_named(options: OwnOptions, path: pathlib.Path, present: Sequence[str]) -> None:
    """Raises InputError if an option names a column that the training file lacks."""
    named = [(option, getattr(options, option)) for option in BY_DEFAULT]
    named += [("fields", name) for name in options.fields]
    named += [("label", options.label)] if options.label != OwnOptions.label else []
    for option, name in named:
        if name and name not in present:
            raise InputError(
                f"{path} has no column {name!r}, which own.{option} names; it has "
                f"{', '.join(map(repr, present))}"
            )


def resolve_retrieval(
    own: OwnOptions,
    options: DataOptions,
    path: pathlib.Path,
    present: Sequence[str],
    stored: StoredTask | None,
) -> tuple[Task, DocumentColumns]:
    """Returns the task and the meaning of the columns, from the checkpoint if there is one.

    Args:
        own: the options of the files.
        options: the data options of the config.
        path: the training file.
        present: its columns.
        stored: the checkpoint's task.

    Raises:
        InputError: the options contradict the checkpoint, or name a missing column.
    """
    template = options.retrieval.document_template
    if stored is None:
        columns = DocumentColumns.of(own, path, present)
        columns, document = columns.with_template(template, DEFAULT_TEMPLATE, own)
        return retrieval_task(own.name, options, own.metrics or METRICS, document), columns
    kind = REPRESENTATIONS[options.retrieval.representation]
    if stored.task.kind.name != kind or "document" not in stored.inferred:
        raise InputError(
            f"{stored.origin} was trained with a task {own.name!r} of kind {stored.task.kind}, not "
            f"{kind}; train again in another workdir"
        )
    before = stored.task.template.text
    if template not in (before, DEFAULT_TEMPLATE):
        raise InputError(
            f"retrieval.document_template is {template!r}, but {stored.origin} was trained with "
            f"{before!r}; leave it as it was, or train again in another workdir"
        )
    task = dataclasses.replace(stored.task, metrics=own.metrics or stored.task.metrics)
    return task, DocumentColumns(**stored.inferred)
