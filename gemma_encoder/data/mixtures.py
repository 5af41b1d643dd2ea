"""Named lists of tasks, and the sampling rates of the tasks of a mixture."""

from collections.abc import Mapping, Sequence

import numpy as np

from gemma_encoder.data import seqio_source
from gemma_encoder.data.source import Source
from gemma_encoder.data.tasks import glue, superglue
from gemma_encoder.inputs.errors import InputError, unknown

RATES = ("equal", "proportional", "temperature")

MIXTURES: Mapping[str, tuple[str, ...]] = {
    "glue": tuple(glue.TASKS),
    "superglue": tuple(superglue.TASKS),
    "glue_and_msmarco": (*glue.TASKS, "msmarco"),
}


def expand_mixtures(names: Sequence[str]) -> tuple[str, ...]:
    """Expands mixtures, of this library or of seqio, among `names` into their tasks."""
    expanded = [
        seqio_source.expand_seqio_mixture(name)
        if name.startswith(seqio_source.PREFIX)
        else MIXTURES.get(name, (name,))
        for name in names
    ]
    return tuple(task for tasks in expanded for task in tasks)


def rates(sources: Sequence[Source], mixing: str, temperature: float = 2.0) -> np.ndarray:
    """Returns the share of each task in the training stream.

    Args:
        sources: the tasks of the mixture.
        mixing: "equal", "proportional" (to the number of training records; tasks of a seqio mixture
            divide their total by its rates) or "temperature" (to the number of records to the power
            of 1/temperature, as in T5: arXiv 1910.10683, section 3.5.2).
        temperature: parameter of "temperature"; 1 is proportional, larger values are more equal.

    Returns:
        Shares that sum to one; the share of a task without a train split is 0.

    Raises:
        InputError: an option is invalid, no task has a train split, or a task without one uses a
            head that no other task trains.
    """
    if mixing not in RATES:
        raise unknown("mixing", mixing, RATES)
    if temperature <= 0:
        raise InputError(f"mixture.temperature must be positive, got {temperature}")
    sizes = np.array([_size(source) for source in sources], float)
    if mixing != "equal":
        sizes = _apply_seqio_rates(sources, sizes)
    if not sizes.any():
        names = ", ".join(source.task.name for source in sources)
        raise InputError(f"no task has a train split to learn from: {names}")
    power = {"equal": 0.0, "proportional": 1.0, "temperature": 1 / temperature}[mixing]
    shares = np.where(sizes > 0, sizes**power, 0.0)
    trained = {source.task.head for source, share in zip(sources, shares, strict=True) if share}
    for source in sources:
        if source.task.head not in trained:
            raise InputError(
                f"task {source.task.name!r} has no train split, and no other task trains its head "
                f"{source.task.head!r}; add a task that does"
            )
    return shares / shares.sum()


def _apply_seqio_rates(sources: Sequence[Source], sizes: np.ndarray) -> np.ndarray:
    """Redistributes the records of each seqio mixture among its tasks by the mixture's rates."""
    sizes = sizes.copy()
    mixtures = np.array([source.mixture for source in sources])
    for mixture in set(mixtures) - {""}:
        members = np.flatnonzero((mixtures == mixture) & (sizes > 0))
        rates = np.array([sources[index].rate for index in members], float)
        if not (rates >= 0).all() or not 0 < rates.sum() < np.inf:
            raise InputError(
                f"seqio mixture {mixture!r}: rates must be positive, got {rates.tolist()}"
            )
        sizes[members] = sizes[members].sum() * rates / rates.sum()
    return sizes


def _size(source: Source) -> int:
    return source.size("train") if "train" in source.splits else 0
