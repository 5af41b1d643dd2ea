"""Data options of retrieval tasks: `config.retrieval`."""

import dataclasses

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.options import check_at_least, option
from gemma_encoder.inputs.template import Template

# Kind of task by representation of a text.
REPRESENTATIONS = {"dense": "retrieval", "sparse": "sparse_retrieval"}


@dataclasses.dataclass(frozen=True)
class RetrievalOptions:
    """The lists and texts of retrieval tasks; `ranking` has the run that negatives are from."""

    representation: str = option(
        "dense", 'a text as one vector, "dense", or as weights of the vocabulary, "sparse"'
    )
    positives: int = option(1, "most positives of a query in a step, drawn anew in each epoch")
    negatives: int = option(
        1,
        "hard negatives of a query in a step, drawn from ranking.negative_ranks of the run; 0: "
        "only the documents of other queries",
    )
    max_negative_share: float = option(
        0.0,
        "leave out hard negatives that the run scores above this share of the best positive's "
        "score, such as 0.95; needs a TREC run; 0: none",
    )
    query_template: str = option("Query: {query}", "text of a query")
    document_template: str = option(
        "Document: {document}",
        'text of a document; of own files with several columns, such as "{title} {body}"',
    )
    eval_documents: int = option(
        10_000,
        "evaluate on the relevant documents and random others, this many together; 0: on all",
    )

    def __post_init__(self):
        if self.representation not in REPRESENTATIONS:
            raise unknown("retrieval.representation", self.representation, REPRESENTATIONS)
        check_at_least("retrieval", self, ("positives",), 1)
        check_at_least("retrieval", self, ("negatives", "eval_documents"), 0)
        if not 0 <= self.max_negative_share <= 1:
            raise InputError(
                f"retrieval.max_negative_share must be from 0 to 1, got {self.max_negative_share}"
            )
        check_template("query", self.query_template)
        Template(self.document_template)

    @property
    def list_size(self) -> int:
        """Most texts of a training list: the query and its documents."""
        return 1 + self.positives + self.negatives


def check_template(role: str, text: str) -> None:
    """Raises InputError unless the only field of a template is its role."""
    if Template(text).fields != (role,):
        raise InputError(
            f"retrieval.{role}_template must have the field {{{role}}}, and no other, got {text!r}"
        )
