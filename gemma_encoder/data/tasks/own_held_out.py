"""The held-out share of the user's training file: stratified, with equal texts on one side.

Records with equal texts form a group, which is held out as a whole; texts that differ only in
spaces, tabs and line breaks are equal. Every class with at least two groups has one on each side;
beyond that, classes are held out in proportion. If no class has two groups, groups are divided, and
if no class has two records, records are held out whatever their class, each with a warning.
Regression is stratified by quantiles of the target, several classes per row by the rarest of them,
queries of a ranking by whether they have a relevant document and another one.

The order of groups is that of a hash of their texts: the same on every host and for every seed, and
few records change sides when a file grows. scikit-learn's `StratifiedGroupKFold` loops over groups
in Python, which takes minutes for millions of texts.

Shapes: N records, G groups, S strata, C classes.
"""

from collections.abc import Mapping

import numpy as np

from gemma_encoder.data.source import HELD_OUT
from gemma_encoder.data.table import Groups
from gemma_encoder.data.tasks.own_cells import split_names
from gemma_encoder.data.tasks.own_documents import DocumentRows
from gemma_encoder.data.tasks.own_rows import Rows
from gemma_encoder.data.tasks.own_task import LISTED_CLASSES
from gemma_encoder.data.text_hashes import mixed_bits, text_hashes
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task

VERSION = 2  # incremented when other records are held out
BINS = 10  # quantiles of the target of a regression


class HeldOut:
    """Records of the training file by split.

    Args:
        file: the rows of the training file.
        task: the task to learn.
        class_indices: class indices by labels of the file; empty without classes.
        queries: the rows grouped by query, for a ranking.
        fraction: fraction of the records to hold out.

    Attributes:
        records: split -> indices of its records, in a fixed random order.
        splits_equal_texts: True if equal texts are on both sides, since too few are different.
        splits_classes: True if no class is on both sides, since each has a single record.
        summary: number of records by split and, if there are classes, by class, for messages.

    Raises:
        InputError: there are too few records.
    """

    def __init__(
        self,
        file: Rows | DocumentRows,
        task: Task,
        class_indices: Mapping[str, int],
        queries: Groups | None,
        fraction: float,
    ):
        self._fraction = fraction
        labels = _Labels(file, task, class_indices)
        if queries is None:
            groups = text_hashes(file.table, file.text_columns)
            strata = labels.strata(fraction)
        else:
            groups = text_hashes(file.table, file.text_columns[:1])[queries.first_rows()]
            by_label = queries.num_positives if task.kind.embeds else queries.has_both_labels
            strata = (by_label(file.numeric_labels()) > 0).astype(np.int64)
        cover = bool(task.classes) or queries is not None
        records = mixed_bits(np.arange(len(groups), dtype=np.uint64))
        no_strata = np.zeros_like(strata)
        attempts = (
            (groups, strata, cover),
            (records, strata, cover),
            (groups, no_strata, False),
            (records, no_strata, False),
        )
        for used_groups, used_strata, covers in attempts:
            is_held_out = select_records(used_groups, used_strata, fraction, cover=covers)
            if is_held_out is not None:
                break
        unit = "records" if queries is None else "queries"
        if is_held_out is None:
            raise InputError(
                f"{file.name}: {len(groups)} {unit} are too few to hold out {100 * fraction:g}% "
                "for validation; set own.validation, or own.held_out"
            )
        self.splits_equal_texts = used_groups is records and bool(
            np.isin(groups[is_held_out], groups[~is_held_out]).any()
        )
        self.splits_classes = used_strata is no_strata and bool(task.classes)
        rng = np.random.default_rng(0)
        self.records = {
            "train": rng.permutation(np.flatnonzero(~is_held_out)),
            "validation": rng.permutation(np.flatnonzero(is_held_out)),
        }
        counts = f"{is_held_out.sum()} of {len(groups)} {unit}"
        self.summary = counts + labels.describe(is_held_out)

    @property
    def facts(self) -> str:
        """Facts other than files that the selection depends on, for fingerprints."""
        return f"{HELD_OUT} {self._fraction:g}, version {VERSION}"


class _Labels:
    """Labels of the rows of a file.

    Attributes:
        members: class indices of each distinct label; None without classes.
        codes: [N], indices into `members`.
    """

    def __init__(self, file: Rows, task: Task, class_indices: Mapping[str, int]):
        self._task = task
        self._file = file
        self.members = None
        if task.classes:
            names, self.codes = file.table.codes("label")
            self.members = [
                [class_indices[name] for name in split_names(label) if name] for label in names
            ]

    def strata(self, fraction: float) -> np.ndarray:
        """Returns [N] int64, the stratum of each row."""
        if self.members is not None:
            counts = self._by_class(np.ones(len(self.codes), bool))
            rarest = [min(m, key=counts.__getitem__, default=len(counts)) for m in self.members]
            return np.array(rarest, np.int64)[self.codes]
        values = self._file.numeric_labels()
        bins = int(np.clip(round(len(values) * fraction), 1, BINS))
        edges = np.quantile(values, np.arange(1, bins) / bins)
        return np.searchsorted(edges, values, side="right")

    def _by_class(self, mask: np.ndarray) -> np.ndarray:
        """Returns [C] int64, the number of rows of each class."""
        frequencies = np.bincount(self.codes[mask], minlength=len(self.members))
        counts = np.zeros(len(self._task.classes), np.int64)
        for indices, frequency in zip(self.members, frequencies, strict=True):
            counts[indices] += frequency
        return counts

    def describe(self, is_held_out: np.ndarray) -> str:
        """Describes the records by class, the rarest ones if there are many."""
        if self.members is None:
            return ""
        training = self._by_class(~is_held_out)
        validation = self._by_class(is_held_out)
        shown = range(len(training))
        if len(training) > LISTED_CLASSES:
            shown = np.argsort(training + validation, kind="stable")[:LISTED_CLASSES]
        parts = [f"{self._task.classes[i]} {training[i]} + {validation[i]}" for i in shown]
        if len(training) > LISTED_CLASSES:
            parts.append(f"and {len(training) - LISTED_CLASSES} classes that are more frequent")
        return f" (by class, training + validation: {', '.join(parts)})"


def select_records(
    groups: np.ndarray, strata: np.ndarray, fraction: float, *, cover: bool
) -> np.ndarray | None:
    """Selects the records to hold out.

    Args:
        groups: [N] uint64, equal for records that stay together; random for different ones.
        strata: [N], from 0.
        fraction: fraction of the records to hold out.
        cover: hold out a group of every stratum that has two.

    Returns:
        [N] bool, True for held-out records; None if a side would be empty.
    """
    if not 0 < round(len(groups) * fraction) < len(groups):
        return None
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    stratum = _rarest_strata(group, strata, len(sizes))
    order = np.argsort(stratum, kind="stable")  # by stratum, then by hash
    bounds = np.searchsorted(stratum[order], np.arange(strata.max() + 2))
    counts = np.bincount(stratum, weights=sizes, minlength=len(bounds) - 1)
    is_divisible = np.diff(bounds) > 1  # a single group stays in training
    quotas = _quotas(counts * fraction, round(len(groups) * fraction), is_divisible, cover)
    is_selected = np.zeros(len(sizes), bool)
    for first, last, quota in zip(bounds[:-1], bounds[1:], quotas, strict=True):
        if quota and last - first > 1:
            members = order[first:last]
            is_selected[members[_closest(sizes[members], quota)]] = True
    if cover:
        for side in (True, False):
            _cover(is_selected, group, strata, side)
    if not is_selected.any() or is_selected.all():
        return None
    return is_selected[group]


def _rarest_strata(group: np.ndarray, strata: np.ndarray, num_groups: int) -> np.ndarray:
    """Returns [G], the rarest of the strata of each group's records."""
    by_frequency = np.argsort(np.bincount(strata), kind="stable")
    rank = np.empty_like(by_frequency)
    rank[by_frequency] = np.arange(len(rank))
    lowest = np.full(num_groups, len(rank))
    np.minimum.at(lowest, group, rank[strata])
    return by_frequency[lowest]


def _quotas(shares: np.ndarray, total: int, is_divisible: np.ndarray, cover: bool) -> np.ndarray:
    """Rounds shares [S] to whole numbers: the largest remainders up, up to the sum `total`.

    With `cover`, the share of a divisible stratum is at least 1, even if the sum then exceeds
    `total`. Those of other strata are rounded up last.
    """
    result = np.maximum(np.floor(shares).astype(np.int64), is_divisible & cover)
    missing = max(total - result.sum(), 0)
    order = np.argsort(np.where(is_divisible, result - shares, np.inf), kind="stable")
    result[order[:missing]] += 1
    return result


def _closest(sizes: np.ndarray, quota: int) -> np.ndarray:
    """Returns indices of groups whose sizes add up to about `quota`: one at least, never all."""
    # Groups that alone exceed the quota come last, the smallest of them first.
    order = np.argsort(np.where(sizes > quota, sizes, 0), kind="stable")
    sums = np.cumsum(sizes[order])[:-1]
    return order[: np.abs(sums - quota).argmin() + 1]


def _cover(is_selected: np.ndarray, group: np.ndarray, strata: np.ndarray, side: bool) -> None:
    """Moves a group of every stratum with two groups, but none on `side`, to that side.

    Only strata that share texts with rarer ones need it. `is_selected` [G] is changed in place.
    """
    on_side = np.bincount(strata, is_selected[group] == side)
    for stratum in np.flatnonzero((on_side == 0) & (np.bincount(strata) > 0)):
        candidates = np.unique(group[strata == stratum])
        for candidate in candidates[:LISTED_CLASSES] if len(candidates) > 1 else ():
            records = group == candidate
            others = (is_selected[group] != side) & ~records
            if np.isin(strata[records], strata[others]).all():  # the other side loses no stratum
                is_selected[candidate] = side
                break
