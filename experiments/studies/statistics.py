"""Statistics of a study's runs: means and differences with bootstrap intervals.

Seeds and examples are resampled jointly: each of 1,000 resamples weights the examples and draws the
seeds, with replacement, alike for both sides of a difference. Three seeds have only ten different
draws, so their contribution to an interval is coarse.

Shapes: n units, R resamples, S seeds.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.evaluation import bootstrap, resampled_metrics
from gemma_encoder.evaluation.bootstrap import Interval
from gemma_encoder.evaluation.metrics import lowest_is_best
from gemma_encoder.evaluation.ranking_baselines import expected_reciprocal_rank
from gemma_encoder.experiments.studies.results import Results, RunKey
from gemma_encoder.experiments.studies.study import Study
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError

# Verdicts.
BETTER = "better"
WORSE = "worse"
UNKNOWN = "cannot be told"

ROUNDING = 1e-6  # result files have six digits


def verdict(difference: Interval, lowest: bool = False) -> str:
    """Returns the verdict of a difference: better or worse only if its interval excludes zero.

    Args:
        difference: a difference of a metric.
        lowest: lower values of the metric are better.
    """
    gain = negated(difference) if lowest else difference
    if gain.low > ROUNDING:
        return BETTER
    return WORSE if gain.high < -ROUNDING else UNKNOWN


def negated(interval: Interval) -> Interval:
    """Returns the interval of the negated value."""
    return Interval(-interval.value, -interval.high, -interval.low)


@dataclasses.dataclass
class Cell:
    """Runs of a study on one task at one scale.

    Attributes:
        study: the study.
        task, scale: names.
        runs: results by row and seed.
        failed: reasons of failures by row and seed.
        resampler: computes the resampled values of a run.
    """

    study: Study
    task: str
    scale: str
    runs: Mapping[str, Mapping[int, Mapping[str, Any]]]
    failed: Mapping[str, Mapping[int, str]]
    resampler: "Resampler"

    def __post_init__(self):
        first: tuple[Any, Mapping[str, Any]] | None = None
        for row, seeds in self.runs.items():
            for seed, result in seeds.items():
                outcome = result["outcomes"][result["main_metric"]]
                examples = (outcome.get("labels"), outcome.get("queries"), result["kind"])
                if first is not None and first != examples:
                    raise InputError(
                        f"study {self.study.name!r}, {self.task}: row {row!r}, seed {seed}, was "
                        "evaluated on other examples than the first run"
                    )
                first = examples

    @property
    def example(self) -> Mapping[str, Any]:
        """Any of the results."""
        return next(iter(next(iter(self.runs.values())).values()))

    @property
    def metric(self) -> str:
        """Name of the main metric."""
        return self.example["main_metric"]

    @property
    def units(self) -> int:
        """Number of units that are resampled: examples, questions, pairs or queries."""
        return len(self.resampler.weights(self.example["outcomes"][self.metric])[0])

    @property
    def _bounds(self) -> bootstrap.Bounds | None:
        """Worst and best value of the main metric."""
        outcome = self.example["outcomes"][self.metric]
        return bootstrap.bounds(self.metric if "values" in outcome else weighted_name(self.metric))

    @property
    def lowest(self) -> bool:
        """True if lower values of the main metric are better."""
        return lowest_is_best(self.metric)

    def values(self, row: str, metric: str = "") -> np.ndarray:
        """Returns a metric of each seed, [S]; by default the main metric."""
        name = metric or self.metric
        return np.array([result["metrics"][name] for result in self.runs.get(row, {}).values()])

    def estimate(self, row: str) -> Interval:
        """Returns the mean over a row's seeds, with its interval."""
        seeds = sorted(self.runs[row])
        return bootstrap.interval(
            self.values(row).mean(), self._arm(row, seeds), self.units, self._bounds
        )

    def contrast(self, above: Sequence[str], below: Sequence[str]) -> tuple[Interval, int] | None:
        """Returns the mean of rows `above` minus that of rows `below`, and the number of seeds.

        Uses the seeds that all rows have. None if a row or a common seed is missing.
        """
        rows = (*above, *below)
        if any(row not in self.runs for row in rows):
            return None
        seeds = sorted(set.intersection(*(set(self.runs[row]) for row in rows)))
        if not seeds:
            return None
        difference = self._mean(above, seeds) - self._mean(below, seeds)
        resampled = self._resampled_mean(above, seeds) - self._resampled_mean(below, seeds)
        limits = bootstrap.bounds_of_difference(self._bounds)
        return bootstrap.interval(difference, resampled, self.units, limits), len(seeds)

    def _mean(self, rows: Sequence[str], seeds: Sequence[int]) -> float:
        metrics = [self.runs[row][seed]["metrics"] for row in rows for seed in seeds]
        return np.mean([values[self.metric] for values in metrics])

    def _resampled_mean(self, rows: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        return np.mean([self._arm(row, seeds) for row in rows], axis=0)

    def _arm(self, row: str, seeds: Sequence[int]) -> np.ndarray:
        """Returns the metric on the drawn examples, averaged over the drawn seeds, [R]."""
        values = np.stack([self.resampler.values(self.runs[row][seed]) for seed in seeds])
        return np.take_along_axis(values, seed_draws(len(seeds)), axis=0).mean(axis=0)

    def chance(self) -> float | None:
        """Returns the main metric of chance, see `chance`; None if unknown."""
        return chance(self.example)


def seed_draws(count: int) -> np.ndarray:
    """Draws S = `count` of the S seeds for each resample, [S, R]; the same for all rows."""
    return np.random.default_rng(1).integers(0, count, (count, bootstrap.RESAMPLES))


class Resampler:
    """Computes the main metric of runs in every resample, with caches shared by runs."""

    def __init__(self):
        self._weights: dict[int, np.ndarray] = {}
        self._values: dict[tuple[str, int], np.ndarray] = {}

    def weights(self, outcome: Mapping[str, Any]) -> np.ndarray:
        """Returns the weight of each unit of an outcome in every resample, [R, n]."""
        if "values" in outcome:
            units = len(next(iter(outcome["values"].values())))
        else:
            units = max(outcome["groups"]) + 1 if "groups" in outcome else len(outcome["labels"])
        if units not in self._weights:
            self._weights[units] = bootstrap.weights(units)
        return self._weights[units]

    def values(self, result: Mapping[str, Any]) -> np.ndarray:
        """Returns the main metric in every resample, [R]."""
        key = (result["digest"], id(result["outcomes"]))
        if key not in self._values:
            self._values[key] = self._resampled(result)
        return self._values[key]

    def _resampled(self, result: Mapping[str, Any]) -> np.ndarray:
        main = result["main_metric"]
        outcome = result["outcomes"][main]
        weights = self.weights(outcome)
        if "values" in outcome:
            return resampled_metrics.mean(weights, np.array(outcome["values"][main]))
        labels = np.array(outcome["labels"])
        predictions = np.array(outcome["predictions"])
        if "groups" in outcome:
            weights = weights[:, np.array(outcome["groups"])]
        return resampled_metrics.METRICS[weighted_name(main)](weights, labels, predictions)


def weighted_name(metric: str) -> str:
    """Strips the part of the split from a metric's name: "accuracy_matched" is "accuracy"."""
    matching = [
        name
        for name in resampled_metrics.METRICS
        if metric == name or metric.startswith(f"{name}_")
    ]
    if not matching:
        raise InputError(
            f"the metric {metric!r} has no bootstrap; add it to evaluation.resampled_metrics"
        )
    return max(matching, key=len)


def chance(result: Mapping[str, Any]) -> float | None:
    """Returns the main metric of a model that ignores the texts.

    Classification: the best constant prediction. Regression: the mean label, whose correlation is
    0. Ranking (MRR@10): the first stage's candidates in random order. Choice (accuracy): a random
    option. None for other metrics of ranking and choice.
    """
    main = result["main_metric"]
    outcome = result["outcomes"][main]
    kind = kinds.get(result["kind"])
    if kind.ranks:
        if main != "mrr@10":
            return None
        ranks = [
            expected_reciprocal_rank(len(grades), sum(grade > 0 for grade in grades))
            for grades in outcome["grades"]
        ]
        return float(np.mean(ranks))
    if kind.is_list:
        return float(np.mean(1 / np.array(outcome["options"]))) if main == "accuracy" else None
    labels = np.array(outcome["labels"])
    once = np.ones((1, len(labels)), np.float32)
    metric = resampled_metrics.METRICS[weighted_name(main)]
    constants = [labels.mean()] if kind.has_range else np.unique(labels)
    values = [
        float(metric(once, labels, np.full(len(labels), constant))[0]) for constant in constants
    ]
    return min(values) if lowest_is_best(main) else max(values)


def cells(results: Results, studies: Mapping[str, Study]) -> list[Cell]:
    """Groups runs and failures by study, scale and task, in the order of the studies."""
    resampler = Resampler()
    result = []
    for study in studies.values():
        keys = [key for key in (*results.done, *results.failed) if key.study == study.name]
        for scale in sorted({key.scale for key in keys}):
            for task in study.tasks:
                matching = [key for key in keys if key.task == task and key.scale == scale]
                if not matching:
                    continue
                runs = _by_row(matching, results.done)
                failed = _by_row(matching, results.failed)
                result.append(Cell(study, task, scale, runs, failed, resampler))
    return result


def _by_row(keys: Sequence[RunKey], content: Mapping[RunKey, Any]) -> dict[str, dict[int, Any]]:
    rows: dict[str, dict[int, Any]] = {}
    for key in sorted((key for key in keys if key in content), key=lambda key: key.seed):
        rows.setdefault(key.row, {})[key.seed] = content[key]
    return rows
