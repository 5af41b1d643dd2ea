"""Claims of the paper (arXiv 2503.02656) and of RankT5 (arXiv 2210.10634), judged by intervals."""

import dataclasses
from collections.abc import Sequence

from gemma_encoder.evaluation.bootstrap import Interval
from gemma_encoder.experiments.studies.statistics import Cell, negated

# Verdicts.
HOLDS = "holds at this scale"
FAILS = "does not hold at this scale"
UNKNOWN = "cannot be told"

MARGIN = 0.02  # differences of a metric within the margin count as equal


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Difference between the mean metrics of two groups of rows.

    Attributes:
        above, below: rows of the two groups.
        note: describes a contrast that is shown beside the claim but does not decide it; "" for
            contrasts that decide.
    """

    above: tuple[str, ...]
    below: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        return f"{_mean_of(self.above)} − {_mean_of(self.below)}"


def _mean_of(rows: Sequence[str]) -> str:
    return rows[0] if len(rows) == 1 else f"mean of ({', '.join(rows)})"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence that results can support or contradict.

    Attributes:
        text: the claim.
        study: study with the rows.
        rule: "beats" (all differences are gains), "equal" (all intervals contain zero and lie
            within `MARGIN`) or "longer" (the first contrast is no gain, the last one is).
        contrasts: compared rows.
        kinds: kinds of tasks that the claim is about.
        caution: limitation of the test, for the reader.
    """

    text: str
    study: str
    rule: str
    contrasts: tuple[Contrast, ...]
    kinds: tuple[str, ...] = ("classification", "regression", "ranking", "choice")
    caution: str = ""


SIMPLE = ("mean_bidirectional", "last_k_bidirectional")
ATTENTION = ("attention_query_bidirectional", "attention_kv_bidirectional")
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
        "Simple pooling (mean, last token) beats attention pooling on classification and "
        "regression.",
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
        caution=f"It holds where the interval holds zero and lies within ±{MARGIN} of the metric; "
        "a wide interval that holds zero is no proof.",
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
        caution="RankT5 saw the change at some 20 to 30 documents; the shortest and the longest "
        "lists that were run decide.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Judged:
    """Verdict of a contrast on one task; `difference` is None if runs are missing."""

    cell: Cell
    contrast: Contrast
    difference: Interval | None
    seeds: int
    verdict: str


def judge(claim: Claim, cells: Sequence[Cell]) -> list[Judged]:
    """Judges every contrast of a claim on every task that the claim is about."""
    rule = "equal" if claim.rule == "equal" else "beats"
    judged = []
    for cell in cells:
        if cell.study.name != claim.study or not cell.runs:
            continue
        if cell.example["kind"] not in claim.kinds:
            continue
        for contrast in claim.contrasts:
            measured = cell.contrast(contrast.above, contrast.below)
            if measured is None:
                judged.append(Judged(cell, contrast, None, 0, UNKNOWN))
                continue
            difference, seeds = measured
            gain = negated(difference) if cell.lowest else difference
            verdict = by_interval(rule, gain)
            judged.append(Judged(cell, contrast, difference, seeds, verdict))
    return judged


def by_interval(rule: str, difference: Interval) -> str:
    """Returns the verdict of one interval.

    "beats" depends on the side of zero; "equal" fails if the interval excludes zero, and holds if
    it lies within the margin.
    """
    if rule == "equal":
        if difference.low > 0 or difference.high < 0:
            return FAILS
        return HOLDS if difference.low > -MARGIN and difference.high < MARGIN else UNKNOWN
    if difference.low > 0:
        return HOLDS
    return FAILS if difference.high < 0 else UNKNOWN


def overall(claim: Claim, judged: Sequence[Judged]) -> str:
    """Returns the claim's verdict; lists tasks by verdict unless all were run and agree."""
    cells = {id(item.cell): item.cell for item in judged if item.difference is not None}
    by_task: dict[str, str] = {}
    for cell in cells.values():
        name = cell.task if cell.scale == "mini" else f"{cell.task} at {cell.scale}"
        deciding = [item for item in judged if item.cell is cell and not item.contrast.note]
        by_task[name] = _on_one_task(claim, deciding)
    verdicts = set(by_task.values())
    if not verdicts:
        return f"{UNKNOWN}: not run"
    if len(verdicts) == 1 and len(by_task) == len({id(item.cell) for item in judged}):
        return verdicts.pop()
    return "; ".join(
        f"{verdict} on {', '.join(task for task in by_task if by_task[task] == verdict)}"
        for verdict in (HOLDS, FAILS, UNKNOWN)
        if verdict in verdicts
    )


def _on_one_task(claim: Claim, judged: Sequence[Judged]) -> str:
    measured = [item for item in judged if item.difference is not None]
    if not measured:
        return UNKNOWN
    if claim.rule != "longer":
        verdicts = {item.verdict for item in judged}
        return verdicts.pop() if len(verdicts) == 1 else UNKNOWN
    if len(measured) < 2:
        return UNKNOWN
    short = measured[0].verdict
    long = measured[-1].verdict
    if long == FAILS or short == HOLDS:
        return FAILS
    return HOLDS if long == HOLDS else UNKNOWN
