"""The paper's claims, and what the intervals say of them. Claims are those of arXiv 2503.02656, and one of RankT5 (arXiv 2210.10634)."""

import dataclasses
from collections.abc import Sequence

from gemma_encoder.evaluation.bootstrap import Interval
from gemma_encoder.experiments.studies.statistics import Cell

HOLDS, FAILS, UNKNOWN = "holds at this scale", "does not hold at this scale", "cannot be told"
MARGIN = 0.02  # of the metric: what counts as no difference


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Some rows against others.

    Attributes:
        above, below: rows whose mean metrics are compared.
        note: of a contrast that is shown beside the claim and decides nothing: what it is.
    """

    above: tuple[str, ...]
    below: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        return " − ".join(
            rows[0] if len(rows) == 1 else f"mean of ({', '.join(rows)})"
            for rows in (self.above, self.below)
        )


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence that results can support or contradict.

    Attributes:
        text: the claim.
        study: whose rows decide.
        rule: "beats" (each difference is positive), "equal" (no interval leaves out zero, and all lie within `MARGIN`) or "longer" (negative or nothing
            at the first contrast, positive at the last one).
        contrasts: what is compared.
        kinds: of the tasks it is about.
        caution: what the reader should know of the test.
    """

    text: str
    study: str
    rule: str
    contrasts: tuple[Contrast, ...]
    kinds: tuple[str, ...] = ("classification", "regression", "ranking", "choice")
    caution: str = ""


SIMPLE, ATTENTION = (
    ("mean_bidirectional", "last_k_bidirectional"),
    ("attention_query_bidirectional", "attention_kv_bidirectional"),
)
CLAIMS = (
    Claim(
        "Fine-tuning with the bidirectional mask beats staying causal.",
        "attention",
        "beats",
        (
            Contrast(("bidirectional",), ("causal",)),
            Contrast(
                ("bidirectional_random",),
                ("causal_random",),
                "from random weights: architecture, not adaptation",
            ),
            Contrast(("bidirectional",), ("bidirectional_random",), "what pretraining gives"),
        ),
    ),
    Claim(
        "Simple pooling (mean, last token) beats attention pooling on classification and regression.",
        "pooling",
        "beats",
        (
            Contrast(SIMPLE, ATTENTION),
            *(
                Contrast((simple,), (attention,), "one by one")
                for simple in SIMPLE
                for attention in ATTENTION
            ),
        ),
        kinds=("classification", "regression"),
    ),
    Claim(
        "The side of the padding makes no significant difference.",
        "padding",
        "equal",
        (Contrast(("left",), ("right",)), Contrast(("packed",), ("right",), "packing")),
        caution=f"It holds where the interval holds zero and lies within ±{MARGIN} of the metric; a wide interval that holds zero is no proof.",
    ),
    Claim(
        "Dropout helps fine-tuning.",
        "dropout",
        "beats",
        (
            Contrast(("feed_forward_0.1",), ("none",)),
            Contrast(("attention_0.1",), ("none",), "on attention alone"),
            Contrast(("both_0.1",), ("none",), "on both"),
        ),
        caution="Judged by the recipe's own dropout, 0.1 on feed-forward outputs.",
    ),
    Claim(
        "Softmax beats PointCE only with longer lists (RankT5).",
        "ranking_loss",
        "longer",
        tuple(Contrast((f"softmax_{size}",), (f"point_ce_{size}",)) for size in (4, 8, 16, 36)),
        kinds=("ranking",),
        caution="RankT5 saw the change at some 20 to 30 documents; the shortest and the longest lists that were run decide.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A contrast on one task: its interval and seeds, and what it says of the claim; no interval where runs are missing."""

    cell: Cell
    contrast: Contrast
    difference: Interval | None
    seeds: int
    verdict: str


def judge(claim: Claim, cells: Sequence[Cell]) -> list[Judged]:
    """Every contrast of a claim on every task that it is about."""
    found = []
    for cell in cells:
        if (
            cell.study.name != claim.study
            or not cell.runs
            or cell.example["kind"] not in claim.kinds
        ):
            continue
        for contrast in claim.contrasts:
            measured = cell.contrast(contrast.above, contrast.below)
            if measured is None:
                found.append(Judged(cell, contrast, None, 0, UNKNOWN))
            else:
                rule = "equal" if claim.rule == "equal" else "beats"
                found.append(Judged(cell, contrast, *measured, by_interval(rule, measured[0])))
    return found


def by_interval(rule: str, difference: Interval) -> str:
    """What one interval says: of "beats", which side of zero it is on; of "equal", whether it leaves out zero, or is within the margin."""
    if rule == "equal":
        if difference.low > 0 or difference.high < 0:
            return FAILS
        return HOLDS if difference.low > -MARGIN and difference.high < MARGIN else UNKNOWN
    return HOLDS if difference.low > 0 else FAILS if difference.high < 0 else UNKNOWN


def overall(claim: Claim, judged: Sequence[Judged]) -> str:
    """The claim's verdict: one word where all tasks were run and agree, else those that were run, by verdict."""
    by_task: dict[str, str] = {}
    for cell in {
        id(item.cell): item.cell for item in judged if item.difference is not None
    }.values():
        name = cell.task if cell.scale == "mini" else f"{cell.task} at {cell.scale}"
        by_task[name] = _on_one_task(
            claim, [item for item in judged if item.cell is cell and not item.contrast.note]
        )
    verdicts = set(by_task.values())
    if not verdicts:
        return f"{UNKNOWN}: not run"
    if len(verdicts) == 1 and len(by_task) == len({id(item.cell) for item in judged}):
        return verdicts.pop()
    return "; ".join(
        f"{said} on {', '.join(task for task in by_task if by_task[task] == said)}"
        for said in (HOLDS, FAILS, UNKNOWN)
        if said in verdicts
    )


def _on_one_task(claim: Claim, judged: Sequence[Judged]) -> str:
    known = [item for item in judged if item.difference is not None]
    if not known:
        return UNKNOWN
    if claim.rule != "longer":
        verdicts = {item.verdict for item in judged}
        return verdicts.pop() if len(verdicts) == 1 else UNKNOWN
    short, long = known[0].verdict, known[-1].verdict
    if len(known) < 2:
        return UNKNOWN
    if long == FAILS or short == HOLDS:
        return FAILS
    return HOLDS if long == HOLDS else UNKNOWN
