"""TPU chips: what a chip holds and how fast it is, as Google publishes it for each generation (cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""

import dataclasses

from gemma_encoder.training.devices import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        kind: what JAX calls it.
        memory: bytes of high-bandwidth memory.
        memory_bandwidth: bytes a second to and from it.
        link_bandwidth: bytes a second that it can send to its neighbours in the slice, over all links, in one direction.
        network_bandwidth: bytes a second of its share of its host's network, which joins slices.
    """

    kind: str
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 operations a second."""
        return PEAK_FLOPS[self.kind]


# Link bandwidth: half of the published bidirectional inter-chip figure (v5e 400 GB/s, v5p 1,200 GB/s, v6e 800 GB/s). Network: 25 GB/s a host
# of four chips is assumed.
CHIPS = {
    "v5e": Chip("TPU v5 lite", 16 * 2**30, 819e9, 200e9, 6.25e9),
    "v5p": Chip("TPU v5", 95 * 2**30, 2765e9, 600e9, 6.25e9),
    "v6e": Chip("TPU v6 lite", 32 * 2**30, 1640e9, 400e9, 6.25e9),
}
