"""TPU chip specifications: memory, bandwidth and peak FLOPs of each generation.

Source: cloud.google.com/tpu/docs/system-architecture-tpu-vm.
"""

import dataclasses

from gemma_encoder.training.devices import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specification of one TPU chip.

    Attributes:
        kind: JAX's device kind.
        memory: bytes of high-bandwidth memory.
        memory_bandwidth: bytes per second to and from that memory.
        link_bandwidth: bytes per second that the chip can send to its neighbors in the slice, in
            one direction, summed over all links.
        network_bandwidth: bytes per second of the chip's share of its host's network, which
            connects slices.
    """

    kind: str
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOPs per second."""
        return PEAK_FLOPS[self.kind]


# Link bandwidth is half of the published bidirectional inter-chip bandwidth (v5e 400 GB/s,
# v5p 1,200 GB/s, v6e 800 GB/s). Network bandwidth assumes 25 GB/s per host of four chips.
CHIPS = {
    "v5e": Chip("TPU v5 lite", 16 * 2**30, 819e9, 200e9, 6.25e9),
    "v5p": Chip("TPU v5", 95 * 2**30, 2765e9, 600e9, 6.25e9),
    "v6e": Chip("TPU v6 lite", 32 * 2**30, 1640e9, 400e9, 6.25e9),
}
