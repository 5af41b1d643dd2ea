"""SuperGLUE through TensorFlow Datasets: each task is one declaration. Names in the text are T5's (arXiv 1910.10683, appendix D).

Where T5 writes a text to be answered in words, an encoder scores it: COPA and ReCoRD become one text per option, WSC names the noun
that the marked pronoun may stand for.
"""

import re
from collections.abc import Callable

from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.tfds import Row, declare_tfds
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import UNLABELLED
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

_ENTAILMENT = Template(
    "rte hypothesis: {hypothesis} premise: {premise}", cut=("premise", "hypothesis")
)
_ENTAILMENT_CLASSES = ("entailment", "not_entailment")
_NO_YES = ("False", "True")


def _copa(row: Row) -> list[Example]:
    """Two options; the label is the number of the one that is right."""
    return [
        Example(
            {
                "choice": row[f"choice{number + 1}"],
                "premise": row["premise"],
                "question": row["question"],
            },
            UNLABELLED if row["label"] == UNLABELLED else float(row["label"] == number),
            query_id=str(row["idx"]),
            document_id=str(number),
            info={"idx": row["idx"]},
        )
        for number in range(2)
    ]


def _multirc(row: Row) -> list[Example]:
    """An answer that may be right or wrong whatever the others of its question are."""
    idx = {name: row[name] for name in ("paragraph_idx", "question_idx", "answer_idx")}
    paragraph = re.sub(r"</?[A-Za-z]+>", "", re.sub(r"<br */?>", " ", row["paragraph"]))
    return [
        Example(
            {
                "question": row["question"],
                "answer": row["answer"],
                "paragraph": " ".join(paragraph.split()),
            },
            row["label"],
            query_id=f"{row['paragraph_idx']}-{row['question_idx']}",
            info={"idx": {name.removesuffix("_idx"): number for name, number in idx.items()}},
        )
    ]


def _record(row: Row) -> list[Example]:
    """One option per entity of the passage, written where the query has its gap."""
    if "@placeholder" not in row["query"]:
        raise InputError("the field 'query' holds no @placeholder for an entity")
    if not row["entities"]:
        raise InputError("the field 'entities' is empty: there is nothing to choose from")
    # The news text ends in highlights, each on a line of its own, often without a full stop.
    passage = re.sub(r"(?<=[.?!\"'])\n@highlight\n", " ", row["passage"]).replace(
        "\n@highlight\n", ". "
    )
    return [
        Example(
            {"query": row["query"].replace("@placeholder", entity), "passage": passage},
            float(entity in row["answers"]) if row["answers"] else UNLABELLED,
            query_id=str(row["idx"]),
            document_id=str(number),
            info={"idx": row["idx"], "option": entity, "answers": row["answers"]},
        )
        for number, entity in enumerate(row["entities"])
    ]


def _wsc(row: Row) -> list[Example]:
    """The pronoun between asterisks. Its place is counted in words, and in a few records miscounted: the nearest one is meant."""
    text, pronoun = row["text"], row["pronoun"]
    found = list(re.finditer(rf"(?<!\w){re.escape(pronoun)}(?!\w)", text, re.IGNORECASE)) or list(
        re.finditer(re.escape(pronoun), text, re.IGNORECASE)
    )
    if not pronoun or not found:
        raise InputError(f"the field 'text' does not hold the pronoun {pronoun!r}")
    place = min(
        found,
        key=lambda match: abs(len(text[: match.start() + 1].split()) - 1 - row["pronoun_index"]),
    )
    marked = f"{text[: place.start()]}*{place[0]}*{text[place.end() :]}"
    return [Example({"text": marked, "noun": row["noun"]}, row["label"], info={"idx": row["idx"]})]


def _axg(row: Row) -> list[Example]:
    """Consecutive examples are a pair that differs in the pronoun's gender only."""
    fields = {"premise": row["premise"], "hypothesis": row["hypothesis"]}
    return [Example(fields, row["label"], query_id=str(row["idx"] // 2), info={"idx": row["idx"]})]


TASKS: dict[str, Callable[[DataOptions], Source]] = dict(
    [
        declare_tfds(
            Task(
                "superglue_boolq",
                "classification",
                Template(
                    "boolq passage: {passage} question: {question}", cut=("passage", "question")
                ),
                metrics=("accuracy",),
                classes=_NO_YES,
            ),
            "super_glue/boolq:1.0.2",
        ),
        declare_tfds(
            Task(
                "superglue_cb",
                "classification",
                Template(
                    "cb hypothesis: {hypothesis} premise: {premise}", cut=("premise", "hypothesis")
                ),
                metrics=("accuracy", "macro_f1"),
                classes=("entailment", "contradiction", "neutral"),
            ),
            "super_glue/cb:1.0.2",
        ),
        declare_tfds(
            Task(
                "superglue_copa",
                "choice",
                Template(
                    "copa choice: {choice} premise: {premise} question: {question}",
                    cut=("premise", "choice"),
                ),
                metrics=("accuracy",),
                chance=0.5,
            ),
            "super_glue/copa:1.0.2",
            columns={name: name for name in ("premise", "question", "choice1", "choice2")},
            examples=_copa,
        ),
        declare_tfds(
            Task(
                "superglue_multirc",
                "classification",
                Template(
                    "multirc question: {question} answer: {answer} paragraph: {paragraph}",
                    cut=("paragraph", "answer", "question"),
                ),
                metrics=("f1a", "exact_match"),
                classes=_NO_YES,
            ),
            "super_glue/multirc:1.0.2",
            numbers={f"{name}_idx": f"idx/{name}" for name in ("paragraph", "question", "answer")},
            examples=_multirc,
        ),
        declare_tfds(
            Task(
                "superglue_record",
                "choice",
                Template("record query: {query} passage: {passage}", cut=("passage", "query")),
                metrics=("token_f1", "exact_match"),
            ),
            "super_glue/record:1.0.2",
            label=None,
            numbers={"idx": "idx/query"},
            lists={"entities": "entities", "answers": "answers"},
            examples=_record,
        ),
        declare_tfds(
            Task(
                "superglue_rte",
                "classification",
                _ENTAILMENT,
                metrics=("accuracy",),
                classes=_ENTAILMENT_CLASSES,
                chance=0.5,
            ),
            "super_glue/rte:1.0.2",
        ),
        declare_tfds(
            Task(
                "superglue_wic",
                "classification",
                Template(
                    "wic sentence1: {sentence1} sentence2: {sentence2} word: {word}",
                    cut=("sentence2", "sentence1"),
                ),
                metrics=("accuracy",),
                classes=_NO_YES,
                chance=0.5,
            ),
            "super_glue/wic:1.0.2",
        ),
        declare_tfds(
            Task(
                "superglue_wsc",
                "classification",
                Template("wsc text: {text} noun: {noun}", cut=("text", "noun")),
                metrics=("accuracy",),
                classes=_NO_YES,
            ),
            "super_glue/wsc.fixed:1.0.2",
            columns={"text": "text", "noun": "span1_text", "pronoun": "span2_text"},
            numbers={"idx": "idx", "pronoun_index": "span2_index"},
            examples=_wsc,
        ),
        # Diagnostics: only a test split, whose labels are published; scored by the head that RTE trains.
        declare_tfds(
            Task(
                "superglue_axb",
                "classification",
                _ENTAILMENT,
                metrics=("matthews_correlation",),
                classes=_ENTAILMENT_CLASSES,
                head="superglue_rte",
                chance=0.0,
            ),
            "super_glue/axb:1.0.2",
            columns={"premise": "sentence1", "hypothesis": "sentence2"},
            splits=("test",),
        ),
        declare_tfds(
            Task(
                "superglue_axg",
                "classification",
                _ENTAILMENT,
                metrics=("accuracy", "gender_parity"),
                classes=_ENTAILMENT_CLASSES,
                head="superglue_rte",
                chance=0.5,
            ),
            "super_glue/axg:1.0.2",
            splits=("test",),
            examples=_axg,
        ),
    ]
)
