"""What the results of a study's runs say: values, differences and how sure they are. Seeds and examples are resampled jointly.

In each of 1,000 resamples the same examples and the same seeds are drawn, with replacement, for both sides of a difference. With three
seeds the part that seeds have in an interval is coarse: there are only ten different draws of them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.evaluation import bootstrap, resampled_metrics
from gemma_encoder.evaluation.bootstrap import Interval
from gemma_encoder.experiments.studies.results import Results, RunKey
from gemma_encoder.experiments.studies.study import Study
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError

BETTER, WORSE, UNKNOWN = "better", "worse", "cannot be told"
ROUNDING = 1e-6  # result files keep six digits


def verdict(difference: Interval) -> str:
    """What an interval of a difference allows to say: better or worse only where it leaves out zero."""
    return (
        BETTER if difference.low > ROUNDING else WORSE if difference.high < -ROUNDING else UNKNOWN
    )


@dataclasses.dataclass
class Cell:
    """The runs of a study on one task at one scale.

    Attributes:
        study: the study.
        task, scale: by name.
        runs: result by seed, of each row that has one.
        failed: reason by seed, of each row that has one.
        resampler: gives the resampled values of a run.
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
                seen = (outcome.get("labels"), outcome.get("queries"), result["kind"])
                if first is not None and first != seen:
                    raise InputError(
                        f"study {self.study.name!r}, {self.task}: row {row!r}, seed {seed}, was evaluated on other examples than the first run"
                    )
                first = seen

    @property
    def example(self) -> Mapping[str, Any]:
        """Any of the results."""
        return next(iter(next(iter(self.runs.values())).values()))

    @property
    def metric(self) -> str:
        """The main metric."""
        return self.example["main_metric"]

    def values(self, row: str, metric: str = "") -> np.ndarray:
        """A metric of each seed, [S]; by default the main one."""
        return np.array(
            [result["metrics"][metric or self.metric] for result in self.runs.get(row, {}).values()]
        )

    def estimate(self, row: str) -> Interval:
        """The mean over the seeds of a row, with its interval."""
        seeds = sorted(self.runs[row])
        return bootstrap.percentile_interval(self.values(row).mean(), self._arm(row, seeds))

    def contrast(self, above: Sequence[str], below: Sequence[str]) -> tuple[Interval, int] | None:
        """The mean of some rows minus that of others, with its interval, over the seeds that all have; and how many those are.

        None where a row or a common seed is missing.
        """
        if any(row not in self.runs for row in (*above, *below)):
            return None
        seeds = sorted(set.intersection(*(set(self.runs[row]) for row in (*above, *below))))
        if not seeds:
            return None
        sides = [
            np.mean([self._arm(row, seeds) for row in rows], axis=0) for rows in (above, below)
        ]
        means = [
            np.mean(
                [self.runs[row][seed]["metrics"][self.metric] for row in rows for seed in seeds]
            )
            for rows in (above, below)
        ]
        return bootstrap.percentile_interval(means[0] - means[1], sides[0] - sides[1]), len(seeds)

    def _arm(self, row: str, seeds: Sequence[int]) -> np.ndarray:
        """The mean over the seeds drawn of the metric on the examples drawn, in every resample, [R]."""
        values = np.stack([self.resampler.values(self.runs[row][seed]) for seed in seeds])
        return np.take_along_axis(values, seed_draws(len(seeds)), axis=0).mean(axis=0)

    def chance(self) -> float | None:
        """The main metric of whoever knows nothing of the texts; None where that is not known. See `chance`."""
        return chance(self.example)


def seed_draws(count: int) -> np.ndarray:
    """Which of S seeds each resample draws, [S, R]; the same for all rows."""
    return np.random.default_rng(1).integers(0, count, (count, bootstrap.RESAMPLES))


class Resampler:
    """The main metric of runs in every resample of their examples; what is the same for many is made once."""

    def __init__(self):
        self._counts: dict[int, np.ndarray] = {}
        self._values: dict[tuple[str, int], np.ndarray] = {}

    def counts(self, units: int) -> np.ndarray:
        """How often each of n units is drawn in every resample, [R, n]."""
        if units not in self._counts:
            self._counts[units] = bootstrap.counts(units)
        return self._counts[units]

    def values(self, result: Mapping[str, Any]) -> np.ndarray:
        """The main metric in every resample, [R]."""
        key = (result["digest"], id(result["outcomes"]))
        if key not in self._values:
            self._values[key] = self._resampled(result)
        return self._values[key]

    def _resampled(self, result: Mapping[str, Any]) -> np.ndarray:
        main = result["main_metric"]
        outcome = result["outcomes"][main]
        if "values" in outcome:
            values = np.array(outcome["values"][main])
            return resampled_metrics.mean(self.counts(len(values)), values)
        labels, predictions = np.array(outcome["labels"]), np.array(outcome["predictions"])
        groups = np.array(outcome.get("groups", np.arange(len(labels))))
        counts = self.counts(int(groups.max()) + 1)[:, groups]
        return resampled_metrics.METRICS[weighted_name(main)](counts, labels, predictions)


def weighted_name(metric: str) -> str:
    """The metric's own name, without the part of the split: "accuracy_matched" is "accuracy"."""
    found = [
        name
        for name in resampled_metrics.METRICS
        if metric == name or metric.startswith(f"{name}_")
    ]
    if not found:
        raise InputError(f"no bootstrap is known for the metric {metric!r}")
    return max(found, key=len)


def chance(result: Mapping[str, Any]) -> float | None:
    """The main metric of whoever knows nothing of the texts.

    Classification: the best answer that is always the same. Regression: 0, no correlation. Ranking: the first stage's candidates in
    random order. Choice: an option at random, for accuracy; None for other metrics.
    """
    main = result["main_metric"]
    outcome = result["outcomes"][main]
    kind = kinds.get(result["kind"])
    if kind.has_range:
        return 0.0
    if kind.ranks:
        return (
            float(np.mean([random_reciprocal_rank(grades) for grades in outcome["grades"]]))
            if main == "mrr@10"
            else None
        )
    if kind.is_list:
        return float(np.mean(1 / np.array(outcome["options"]))) if main == "accuracy" else None
    labels = np.array(outcome["labels"])
    once = np.ones((1, len(labels)), np.float32)
    return max(
        float(
            resampled_metrics.METRICS[weighted_name(main)](
                once, labels, np.full_like(labels, answer)
            )[0]
        )
        for answer in np.unique(labels)
    )


def random_reciprocal_rank(grades: Sequence[int], cutoff: int = 10) -> float:
    """The expected reciprocal rank, cut off, of candidates in random order: Σ_k 1/k · P(the first relevant one comes at k)."""
    total, relevant = len(grades), sum(grade > 0 for grade in grades)
    if not relevant:
        return 0.0
    ways = math.comb(total, relevant)
    return sum(
        math.comb(total - k, relevant - 1) / ways / k for k in range(1, min(cutoff, total) + 1)
    )


def cells(results: Results, studies: Mapping[str, Study]) -> list[Cell]:
    """A cell for each study, scale and task of which there is a result or a failure, in the studies' order."""
    resampler, found = Resampler(), []
    for study in studies.values():
        mine = [place for place in (*results.done, *results.failed) if place.study == study.name]
        for scale in sorted({place.scale for place in mine}):
            for task in (
                task
                for task in study.tasks
                if any(place.task == task and place.scale == scale for place in mine)
            ):
                here = [place for place in mine if place.task == task and place.scale == scale]
                found.append(
                    Cell(
                        study,
                        task,
                        scale,
                        _by_row(here, results.done),
                        _by_row(here, results.failed),
                        resampler,
                    )
                )
    return found


def _by_row(places: Sequence[RunKey], content: Mapping[RunKey, Any]) -> dict[str, dict[int, Any]]:
    rows: dict[str, dict[int, Any]] = {}
    for place in sorted(
        (place for place in places if place in content), key=lambda place: place.seed
    ):
        rows.setdefault(place.row, {})[place.seed] = content[place]
    return rows
