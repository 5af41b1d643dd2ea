"""What a device can do at most: its peak arithmetic, by the name that JAX gives it."""

import jax

# Dense bfloat16 FLOP/s as their makers publish them: cloud.google.com/tpu/docs (v4 275, v5e 197, v5p 459, v6e 918 TFLOP/s a chip),
# NVIDIA's data sheets without sparsity (A100 312, L4 121, H100 and H200 SXM 989).
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
    """Dense bfloat16 operations a second; None where they are not known, as of a CPU. GPUs have a longer name: "NVIDIA H100 80GB HBM3"."""
    known = [
        name
        for name in PEAK_FLOPS
        if device.device_kind == name
        or (name.startswith("NVIDIA") and device.device_kind.startswith(name))
    ]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def memory_in_use(device: jax.Device) -> int | None:
    """The most bytes of the device's memory that were in use so far; None where the backend does not say."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
