"""Attention alone: time and memory of every implementation, beside PyTorch's.

    python -m gemma_encoder.experiments.benchmarks.attention
        [--size=gemma3_270m] [--lengths=512,1024,2048,4096] [--windows=0,512] [--soft_cap=0]
        [--device=cpu]

One text per row, with the heads of `--size`. A window of 0 is a global layer, a window of w reaches
w - 1 tokens to each side. Times are of the forward pass, and of the forward pass with the gradients
of queries, keys and values. Outputs and gradients are compared between arms.

The peer is scaled_dot_product_attention with the same boolean mask, made before the clock starts;
with a soft cap, which it does not support, transformers' eager attention of Gemma 2.

Memory, forward and backward: for ours, the compiler's figure for temporary arrays; for the peer,
the growth of the process's peak memory on a CPU, and the peak of PyTorch's allocator on a GPU.

Implementations that cannot run here are listed with the reason. Needs the extra `bench`; without
it, only ours runs.
"""

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np

from gemma_encoder.experiments.benchmarks import harness

COMPARED = ("output", "gradient of query", "gradient of key", "gradient of value")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
COLUMNS = (
    "tokens",
    "window",
    "arm",
    "forward",
    "forward and backward",
    "memory",
    "against the peer",
)


def arrays(turn: int, length: int, heads: tuple[int, int, int]) -> list[np.ndarray]:
    """Returns the random inputs of a turn, the same for every arm.

    Scaled queries [1, L, N, H], keys and values [1, L, K, H], and weights [1, L, N, H] for the sum
    of outputs whose gradients are taken.
    """
    rng = np.random.default_rng(turn)
    queries, kv, width = heads
    shapes = [
        (1, length, queries, width),
        (1, length, kv, width),
        (1, length, kv, width),
        (1, length, queries, width),
    ]
    query, key, value, weights = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return [query * width**-0.5, key, value, weights]


def spec_of(window: int, soft_cap: float):
    """Returns the attention semantics of a layer; 0 stands for no window or no soft cap."""
    from gemma_encoder.model.config import AttentionSpec

    return AttentionSpec(False, (window - 1, window - 1) if window else None, soft_cap or None)


def ours(
    implementation: str,
    length: int,
    window: int,
    soft_cap: float,
    heads: tuple[int, int, int],
    dtype: str,
) -> harness.Turn:
    """Sets up our arm."""
    import jax
    import jax.numpy as jnp

    from gemma_encoder.model.attention import dot_product_attention

    spec = spec_of(window, soft_cap)
    segment_ids = jnp.ones((1, length), jnp.int32)
    positions = jnp.arange(length, dtype=jnp.int32)[None]

    def attend(query, key, value):
        return dot_product_attention(
            query,
            key,
            value,
            spec=spec,
            implementation=implementation,
            segment_ids=segment_ids,
            positions=positions,
        )

    def total(query, key, value, weights):
        return jnp.sum(attend(query, key, value).astype(jnp.float32) * weights)

    shapes = [array.shape for array in arrays(0, length, heads)]
    abstract = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes[:3]]
    abstract_weights = jax.ShapeDtypeStruct(shapes[3], "float32")
    forward = jax.jit(attend).lower(*abstract).compile()
    gradient = jax.grad(total, argnums=(0, 1, 2))
    both = jax.jit(gradient).lower(*abstract, abstract_weights).compile()
    memory = both.memory_analysis().temp_size_in_bytes

    def run(turn: int) -> dict[str, float]:
        *qkv, weights = arrays(turn, length, heads)
        inputs = [jnp.asarray(array, dtype) for array in qkv]
        jax.block_until_ready(inputs)
        began = time.perf_counter()
        out = jax.block_until_ready(forward(*inputs))
        between = time.perf_counter()
        gradients = jax.block_until_ready(both(*inputs, jnp.asarray(weights)))
        seconds = {"forward": between - began, "both": time.perf_counter() - between}
        out, *gradients = (np.asarray(array, np.float32) for array in (out, *gradients))
        return {**seconds, **sums(out, gradients, weights), "memory": memory}

    return run


def sums(out: np.ndarray, gradients: list[np.ndarray], weights: np.ndarray) -> dict[str, float]:
    """Returns the compared figures: weighted sums of the outputs and of each gradient.

    Each sum is divided by the norm of its array, so it is of order one for any size.
    """
    figures = {}
    for name, array in zip(COMPARED, (out, *gradients), strict=True):
        total = np.sum(array * np.resize(weights, array.shape), dtype=np.float64)
        figures[name] = float(total / np.linalg.norm(array))
    return figures


def peer(
    length: int, window: int, soft_cap: float, heads: tuple[int, int, int], dtype: str, device: str
) -> harness.Turn:
    """Sets up PyTorch's arm."""
    import torch

    token = torch.arange(length, device=device)
    mask = ((token[:, None] - token[None, :]).abs() < window)[None, None] if window else None
    group = heads[0] // heads[1]
    attend = _eager_attention(mask, group, soft_cap, dtype) if soft_cap else _sdpa(mask, group)
    on_gpu = device == "cuda"
    growths: list[int] = []

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_memory() -> int:
        if on_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def run(turn: int) -> dict[str, float]:
        *qkv, weights = arrays(turn, length, heads)
        inputs = [
            torch.from_numpy(array).to(device, getattr(torch, dtype)).transpose(1, 2).contiguous()
            for array in qkv
        ]
        output_weights = torch.from_numpy(weights).to(device)
        before = peak_memory()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = clock()
        with torch.no_grad():
            out = attend(*inputs)
        between = clock()
        for array in inputs:
            array.requires_grad_()
        (attend(*inputs).float() * output_weights).sum().backward()
        seconds = {"forward": between - began, "both": clock() - between}
        # The peak of a process only rises: later turns that need no more add nothing to it.
        growths.append(peak_memory() - before)
        gradients = [array.grad.transpose(1, 2).float().cpu().numpy() for array in inputs]
        compared = sums(out.float().cpu().numpy(), gradients, weights)
        return {**seconds, **compared, "memory": max(growths)}

    return run


def _sdpa(mask, group: int) -> Callable:
    """PyTorch's attention of queries, keys and values [1, heads, L, H]; returns [1, L, N, H]."""
    import torch

    def attend(query, key, value):
        # PyTorch itself decides whether to use its kernels for grouped heads.
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=1.0, enable_gqa=group > 1
        ).transpose(1, 2)

    return attend


def _eager_attention(mask, group: int, soft_cap: float, dtype: str) -> Callable:
    """The eager attention of transformers' Gemma 2, with a soft cap; shapes as `_sdpa`'s."""
    import torch
    from transformers.models.gemma2 import modeling_gemma2

    module = torch.nn.Module()
    module.num_key_value_groups = group
    module.training = False
    additive = None
    if mask is not None:
        zeros = torch.zeros(mask.shape, dtype=getattr(torch, dtype), device=mask.device)
        additive = zeros.masked_fill(~mask, torch.finfo(torch.float32).min)

    def attend(query, key, value):
        return modeling_gemma2.eager_attention_forward(
            module, query, key, value, additive, scaling=1.0, softcap=soft_cap
        )[0]

    return attend


def implementations(dtype: str, head_dim: int, soft_cap: float) -> tuple[list[str], list[str]]:
    """Returns the implementations that run on JAX's device, and the others' reasons."""
    import jax
    import jax.numpy as jnp

    from gemma_encoder.inputs.errors import InputError
    from gemma_encoder.model.attention import choose_implementation
    from gemma_encoder.model.config import ATTENTION_IMPLEMENTATIONS

    supported = []
    reasons = []
    requirements = {
        "platform": jax.default_backend(),
        "dtype": jnp.dtype(dtype),
        "head_dim": head_dim,
        "soft_cap": soft_cap or None,
        "dropout_rate": 0.0,
    }
    for name in ATTENTION_IMPLEMENTATIONS:
        if name == "auto":
            continue
        try:
            supported.append(choose_implementation(name, **requirements))
        except InputError as error:
            reasons.append(str(error))
    return supported, reasons


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--size", default="gemma3_270m", help="model whose heads are used")
    parser.add_argument(
        "--lengths",
        default="512,1024,2048,4096",
        help="tokens per row; 8192,16384 take minutes on a CPU",
    )
    parser.add_argument("--windows", default="0,512", help="0 for a global layer")
    parser.add_argument("--soft_cap", type=float, default=0.0, help="0 for none")
    harness.add_device(parser)
    return parser.parse_args(argv)


def compare(arms: list[harness.Arm], peer_name: str | None, repeats: int) -> list[list]:
    """Runs the arms, checks that they agree, and returns a row of the table for each arm."""
    results = harness.take_turns(arms, repeats)
    length, window, dtype = (arms[0].settings[key] for key in ("length", "window", "dtype"))
    for figure in COMPARED:
        harness.same(f"{length} tokens, window {window}", results, figure, TOLERANCE[dtype])
    rows = []
    for name, figures in harness.medians(results).items():
        speedups = ""
        if peer_name and name != peer_name:
            speedups = ", ".join(
                f"{harness.ratio(results, name, peer_name, figure):.2f} x"
                for figure in ("forward", "both")
            )
        row = [
            length,
            window or "none",
            name,
            f"{figures['forward'] * 1e3:.1f} ms",
            f"{figures['both'] * 1e3:.1f} ms",
            f"{figures['memory'] / 2**20:.0f} MiB",
            speedups,
        ]
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measures, compares and prints."""
    args = parse_arguments(argv)
    from gemma_encoder.model.sizes import GEMMA_CONFIGS

    config = GEMMA_CONFIGS[args.size]
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    supported, notes = implementations(args.dtype, config.head_dim, args.soft_cap)
    peer_name = "transformers, eager (peer)" if args.soft_cap else "PyTorch, sdpa (peer)"
    reason = harness.missing("torch", *(("transformers",) if args.soft_cap else ()))
    if reason:
        notes.append(f"the peer is left out: {reason}")
        peer_name = None
    rows = []
    for length in harness.integers(args.lengths):
        for window in harness.integers(args.windows):
            if window >= length:
                continue  # the same as a global layer
            shared = {
                "length": length,
                "window": window,
                "soft_cap": args.soft_cap,
                "heads": heads,
                "dtype": args.dtype,
            }
            arms = []
            if peer_name:
                settings = {**shared, "device": args.device}
                arms.append(harness.Arm(peer_name, f"{__spec__.name}:peer", settings))
            for name in supported:
                settings = {**shared, "implementation": name}
                arms.append(harness.Arm(f"ours, {name}", f"{__spec__.name}:ours", settings))
            rows += compare(arms, peer_name, args.repeats)
    title = (
        f"{heads[0]} query and {heads[1]} key-value heads of {heads[2]}, {args.dtype}, "
        f"soft cap {args.soft_cap or 'none'}, {args.repeats} rounds"
    )
    harness.publish(title, COLUMNS, rows, notes, args.json)


if __name__ == "__main__":
    main()
