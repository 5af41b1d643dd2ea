"""SuperGLUE through TensorFlow Datasets: each task is one declaration.

Where T5 writes a text to be answered in words, an encoder scores it: COPA and ReCoRD become one
text per option, WSC names the noun that the marked pronoun may stand for.
"""

import re
from collections.abc import Callable
from typing import Any

from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.tfds import Row, declare_t5
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import UNLABELED
from gemma_encoder.inputs.task import Example

_NLI, _NLI_CLASSES = "hypothesis premise", "entailment not_entailment"
_NO_YES = "False True"
# Diagnostics: only a test split, whose labels are published; scored by the head that RTE trains.
_DIAGNOSTIC = {"head": "superglue_rte", "splits": "test"}


def _copa(row: Row) -> list[Example]:
    """Two options; the label is the number of the one that is right."""
    shared = {"premise": row["premise"], "question": row["question"]}
    return [
        Example(
            {"choice": row[f"choice{number + 1}"], **shared},
            UNLABELED if row["label"] == UNLABELED else float(row["label"] == number),
            query_id=str(row["idx"]),
            document_id=str(number),
            info={"idx": row["idx"]},
        )
        for number in range(2)
    ]


def _multirc(row: Row) -> list[Example]:
    """An answer that may be right or wrong whatever the others of its question are."""
    paragraph = re.sub(r"</?[A-Za-z]+>", "", re.sub(r"<br */?>", " ", row["paragraph"]))
    fields = {name: row[name] for name in ("question", "answer")}
    fields["paragraph"] = " ".join(paragraph.split())
    idx = {name: row[f"{name}_idx"] for name in ("paragraph", "question", "answer")}
    query = f"{idx['paragraph']}-{idx['question']}"
    return [Example(fields, row["label"], query, info={"idx": idx})]


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
            float(entity in row["answers"]) if row["answers"] else UNLABELED,
            query_id=str(row["idx"]),
            document_id=str(number),
            info={"idx": row["idx"], "option": entity, "answers": row["answers"]},
        )
        for number, entity in enumerate(row["entities"])
    ]


def _wsc(row: Row) -> list[Example]:
    """The pronoun between asterisks: of several, the one nearest to its index.

    The index counts words, and a few records miscount.
    """
    text, pronoun = row["text"], row["pronoun"]
    as_word = rf"(?<!\w){re.escape(pronoun)}(?!\w)"
    for pattern in (as_word, re.escape(pronoun)):
        if matches := list(re.finditer(pattern, text, re.IGNORECASE)):
            break
    if not pronoun or not matches:
        raise InputError(f"the field 'text' does not hold the pronoun {pronoun!r}")

    def distance(match: re.Match) -> int:
        return abs(len(text[: match.start() + 1].split()) - 1 - row["pronoun_index"])

    nearest = min(matches, key=distance)
    marked = f"{text[: nearest.start()]}*{nearest[0]}*{text[nearest.end() :]}"
    return [Example({"text": marked, "noun": row["noun"]}, row["label"], info={"idx": row["idx"]})]


def _axg(row: Row) -> list[Example]:
    """Consecutive examples are a pair that differs in the pronoun's gender only."""
    fields = {"premise": row["premise"], "hypothesis": row["hypothesis"]}
    return [Example(fields, row["label"], query_id=str(row["idx"] // 2), info={"idx": row["idx"]})]


def _same(names: str) -> dict[str, str]:
    """Columns that the examples name as the data do."""
    return {name: name for name in names.split()}


def _task(name: str, *names: Any, **more: Any) -> tuple[str, Callable[[DataOptions], Source]]:
    """A task of fields, metrics, classes and chance; more arguments as for `declare_t5`."""
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
            chance=0.5,
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
        _task("rte", _NLI, "accuracy", _NLI_CLASSES, 0.5),
        _task(
            "wic",
            "sentence1 sentence2 word",
            "accuracy",
            _NO_YES,
            0.5,
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
            0.0,
            columns={"premise": "sentence1", "hypothesis": "sentence2", "idx": "idx"},
            **_DIAGNOSTIC,
        ),
        _task(
            "axg", _NLI, "accuracy gender_parity", _NLI_CLASSES, 0.5, examples=_axg, **_DIAGNOSTIC
        ),
    ]
)
