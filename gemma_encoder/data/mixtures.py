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


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """The tasks that `names` stands for: each is a task or a mixture, of ours or of seqio's."""
    expanded = [
        seqio_source.expand(name)
        if name.startswith(seqio_source.PREFIX)
        else MIXTURES.get(name, (name,))
        for name in names
    ]
    return tuple(task for tasks in expanded for task in tasks)


def rates(sources: Sequence[Source], mixing: str, temperature: float = 2.0) -> np.ndarray:
    """The share of each task in the training stream.

    Args:
        sources: the tasks of the mixture.
        mixing: "equal", "proportional" (to the number of training records; of a mixture of seqio,
            to its own rates) or "temperature" (to their 1/temperature power, as T5 does: arXiv
            1910.10683, section 3.5.2).
        temperature: for "temperature"; 1 is proportional, larger is more equal.

    Returns:
        Shares that sum to one; a task without a train split has none.
    """
    if mixing not in RATES:
        raise unknown("mixing", mixing, RATES)
    if temperature <= 0:
        raise InputError(f"mixture.temperature must be positive, got {temperature}")
    sizes = np.array([_size(source) for source in sources], float)
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
    if all(source.rate is not None for source in sources) and mixing != "equal":
        own_rates = np.array([source.rate for source in sources], float)
        if not (own_rates >= 0).all() or not 0 < own_rates.sum() < np.inf:
            raise InputError(f"the rates of the mixture must be positive, got {own_rates.tolist()}")
        shares = np.where(own_rates > 0, own_rates**power, 0.0) * (sizes > 0)
    return shares / shares.sum()


def _size(source: Source) -> int:
    return source.size("train") if "train" in source.splits else 0
