"""Attention alone: every implementation that runs here against the length of a row and the window, time and memory, beside PyTorch's.

    python -m gemma_encoder.experiments.benchmarks.attention [--size=gemma3_270m] [--lengths=512,1024,2048,4096] [--windows=0,512] [--soft_cap=0] [--device=cpu]

One text a row, with the heads of `--size`; a window of 0 is a global layer, one of w reaches w - 1 tokens to each side. Forward, and forward with the
gradients of queries, keys and values. The peer is scaled_dot_product_attention under the same boolean mask, made before the clock starts;
with a soft cap, which that does not know, transformers' own eager attention of Gemma 2. Outputs and gradients are compared. Memory is what the
compiler says of temporaries (ours; forward and backward), and what the process took at its peak beyond what it had before (the peer on a CPU; what PyTorch's
allocator counted on a GPU). Implementations that cannot run here are named with the reason. Needs the extra `bench` (without it, ours runs alone).
"""

import resource
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import harness

COMPARED = ("output", "gradient of query", "gradient of key", "gradient of value")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def arrays(turn: int, length: int, heads: tuple[int, int, int]) -> list[np.ndarray]:
    """Scaled queries [1, L, N, H], keys and values [1, L, K, H], and weights [1, L, N, H] under which outputs are summed; the same for every arm."""
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
    """What the layer means."""
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
    """Our arm."""
    import jax
    import jax.numpy as jnp

    from gemma_encoder.model.attention import dot_product_attention

    spec = spec_of(window, soft_cap)
    places = {
        "segment_ids": jnp.ones((1, length), jnp.int32),
        "positions": jnp.arange(length, dtype=jnp.int32)[None],
    }

    def attend(query, key, value):
        return dot_product_attention(
            query, key, value, spec=spec, implementation=implementation, **places
        )

    def total(query, key, value, weights):
        return jnp.sum(attend(query, key, value).astype(jnp.float32) * weights)

    abstract = [
        jax.ShapeDtypeStruct(array.shape, dtype if place < 3 else "float32")
        for place, array in enumerate(arrays(0, length, heads))
    ]
    forward = jax.jit(attend).lower(*abstract[:3]).compile()
    both = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*abstract).compile()
    memory = both.memory_analysis().temp_size_in_bytes

    def run(turn: int) -> dict[str, float]:
        *qkv, weights = arrays(turn, length, heads)
        placed = [jnp.asarray(array, dtype) for array in qkv]
        jax.block_until_ready(placed)
        began = time.perf_counter()
        out = jax.block_until_ready(forward(*placed))
        between = time.perf_counter()
        gradients = jax.block_until_ready(both(*placed, jnp.asarray(weights)))
        seconds = {"forward": between - began, "both": time.perf_counter() - between}
        return {
            **seconds,
            **sums(
                np.asarray(out, np.float32),
                [np.asarray(gradient, np.float32) for gradient in gradients],
                weights,
            ),
            "memory": memory,
        }

    return run


def sums(out: np.ndarray, gradients: list[np.ndarray], weights: np.ndarray) -> dict[str, float]:
    """What is compared: weighted sums of the outputs and of each gradient, over their norms: of order one, whatever the sizes."""
    found = {}
    for name, array in zip(COMPARED, (out, *gradients), strict=True):
        found[name] = float(
            np.sum(array * np.resize(weights, array.shape), dtype=np.float64)
            / np.linalg.norm(array)
        )
    return found


def peer(
    length: int, window: int, soft_cap: float, heads: tuple[int, int, int], dtype: str, device: str
) -> harness.Turn:
    """PyTorch's arm."""
    import torch

    place = torch.arange(length, device=device)
    mask = ((place[:, None] - place[None, :]).abs() < window)[None, None] if window else None
    group = heads[0] // heads[1]
    if soft_cap:
        from transformers.models.gemma2 import modeling_gemma2

        bare = torch.nn.Module()
        bare.num_key_value_groups, bare.training = group, False
        additive = (
            None
            if mask is None
            else torch.zeros(mask.shape, dtype=getattr(torch, dtype), device=device).masked_fill(
                ~mask, torch.finfo(torch.float32).min
            )
        )

        def attend(query, key, value):
            return modeling_gemma2.eager_attention_forward(
                bare, query, key, value, additive, scaling=1.0, softcap=soft_cap
            )[0]
    else:

        def attend(query, key, value):
            # Whether the kernels for grouped heads are used is its own choice.
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=1.0, enable_gqa=group > 1
            ).transpose(1, 2)

    def finished() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def run(turn: int) -> dict[str, float]:
        *qkv, weights = arrays(turn, length, heads)
        placed = [
            torch.from_numpy(array).to(device, getattr(torch, dtype)).transpose(1, 2).contiguous()
            for array in qkv
        ]
        given = torch.from_numpy(weights).to(device)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        finished()
        began = time.perf_counter()
        with torch.no_grad():
            out = attend(*placed)
        finished()
        between = time.perf_counter()
        for array in placed:
            array.requires_grad_()
        (attend(*placed).float() * given).sum().backward()
        finished()
        seconds = {"forward": between - began, "both": time.perf_counter() - between}
        peak = (
            torch.cuda.max_memory_allocated()
            if device == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        peaks.append(peak - before)
        gradients = [array.grad.transpose(1, 2).float().cpu().numpy() for array in placed]
        return {
            **seconds,
            **sums(out.float().cpu().numpy(), gradients, weights),
            "memory": max(peaks),
        }

    peaks: list[int] = []  # a process's peak only rises: what later turns add is nothing
    return run


def implementations(dtype: str, head_dim: int, soft_cap: float) -> tuple[list[str], list[str]]:
    """Those that run on JAX's device, and of each other one the reason why not."""
    import jax
    import jax.numpy as jnp

    from gemma_encoder.inputs.errors import InputError
    from gemma_encoder.model.attention import choose_implementation
    from gemma_encoder.model.config import ATTENTION_IMPLEMENTATIONS

    able, refused = [], []
    asked = {
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
            able.append(choose_implementation(name, **asked))
        except InputError as error:
            refused.append(str(error))
    return able, refused


def main(argv: list[str] | None = None) -> None:
    """Measures, compares, prints."""
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--size", default="gemma3_270m", help="whose heads are taken")
    parser.add_argument(
        "--lengths",
        default="512,1024,2048,4096",
        help="tokens of a row; 8192,16384 take minutes on a CPU",
    )
    parser.add_argument("--windows", default="0,512", help="0 for a global layer")
    parser.add_argument("--soft_cap", type=float, default=0.0, help="0 for none")
    harness.add_device(parser)
    args = parser.parse_args(argv)
    from gemma_encoder.model.sizes import GEMMA_CONFIGS

    chosen = GEMMA_CONFIGS[args.size]
    heads = (chosen.num_heads, chosen.num_kv_heads, chosen.head_dim)
    able, notes = implementations(args.dtype, chosen.head_dim, args.soft_cap)
    without = harness.missing("torch", *(("transformers",) if args.soft_cap else ()))
    if without:
        notes.append(f"the peer is left out: {without}")
    theirs = "transformers, eager (peer)" if args.soft_cap else "PyTorch, sdpa (peer)"
    rows = []
    for length in (int(text) for text in args.lengths.split(",")):
        for window in (int(text) for text in args.windows.split(",")):
            if window >= length:
                continue  # the global layer again
            shared = {
                "length": length,
                "window": window,
                "soft_cap": args.soft_cap,
                "heads": heads,
                "dtype": args.dtype,
            }
            arms = (
                []
                if without
                else [
                    harness.Arm(theirs, f"{__spec__.name}:peer", {**shared, "device": args.device})
                ]
            )
            arms += [
                harness.Arm(
                    f"ours, {name}", f"{__spec__.name}:ours", {**shared, "implementation": name}
                )
                for name in able
            ]
            seen = harness.take_turns(arms, args.repeats)
            for figure in COMPARED:
                harness.same(
                    f"{length} tokens, window {window}", seen, figure, TOLERANCE[args.dtype]
                )
            for name, found in harness.medians(seen).items():
                against = (
                    ""
                    if without or name == theirs
                    else ", ".join(
                        f"{harness.ratio(seen, name, theirs, figure):.2f} x"
                        for figure in ("forward", "both")
                    )
                )
                parts = [
                    f"{found['forward'] * 1e3:.1f} ms",
                    f"{found['both'] * 1e3:.1f} ms",
                    f"{found['memory'] / 2**20:.0f} MiB",
                ]
                rows.append([length, window or "none", name, *parts, against])
    columns = [
        "tokens",
        "window",
        "arm",
        "forward",
        "forward and backward",
        "memory",
        "against the peer",
    ]
    title = f"{heads[0]} query and {heads[1]} key-value heads of {heads[2]}, {args.dtype}, soft cap {args.soft_cap or 'none'}, {args.repeats} rounds"
    harness.publish(title, columns, rows, notes, args.json)


if __name__ == "__main__":
    main()
