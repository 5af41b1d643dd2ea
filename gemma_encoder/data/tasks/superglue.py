"""SuperGLUE from TensorFlow Datasets, one declaration per task.

T5 generates answers, whereas an encoder scores texts: COPA and ReCoRD become one text per option,
and the text of WSC includes the candidate noun for the marked pronoun.
"""

import re
from collections.abc import Callable
from typing import Any

from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.tfds import Row, declare_t5
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import UNLABELED
from gemma_encoder.inputs.task import Example

_NLI = "hypothesis premise"
_NLI_CLASSES = "entailment not_entailment"
_NO_YES = "False True"
# Diagnostic sets: only a test split with published labels, scored by the head of RTE.
_DIAGNOSTIC = {"head": "superglue_rte", "splits": "test"}


def _copa(row: Row) -> list[Example]:
    """Two options; the label is the index of the correct one."""
    shared = {"premise": row["premise"], "question": row["question"]}
    return [
        Example(
            {"choice": row[f"choice{option + 1}"], **shared},
            UNLABELED if row["label"] == UNLABELED else float(row["label"] == option),
            query_id=str(row["idx"]),
            document_id=str(option),
            info={"idx": row["idx"]},
        )
        for option in range(2)
    ]


def _multirc(row: Row) -> list[Example]:
    """One answer, correct or not independently of the other answers to its question."""
    paragraph = re.sub(r"</?[A-Za-z]+>", "", re.sub(r"<br */?>", " ", row["paragraph"]))
    fields = {name: row[name] for name in ("question", "answer")}
    fields["paragraph"] = " ".join(paragraph.split())
    idx = {name: row[f"{name}_idx"] for name in ("paragraph", "question", "answer")}
    query = f"{idx['paragraph']}-{idx['question']}"
    return [Example(fields, row["label"], query, info={"idx": idx})]


def _record(row: Row) -> list[Example]:
    """One option per entity of the passage, which replaces the placeholder of the query."""
    if "@placeholder" not in row["query"]:
        raise InputError("the field 'query' has no @placeholder for an entity")
    if not row["entities"]:
        raise InputError("the field 'entities' is empty: there is nothing to choose from")
    # The article ends with highlights, one per line, often without a period.
    passage = re.sub(r"(?<=[.?!\"'])\n@highlight\n", " ", row["passage"]).replace(
        "\n@highlight\n", ". "
    )
    return [
        Example(
            {"query": row["query"].replace("@placeholder", entity), "passage": passage},
            float(entity in row["answers"]) if row["answers"] else UNLABELED,
            query_id=str(row["idx"]),
            document_id=str(option),
            info={"idx": row["idx"], "option": entity, "answers": row["answers"]},
        )
        for option, entity in enumerate(row["entities"])
    ]


def _wsc(row: Row) -> list[Example]:
    """Marks the pronoun with asterisks: its occurrence nearest to the word index.

    The index is off by a few words in some records.
    """
    text = row["text"]
    pronoun = row["pronoun"]
    as_word = rf"(?<!\w){re.escape(pronoun)}(?!\w)"
    for pattern in (as_word, re.escape(pronoun)):
        if matches := list(re.finditer(pattern, text, re.IGNORECASE)):
            break
    if not pronoun or not matches:
        raise InputError(f"the field 'text' does not contain the pronoun {pronoun!r}")

    def distance(match: re.Match) -> int:
        return abs(len(text[: match.start() + 1].split()) - 1 - row["pronoun_index"])

    nearest = min(matches, key=distance)
    marked = f"{text[: nearest.start()]}*{nearest[0]}*{text[nearest.end() :]}"
    return [Example({"text": marked, "noun": row["noun"]}, row["label"], info={"idx": row["idx"]})]


def _axg(row: Row) -> list[Example]:
    """One of a pair of consecutive examples that differ only in the gender of a pronoun."""
    fields = {"premise": row["premise"], "hypothesis": row["hypothesis"]}
    return [Example(fields, row["label"], query_id=str(row["idx"] // 2), info={"idx": row["idx"]})]


def _same(names: str) -> dict[str, str]:
    """Maps names to columns of the same names."""
    return {name: name for name in names.split()}


def _task(name: str, *names: Any, **more: Any) -> tuple[str, Callable[[DataOptions], Source]]:
    """Declares a task by fields, metrics and classes; other arguments as `declare_t5`."""
    builder = {"wsc": "wsc.fixed"}.get(name, name)
    return declare_t5(f"superglue_{name}", f"super_glue/{builder}:1.0.2", *names, **more)


TASKS: dict[str, Callable[[DataOptions], Source]] = dict(
    [
        _task("boolq", "passage question", "accuracy", _NO_YES, truncation="passage question"),
        _task("cb", _NLI, "accuracy macro_f1", "entailment contradiction neutral"),
        _task(
            "copa",
            "choice premise question",
            "accuracy",
            kind="choice",
            truncation="premise choice",
            columns=_same("premise question choice1 choice2 idx"),
            examples=_copa,
        ),
        _task(
            "multirc",
            "question answer paragraph",
            "f1a exact_match",
            _NO_YES,
            columns=_same("question answer paragraph")
            | {f"{name}_idx": f"idx/{name}" for name in ("paragraph", "question", "answer")},
            examples=_multirc,
        ),
        _task(
            "record",
            "query passage",
            "token_f1 exact_match",
            kind="choice",
            label=None,
            columns=_same("query passage entities answers") | {"idx": "idx/query"},
            examples=_record,
        ),
        _task("rte", _NLI, "accuracy", _NLI_CLASSES),
        _task(
            "wic",
            "sentence1 sentence2 word",
            "accuracy",
            _NO_YES,
            truncation="sentence2 sentence1",
        ),
        _task(
            "wsc",
            "text noun",
            "accuracy",
            _NO_YES,
            truncation="text noun",
            columns=_same("text idx")
            | {"noun": "span1_text", "pronoun": "span2_text", "pronoun_index": "span2_index"},
            examples=_wsc,
        ),
        _task(
            "axb",
            _NLI,
            "matthews_correlation",
            _NLI_CLASSES,
            columns={"premise": "sentence1", "hypothesis": "sentence2", "idx": "idx"},
            **_DIAGNOSTIC,
        ),
        _task("axg", _NLI, "accuracy gender_parity", _NLI_CLASSES, examples=_axg, **_DIAGNOSTIC),
    ]
)
