"""Calibration: temperature scaling, calibration error, risk and coverage, conformal prediction.

Pure functions. Kinds define the events whose probabilities should agree with their frequencies: for
one class per text that the decision is right, with several labels that a text has a class; see
`inputs.uncertainty`.

Shapes: N examples, C classes, K outputs of a head, M events.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import Label
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.uncertainty import LEVELS, Calibration, ClassUncertainty

BINS = 15  # as in Guo et al., 2017
DRAWS = 1000  # simulated outcomes for the noise floor
MAX_DRAWN = 20_000_000  # simulated events at most, with fewer draws for more events
TEMPERATURES = (0.02, 50.0)  # searched range; an optimum at an end is none


class Bin(NamedTuple):
    """Events with probabilities in an interval.

    Attributes:
        low, high: ends of the interval.
        count: number of events.
        probability: mean probability.
        frequency: share of events that happened.
        expected: the central 95 % of `frequency` if the probabilities are right.
    """

    low: float
    high: float
    count: int
    probability: float
    frequency: float
    expected: tuple[float, float]


class NoiseFloor(NamedTuple):
    """Calibration errors of perfectly calibrated outcomes at the same probabilities.

    Attributes:
        mean: the expected calibration error that remains at this number of events.
        high: its 95th percentile; a larger error is significant at 5 %.
    """

    mean: float
    high: float


def fit_temperature(task: Task, scores: np.ndarray, labels: Sequence[Label]) -> float | None:
    """Fits the temperature that minimizes the negative log-likelihood of the labels.

    Guo et al., 2017, arXiv 1706.04599. The likelihood is that of the task's kind: softmax
    (classification), cumulative logits (ordinal), or a product over classes (multi-label), where
    one temperature serves all classes. It is log-concave in 1/T, so there is one optimum.

    Args:
        task: a task whose kind has a temperature; its own temperature is ignored.
        scores: [N, K] outputs of the head.
        labels: the N labels.

    Returns:
        The temperature; None if the likelihood has no maximum, which means that every decision is
        right (T to 0) or that the scores are uninformative (T to infinity).
    """
    import scipy.optimize

    scores = np.asarray(scores, np.float64)

    def loss(log_temperature: float) -> float:
        calibration = Calibration(math.exp(log_temperature))
        at_temperature = dataclasses.replace(task, calibration=calibration)
        outputs = task.kind.postprocess(at_temperature, scores)
        return -float(task.kind.log_likelihood(at_temperature, outputs, labels).mean())

    low, high = map(math.log, TEMPERATURES)
    result = scipy.optimize.minimize_scalar(
        loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}
    )
    margin = 0.01 * (high - low)
    if not low + margin < result.x < high - margin:
        return None
    return math.exp(result.x)


def conformal_threshold(scores: np.ndarray, level: float) -> float | None:
    """Returns the ceil((n + 1) level)-th smallest of n scores; None if n is too small.

    A further score, exchangeable with these, is at most the threshold with a probability of at
    least `level`, and at most level + 1 / (n + 1) without ties: split conformal prediction, Vovk et
    al., 2005; Lei et al., 2018, arXiv 1604.04173, theorem 2.2.
    """
    rank = math.ceil(round((len(scores) + 1) * level, 9))
    if rank > len(scores):
        return None
    return float(np.partition(scores, rank - 1)[rank - 1])


def calibrate(
    task: Task, split: str, scores: np.ndarray, labels: Sequence[Label], step: int
) -> Calibration:
    """Fits all that the task's kind supports: a temperature, then conformal thresholds.

    The thresholds are those of the outputs at that temperature, on the same examples: with one
    parameter fitted, the loss of coverage is below the thresholds' own spread.

    Args:
        task: a task with probabilities or a regression.
        split: name of the split, stored with the result.
        scores: [N, K] outputs of the head.
        labels: the N labels.
        step: training step of the parameters, stored with the result.
    """
    temperature = 1.0
    if task.kind.has_temperature:
        temperature = fit_temperature(task, scores, labels) or 1.0
    fitted = dataclasses.replace(task, calibration=Calibration(temperature))
    outputs = task.kind.postprocess(fitted, np.asarray(scores, np.float32))
    nonconformity = task.kind.nonconformity(fitted, outputs, labels)
    if nonconformity is None:
        raise InputError(f"task {task.name!r} of kind {task.kind} has nothing to calibrate")
    thresholds = tuple(conformal_threshold(nonconformity, level) for level in LEVELS)
    return Calibration(temperature, thresholds, split, len(labels), step)


def can_calibrate(task: Task) -> bool:
    """Returns True for tasks with probabilities of classes and for regressions."""
    return bool(task.kind.conformal_columns)


def reliability(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Groups events by probability into bins of equal width; empty bins are left out.

    Args:
        probabilities: [M], in [0, 1].
        outcomes: [M], True for events that happened.
        bins: number of bins.
    """
    index, counts = _binned(probabilities, bins)
    frequencies = _sums(index, np.asarray(outcomes, np.float64), bins) / np.maximum(counts, 1)
    means = _sums(index, np.asarray(probabilities, np.float64), bins) / np.maximum(counts, 1)
    drawn = _simulated_sums(probabilities, index, bins) / np.maximum(counts, 1)
    lows, highs = np.quantile(drawn, (0.025, 0.975), axis=0)
    return [
        Bin(
            i / bins,
            (i + 1) / bins,
            int(counts[i]),
            float(means[i]),
            float(frequencies[i]),
            (float(lows[i]), float(highs[i])),
        )
        for i in np.flatnonzero(counts)
    ]


def expected_calibration_error(
    probabilities: np.ndarray, outcomes: np.ndarray, bins: int = BINS
) -> float:
    """Returns the mean distance of frequency and probability, over bins weighted by their events.

    Naeini et al., 2015; bins of equal width, as in Guo et al., 2017. It is biased upwards: see
    `noise_floor`.
    """
    index, _ = _binned(probabilities, bins)
    gaps = _sums(index, np.asarray(outcomes, np.float64) - probabilities, bins)
    return float(np.abs(gaps).sum() / len(index))


def task_calibration_error(task: Task, outputs: np.ndarray, labels: Sequence[Label]) -> float:
    """Returns the expected calibration error of the kind's events."""
    return expected_calibration_error(*task.kind.events(task, outputs, labels))


def noise_floor(probabilities: np.ndarray, bins: int = BINS) -> NoiseFloor:
    """Simulates the expected calibration error of outcomes drawn with these probabilities."""
    index, _ = _binned(probabilities, bins)
    expected = _sums(index, np.asarray(probabilities, np.float64), bins)
    drawn = _simulated_sums(probabilities, index, bins)
    errors = np.abs(drawn - expected).sum(axis=1) / len(index)
    return NoiseFloor(float(errors.mean()), float(np.quantile(errors, 0.95)))


def _binned(probabilities: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bin of each event and the number of events in each bin."""
    index = np.minimum((np.asarray(probabilities) * bins).astype(int), bins - 1)
    return index, np.bincount(index, minlength=bins)


def _sums(index: np.ndarray, values: np.ndarray, bins: int) -> np.ndarray:
    return np.bincount(index, values, minlength=bins)


def _simulated_sums(probabilities: np.ndarray, index: np.ndarray, bins: int) -> np.ndarray:
    """Returns the events that happen in each bin, [draws, bins], if the probabilities are right.

    The seed is fixed: the same probabilities have the same floor.
    """
    generator = np.random.default_rng(0)
    probabilities = np.asarray(probabilities, np.float64)
    draws = int(np.clip(MAX_DRAWN // max(len(index), 1), 50, DRAWS))
    return np.stack(
        [
            np.bincount(index[generator.random(len(index)) < probabilities], minlength=bins)
            for _ in range(draws)
        ]
    )


def brier_score(task: Task, outputs: np.ndarray, labels: Sequence[Label]) -> float:
    """Returns the mean squared error of probabilities (Brier, 1950), lower is better.

    With two classes it is that of the second class's probability, from 0 to 1; with more, the sum
    over classes, from 0 to 2: both as scikit-learn's `brier_score_loss`. With several labels, the
    mean over classes.
    """
    squares = (np.asarray(outputs, np.float64) - task.kind.truth(task, labels)) ** 2
    if task.kind.one_class and len(task.classes) > 2:
        return float(squares.sum(axis=-1).mean())
    return float(squares.mean())


def log_loss(task: Task, outputs: np.ndarray, labels: Sequence[Label]) -> float:
    """Returns the mean negative log-likelihood of the labels in nats; of several, per text."""
    return -float(task.kind.log_likelihood(task, outputs, labels).mean())


def risk_coverage(confidences: np.ndarray, is_right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (coverage, risk) of answering only the most confident texts, each [N].

    El-Yaniv and Wiener, 2010. Equal confidences are answered in random order: the risk is the
    expected one.

    Args:
        confidences: [N].
        is_right: [N], True for right decisions.
    """
    errors = ~np.asarray(is_right, bool)
    _, group = np.unique(-np.asarray(confidences), return_inverse=True)
    means = np.bincount(group, errors) / np.bincount(group)
    order = np.argsort(group, kind="stable")
    count = np.arange(1, len(errors) + 1)
    return count / len(errors), np.cumsum(means[group[order]]) / count


def area_under_risk(confidences: np.ndarray, is_right: np.ndarray) -> float:
    """Returns the mean risk over all coverages (AURC, Geifman and El-Yaniv, 2017)."""
    return float(risk_coverage(confidences, is_right)[1].mean())


class Quality(NamedTuple):
    """Measures of the probabilities of a split; field names are those of a report."""

    examples: int
    calibration_error: float
    floor: NoiseFloor
    brier: float
    log_loss: float
    area_under_risk: float


def quality(task: Task, outputs: np.ndarray, labels: Sequence[Label]) -> Quality:
    """Measures probabilities [N, C] of a task with classes against labels."""
    events = task.kind.events(task, outputs, labels)
    confidences = task.kind.confidence(task, outputs)
    return Quality(
        len(labels),
        expected_calibration_error(*events),
        noise_floor(events[0]),
        brier_score(task, outputs, labels),
        log_loss(task, outputs, labels),
        area_under_risk(confidences, task.kind.is_right(task, outputs, labels)),
    )


def has_probabilities(task: Task) -> bool:
    """Returns True if the outputs are probabilities of classes."""
    return isinstance(task.kind, ClassUncertainty)
