"""Peak FLOP/s and memory use of devices."""

import jax

# Dense bfloat16 FLOP/s by `device_kind`, as vendors publish them: cloud.google.com/tpu/docs
# (TFLOP/s per chip: v4 275, v5e 197, v5p 459, v6e 918), and NVIDIA's data sheets without sparsity
# (A100 312, L4 121, H100 and H200 SXM 989).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Returns the peak dense bfloat16 FLOP/s of a device; None if unknown, as for a CPU.

    The kind of a GPU is longer than its name here, e.g. "NVIDIA H100 80GB HBM3".
    """
    kind = device.device_kind
    matching = [
        name
        for name in PEAK_FLOPS
        if kind == name or (name.startswith("NVIDIA") and kind.startswith(name))
    ]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def memory_in_use(device: jax.Device) -> int | None:
    """Returns the peak device memory in use so far, in bytes; None if the backend has no stats."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
