"""How often each task of a mixture is drawn: seqio's rates."""

from collections.abc import Sequence

import numpy as np

from gemma_encoder.data.source import Source, load_seqio
from gemma_encoder.inputs.errors import InputError, unknown

RATES = ("equal", "proportional", "temperature")


def rates(sources: Sequence[Source], mixing: str, temperature: float = 2.0) -> np.ndarray:
    """The share of each task in the training stream; the shares sum to one.

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
    if mixing == "equal":
        shares = np.ones(len(sources))
    else:
        seqio = load_seqio()
        shares = np.array(
            [seqio.mixing_rate_num_examples(source.seqio_task("train"), temperature=temperature if mixing == "temperature" else 1.0) for source in sources],
            float,
        )
    return shares / shares.sum()
