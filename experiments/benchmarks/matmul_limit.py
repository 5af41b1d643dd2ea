"""Matmul ceiling of the machine: large matrix products in each framework.

    python -m gemma_encoder.experiments.benchmarks.matmul_limit [--width=4096] [--device=cpu]

Model FLOP utilization is relative to this ceiling, not to a data sheet. Needs the extra `bench`.
"""

import time

import numpy as np

from gemma_encoder.experiments.benchmarks import harness

COUNT = 4  # products in a turn, each taking the result of the one before


def matrices(turn: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two random matrices, scaled so that products of products stay of order one."""
    rng = np.random.default_rng(turn)
    return tuple(
        (rng.standard_normal((width, width)) / width**0.5).astype(np.float32) for _ in range(2)
    )


def in_jax(width: int, dtype: str) -> harness.Turn:
    """Sets up JAX's arm."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def chain(a, b):
        for _ in range(COUNT):
            a = (a @ b).astype(a.dtype)
        return a

    def run(turn: int) -> dict[str, float]:
        a, b = (jnp.asarray(matrix, dtype) for matrix in matrices(turn, width))
        jax.block_until_ready((a, b))
        began = time.perf_counter()
        value = float(chain(a, b)[0, 0])
        return {"seconds": time.perf_counter() - began, "value": value}

    return run


def in_torch(width: int, dtype: str, device: str) -> harness.Turn:
    """Sets up PyTorch's arm."""
    import torch

    def run(turn: int) -> dict[str, float]:
        a, b = (
            torch.from_numpy(matrix).to(device, getattr(torch, dtype))
            for matrix in matrices(turn, width)
        )
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(COUNT):
            a = a @ b
        return {"value": float(a[0, 0]), "seconds": time.perf_counter() - began}

    return run


def main() -> None:
    """Measures and prints."""
    parser = harness.parser(__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument(
        "--dtypes",
        default="float32,bfloat16",
        help="bfloat16 takes minutes on a CPU without instructions for it",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    flop = 2 * COUNT * args.width**3
    rows = []
    for dtype in args.dtypes.split(","):
        shared = {"width": args.width, "dtype": dtype}
        torch_settings = {**shared, "device": args.device}
        arms = [
            harness.Arm("PyTorch", f"{__spec__.name}:in_torch", torch_settings),
            harness.Arm("JAX", f"{__spec__.name}:in_jax", shared),
        ]
        for name, figures in harness.medians(harness.take_turns(arms, args.repeats)).items():
            speed = f"{flop / figures['seconds'] / 1e9:,.0f}"
            rows.append([dtype, name, speed, f"{figures['spread']:.0%}"])
    title = f"products of {args.width} x {args.width} matrices"
    columns = ["dtype", "framework", "GFLOP/s", "spread"]
    harness.publish(title, columns, rows, file=args.json)


if __name__ == "__main__":
    main()
