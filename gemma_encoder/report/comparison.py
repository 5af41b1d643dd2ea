"""The section about metrics, with bootstrap intervals; runs are compared with the first one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.evaluation import bootstrap
from gemma_encoder.report.markup import html_table
from gemma_encoder.report.runs import RunFiles
from gemma_encoder.report.scoring import Scored
from gemma_encoder.weights.card import COUNTS

NONE = "—"  # stands for an interval that predictions on disk do not give
NOTE = (
    "Intervals: percentile bootstrap, 1,000 resamples of units, which are examples, or questions, "
    "pairs or queries where metrics are over these. They say how much the test set's choice "
    "matters, not how much the seed does. Differences are paired: both runs on the same resamples."
)
NO_PREDICTIONS = " Predictions that go with the values were not found: run gemma-encoder evaluate."


@dataclasses.dataclass(frozen=True, eq=False)
class _Estimate:
    """A metric of one run on one split, and its values on bootstrap resamples of the units."""

    units: list[str]
    value: float
    resampled: np.ndarray

    @classmethod
    def of(cls, scored: Scored, metric: str) -> "_Estimate":
        statistic, count = scored.metrics[metric], len(scored.units)
        return cls(scored.units, statistic(np.arange(count)), bootstrap.resampled(statistic, count))

    def interval(self) -> str:
        interval = bootstrap.percentile_interval(self.value, self.resampled)
        return f"{interval.low:.3f} to {interval.high:.3f}"

    def difference_to(self, base: "_Estimate | None") -> str:
        """The paired difference; none where the base has other units or is missing."""
        if base is None or base.units != self.units:
            return NONE
        change = bootstrap.percentile_interval(
            self.value - base.value, self.resampled - base.resampled
        )
        return f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"


def metrics_section(runs: Sequence[RunFiles], scored: Mapping[str, Sequence[Scored]]) -> str:
    """A row for each metric and run: value, interval, and difference to the first run."""
    compared = len(runs) > 1
    rows = [
        row
        for key in dict.fromkeys(
            (task, split, metric)
            for run in runs
            for (task, split), line in run.latest().items()
            for metric in line
            if metric not in COUNTS
        )
        for row in _rows(key, runs, scored, compared)
    ]
    if not rows:
        return '<p class="muted">Nothing was evaluated yet.</p>'
    difference = [f"difference to {runs[0].name}"] if compared else []
    head = ["task", "split", "metric", "run", "value", "95 % interval", *difference, "units"]
    missing = NO_PREDICTIONS if all(row[5] == NONE for row in rows) else ""
    return html_table(head, rows) + f'<p class="muted">{NOTE}{missing}</p>'


def _rows(
    key: tuple[str, str, str],
    runs: Sequence[RunFiles],
    scored: Mapping[str, Sequence[Scored]],
    compared: bool,
) -> list[list[Any]]:
    """The rows of one metric of one task and split, one for each run that has it."""
    task, split, metric = key
    rows, base = [], None
    for run in runs:
        line = run.latest().get((task, split), {})
        if metric not in line:
            continue
        item = _item(scored[run.name], task, split, metric)
        interval, difference, units = NONE, NONE, line.get("examples", "")
        if item is not None:
            estimate, units = _Estimate.of(item, metric), len(item.units)
            interval = estimate.interval()
            if run is runs[0]:
                base = estimate
            else:
                difference = estimate.difference_to(base)
        value = f"{line[metric]:.3f}"
        differences = [difference] if compared else []
        rows.append([task, split, metric, run.name, value, interval, *differences, units])
    return rows


def _item(scored: Sequence[Scored], task: str, split: str, metric: str) -> Scored | None:
    """The predictions from which a metric of a split can be measured again."""
    by_split = {(item.task, item.split): item for item in scored}
    return next(
        (
            item
            for (name, whole), item in by_split.items()
            if name == task and metric in item.metrics and whole.startswith(split)
        ),
        None,
    )
