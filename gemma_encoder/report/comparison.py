"""Metrics section: values with bootstrap intervals, and paired differences to the first run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.evaluation import bootstrap
from gemma_encoder.evaluation.details import format_bounds, format_metric
from gemma_encoder.evaluation.metrics import lowest_is_best
from gemma_encoder.evaluation.units import paired_difference
from gemma_encoder.report.markup import html_table
from gemma_encoder.report.runs import RunFiles
from gemma_encoder.report.scoring import Scored
from gemma_encoder.weights.card import CHANCE_NOTE, COUNTS, FIRST_STAGE, chance_values

NONE = "—"  # shown if the predictions on disk do not allow an interval
_INTERVAL_COLUMN = 5
NOTE = (
    f"Intervals: Bayesian bootstrap with {bootstrap.RESAMPLES:,} resamples of units, fewer if "
    "there are many. Units are examples, or the questions, pairs or queries that a metric groups "
    f"them by. A prior mass of {bootstrap.PRIOR} units at the metric's worst and best value, less "
    "where values lie close together, keeps an interval from collapsing where all units agree; for "
    f"accuracy it is the interval of Beta(k + {bootstrap.PRIOR}, n − k + {bootstrap.PRIOR}). "
    "Metrics without a worst or best value, such as perplexity, have a plain percentile interval; "
    "the calibration error has none, since resampling raises it: see its noise floor. Intervals "
    "reflect the sampling of the test set, not the variance between seeds. Differences are paired: "
    "both runs use the same resamples. A difference of zero still has an interval: on other "
    "examples of the same kind the runs may differ by so much."
)
NO_PREDICTIONS = " No predictions match these values; run gemma-encoder evaluate to write them."


@dataclasses.dataclass(frozen=True, eq=False)
class _Estimate:
    """A metric of one run on one split, and its values on bootstrap resamples of the units."""

    scored: Scored
    metric: str
    value: float
    resampled: np.ndarray

    @classmethod
    def of(cls, scored: Scored, metric: str) -> "_Estimate":
        value = scored.metrics[metric](np.arange(len(scored.units)))
        return cls(scored, metric, value, scored.resampled(metric))

    def interval(self) -> str:
        interval = self.scored.interval_of(self.metric, self.value, self.resampled)
        return format_bounds(self.metric, interval[1:]) if interval.exists else NONE

    def difference_to(self, base: "_Estimate | None") -> str:
        """Returns the paired difference; NONE if the base is missing or has other units."""
        if base is None or base.scored.units != self.scored.units:
            return NONE
        values = (self.value, base.value)
        resampled = (self.resampled, base.resampled)
        change = paired_difference(self.scored, self.metric, values, resampled)
        value, low, high = (format_metric(self.metric, item, "+") for item in change)
        return f"{value} ({low} to {high})" if change.exists else value


def metrics_section(runs: Sequence[RunFiles], scored: Mapping[str, Sequence[Scored]]) -> str:
    """Returns a table with a row per metric and run: value, interval, difference to the first run.

    Args:
        runs: the runs of the report.
        scored: the predictions of each run that metrics can be recomputed from, by run name.
    """
    compared = len(runs) > 1
    rows = [row for key in _metric_keys(runs) for row in _rows(key, runs, scored, compared)]
    if not rows:
        return '<p class="muted">Nothing was evaluated yet.</p>'
    difference = [f"difference to {runs[0].name}"] if compared else []
    head = ["task", "split", "metric", "run", "value", "95 % interval"]
    head += ["chance", FIRST_STAGE, *difference, "units"]
    column = head.index(FIRST_STAGE)
    if all(row[column] == NONE for row in rows):  # no task has a first stage
        head, *rows = [[*row[:column], *row[column + 1 :]] for row in (head, *rows)]
    has_intervals = any(row[_INTERVAL_COLUMN] != NONE for row in rows)
    note = f"{NOTE} {CHANCE_NOTE} ↓: lower is better."
    if not has_intervals:
        note += NO_PREDICTIONS
    return html_table(head, rows) + f'<p class="muted">{note}</p>'


def _metric_keys(runs: Sequence[RunFiles]) -> list[tuple[str, str, str]]:
    """Returns each (task, split, metric) of any run once, in the order of the logs."""
    keys = [
        (task, split, metric)
        for run in runs
        for (task, split), line in run.latest().items()
        for metric in line
        if metric not in COUNTS
    ]
    return list(dict.fromkeys(keys))


def _rows(
    key: tuple[str, str, str],
    runs: Sequence[RunFiles],
    scored: Mapping[str, Sequence[Scored]],
    compared: bool,
) -> list[list[Any]]:
    """Returns the rows of one metric, one for each run that logged it."""
    task, split, metric = key
    label = f"{metric} ↓" if lowest_is_best(metric) else metric
    rows = []
    base = None
    for run in runs:
        line = run.latest().get((task, split), {})
        if metric not in line:
            continue
        item = _matching_predictions(scored[run.name], task, split, metric)
        interval = NONE
        difference = NONE
        units = line.get("examples", "")
        if item is not None:
            estimate = _Estimate.of(item, metric)
            units = len(item.units)
            interval = estimate.interval()
            if run is runs[0]:
                base = estimate
            else:
                difference = estimate.difference_to(base)
        value = format_metric(metric, line[metric])
        differences = [difference] if compared else []
        others = [
            format_metric(metric, values[metric]) if metric in values else NONE
            for field in ("chance", "first_stage")
            for values in [chance_values(run.details(task, split), split, field)]
        ]
        rows.append([task, split, label, run.name, value, interval, *others, *differences, units])
    return rows


def _matching_predictions(
    scored: Sequence[Scored], task: str, split: str, metric: str
) -> Scored | None:
    """Returns the predictions from which a metric of a split can be recomputed."""
    # By task and split: a later entry replaces an earlier one.
    by_split = {(item.task, item.split): item for item in scored}
    for (name, full_split), item in by_split.items():
        if name == task and metric in item.metrics and full_split.startswith(split):
            return item
    return None
