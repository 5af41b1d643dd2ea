"""The machine's own ceiling: large matrix products in each framework.

    python -m gemma_encoder.experiments.benchmarks.matmul_limit [--width=4096] [--device=cpu]

What a model reaches is told against this, not against a data sheet. Needs the extra `bench`.
"""

import numpy as np

from gemma_encoder.experiments.benchmarks import harness

COUNT = 4  # products in a turn, one after another


def matrices(turn: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two random matrices, scaled so that products of products stay of order one."""
    rng = np.random.default_rng(turn)
    return tuple(
        (rng.standard_normal((width, width)) / width**0.5).astype(np.float32) for _ in range(2)
    )


def in_jax(width: int, dtype: str) -> harness.Turn:
    """JAX's arm."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def chain(a, b):
        for _ in range(COUNT):
            a = (a @ b).astype(a.dtype)
        return a

    def run(turn: int) -> dict[str, float]:
        import time

        a, b = (jnp.asarray(matrix, dtype) for matrix in matrices(turn, width))
        jax.block_until_ready((a, b))
        began = time.perf_counter()
        value = float(chain(a, b)[0, 0])
        return {"seconds": time.perf_counter() - began, "value": value}

    return run


def in_torch(width: int, dtype: str, device: str) -> harness.Turn:
    """PyTorch's arm."""
    import time

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
        help="a CPU without instructions for bfloat16 takes minutes for it",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    rows = []
    for dtype in args.dtypes.split(","):
        arms = [
            harness.Arm(
                "PyTorch",
                f"{__spec__.name}:in_torch",
                {"width": args.width, "dtype": dtype, "device": args.device},
            ),
            harness.Arm("JAX", f"{__spec__.name}:in_jax", {"width": args.width, "dtype": dtype}),
        ]
        for name, found in harness.medians(harness.take_turns(arms, args.repeats)).items():
            rows.append(
                [
                    dtype,
                    name,
                    f"{2 * COUNT * args.width**3 / found['seconds'] / 1e9:,.0f}",
                    f"{found['spread']:.0%}",
                ]
            )
    harness.publish(
        f"products of {args.width} x {args.width} matrices",
        ["dtype", "framework", "GFLOP/s", "spread"],
        rows,
        file=args.json,
    )


if __name__ == "__main__":
    main()
