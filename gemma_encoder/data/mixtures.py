"""Named lists of tasks, and how often each task of a mixture is drawn."""

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
    """The tasks that `names` stands for: each is a task or a mixture, of ours or of seqio's."""
    expanded = [
        seqio_source.expand_seqio_mixture(name)
        if name.startswith(seqio_source.PREFIX)
        else MIXTURES.get(name, (name,))
        for name in names
    ]
    return tuple(task for tasks in expanded for task in tasks)


def rates(sources: Sequence[Source], mixing: str, temperature: float = 2.0) -> np.ndarray:
    """The share of each task in the training stream.

    Args:
        sources: the tasks of the mixture.
        mixing: "equal", "proportional" (to the number of training records; the tasks of a mixture
            of seqio share out theirs by its rates) or "temperature" (to their 1/temperature power,
            as T5 does: arXiv 1910.10683, section 3.5.2).
        temperature: for "temperature"; 1 is proportional, larger is more equal.

    Returns:
        Shares that sum to one; a task without a train split has none.
    """
    if mixing not in RATES:
        raise unknown("mixing", mixing, RATES)
    if temperature <= 0:
        raise InputError(f"mixture.temperature must be positive, got {temperature}")
    sizes = np.array([_size(source) for source in sources], float)
    if mixing != "equal":
        sizes = _by_their_mixture(sources, sizes)
    if not sizes.any():
        names = ", ".join(source.task.name for source in sources)
        raise InputError(f"no task has a train split to learn from: {names}")
    power = {"equal": 0.0, "proportional": 1.0, "temperature": 1 / temperature}[mixing]
    shares = np.where(sizes > 0, sizes**power, 0.0)
    learnt = {source.task.head for source, share in zip(sources, shares, strict=True) if share}
    for source in sources:
        if source.task.head not in learnt:
            raise InputError(
                f"task {source.task.name!r} has no train split, and no task beside it trains its "
                f"head {source.task.head!r}; name one that does"
            )
    return shares / shares.sum()


def _by_their_mixture(sources: Sequence[Source], sizes: np.ndarray) -> np.ndarray:
    """The records of all tasks of a mixture of seqio, shared out among them by its rates."""
    sizes, mixtures = sizes.copy(), np.array([source.mixture for source in sources])
    for mixture in set(mixtures) - {""}:
        members = np.flatnonzero((mixtures == mixture) & (sizes > 0))
        rates = np.array([sources[index].rate for index in members], float)
        if not (rates >= 0).all() or not 0 < rates.sum() < np.inf:
            raise InputError(
                f"mixture {mixture!r} of seqio: rates must be positive, got {rates.tolist()}"
            )
        sizes[members] = sizes[members].sum() * rates / rates.sum()
    return sizes


def _size(source: Source) -> int:
    return source.size("train") if "train" in source.splits else 0
