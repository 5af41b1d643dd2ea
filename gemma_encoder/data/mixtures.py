"""Named lists of tasks, and how often each task of a mixture is drawn: seqio's rates."""

from collections.abc import Mapping, Sequence

import numpy as np

from gemma_encoder.data import glue, superglue
from gemma_encoder.data.source import Source, load_seqio
from gemma_encoder.inputs.errors import InputError, unknown

RATES = ("equal", "proportional", "temperature")

MIXTURES: Mapping[str, tuple[str, ...]] = {
    "glue": tuple(glue.TASKS),
    "superglue": tuple(superglue.TASKS),
    "glue_and_msmarco": (*glue.TASKS, "msmarco"),
}


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """The tasks that `names` stands for: each is a task or a mixture."""
    return tuple(task for name in names for task in MIXTURES.get(name, (name,)))


def rates(sources: Sequence[Source], mixing: str, temperature: float = 2.0) -> np.ndarray:
    """The share of each task in the training stream; the shares sum to one, and a task without a train split has none.

    Args:
        sources: the tasks of the mixture.
        mixing: "equal", "proportional" (to the number of training records) or "temperature" (proportional to its
            1/temperature power, as T5 does: arXiv 1910.10683, section 3.5.2).
        temperature: for "temperature"; 1 is proportional, larger is more equal.
    """
    if mixing not in RATES:
        raise unknown("mixing", mixing, RATES)
    if temperature <= 0:
        raise InputError(f"mixture.temperature must be positive, got {temperature}")
    shares = np.array([_weight(source, mixing, temperature) for source in sources], float)
    if not shares.any():
        raise InputError(
            f"no task has a train split to learn from: {', '.join(source.task.name for source in sources)}"
        )
    learnt = {source.task.head for source, share in zip(sources, shares, strict=True) if share}
    for source in sources:
        if source.task.head not in learnt:
            raise InputError(
                f"task {source.task.name!r} has no train split, and no task beside it trains its head {source.task.head!r}; name one that does"
            )
    return shares / shares.sum()


def _weight(source: Source, mixing: str, temperature: float) -> float:
    if "train" not in source.splits:
        return 0.0
    if mixing == "equal":
        return 1.0
    return load_seqio().mixing_rate_num_examples(
        source.seqio_task("train"), temperature=temperature if mixing == "temperature" else 1.0
    )
