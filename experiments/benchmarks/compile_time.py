"""How long a training step takes to compile, against depth and width, and what a second start of the same run saves.

    python -m gemma_encoder.experiments.benchmarks.compile_time [--depths=4,8,16,32,62] [--widths=128,256,512] [--family=gemma2] [--starts=…]

Ours is the whole training step (forward, backward, AdamW), traced and lowered, then compiled, with every cache emptied before each
turn. The peer is transformers' model under torch.compile (Inductor, its caches off): the first forward and backward pass, less the
second; only the loss's own graph is in it, not the optimiser. A second start is the training program itself with a folder of compiled
programs that the first start filled: how long the process takes to its end, and how much of it is tracing, lowering and compiling. Needs the
extra `bench` for the peer (without it, ours runs alone).
"""

import os
import pathlib
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import fresh, harness

ROWS, LENGTH = 2, 128
COMPILING = {  # what JAX reports of itself, by what this table calls it
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}


def changes(depth: int, width: int) -> dict[str, int]:
    """The fields of the transformer that differ from the family's tiny model."""
    return {"num_layers": depth, "embed_dim": width, "hidden_dim": 4 * width}


def transformer(family: str, depth: int, width: int):
    """The family's tiny model with so many layers of such a width."""
    import dataclasses

    from gemma_encoder.model.sizes import GEMMA_CONFIGS

    return dataclasses.replace(GEMMA_CONFIGS[f"{family}_tiny"], **changes(depth, width))


def ours(family: str, depth: int, width: int) -> harness.Turn:
    """Our arm."""
    import jax

    from gemma_encoder.model import sharding
    from gemma_encoder.training import recipe
    from gemma_encoder.training.build import build
    from gemma_encoder.training.step import make_program

    config = recipe.default_config()
    config.tasks, config.model.compute_dtype = ("toy_sentiment",), "float32"
    config.model.size = f"{family}_tiny"
    config.model.transformer = changes(depth, width)
    config.batch.rows, config.batch.row_length, config.max_length = ROWS, LENGTH, LENGTH
    config.batch.examples_per_step = ROWS
    built = build(config, dry=True)

    def run(turn: int) -> dict[str, float]:
        jax.clear_caches()
        mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
        began = time.perf_counter()
        program = make_program(built, mesh, total=1000, warmup=0)
        lowered = program.step.lower(program.abstract, program.batch)
        between = time.perf_counter()
        lowered.compile()
        return {"trace": between - began, "compile": time.perf_counter() - between}

    return run


def peer(family: str, depth: int, width: int, device: str) -> harness.Turn:
    """The arm of transformers under torch.compile."""
    import torch
    import transformers

    from gemma_encoder.model.config import EncoderConfig
    from gemma_encoder.weights.export import transformer_json

    torch._inductor.config.force_disable_caches = True
    values = transformer_json(EncoderConfig(transformer(family, depth, width)))
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModel.from_config(
        config, attn_implementation="eager" if values["attn_logit_softcapping"] else "sdpa"
    ).to(device)

    def run(turn: int) -> dict[str, float]:
        torch._dynamo.reset()
        compiled = torch.compile(model)
        tokens = torch.from_numpy(np.random.default_rng(turn).integers(5, 8000, (ROWS, LENGTH))).to(
            device
        )
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            compiled(
                input_ids=tokens, attention_mask=torch.ones_like(tokens)
            ).last_hidden_state.float().mean().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return {"trace": 0.0, "compile": seconds[0] - seconds[1]}

    return run


def start(config: str, workdir: str, cache: str) -> dict[str, float]:
    """One start of the training program, in a process of its own: seconds of tracing, lowering and compiling, and of all its steps."""
    import importlib.util

    import jax

    from gemma_encoder.training import loop

    seen = dict.fromkeys(COMPILING.values(), 0.0)

    def note(event: str, seconds: float, **_) -> None:
        if event in COMPILING:
            seen[COMPILING[event]] += seconds

    jax.monitoring.register_event_duration_secs_listener(note)
    file, _, arg = config.partition(":")
    spec = importlib.util.spec_from_file_location("experiment", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.get_config(arg)
    made.compilation_cache = cache
    outcome = loop.train(made, workdir)
    return {**seen, "steps": outcome.seconds}


def starts(config: str, repeats: int) -> list[list]:
    """Rows of the table of first and second starts: medians, each pair with an empty folder."""
    seen: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for name, found in seen.items():
                found.append(
                    fresh.run(
                        f"{__spec__.name}:start",
                        {
                            "config": config,
                            "workdir": f"{folder}/{name}",
                            "cache": f"{folder}/cache",
                        },
                    )
                )
    found, rows = harness.medians(seen), []
    for name, figures in found.items():
        share = f"{figures['compile'] / found['first']['compile']:.0%}" if name == "second" else ""
        of_steps = f"{figures['steps'] / found['first']['steps']:.0%}" if name == "second" else ""
        parts = [
            f"{figures[part]:.1f} s" for part in ("trace", "lower", "compile", "steps", "seconds")
        ]
        rows.append([f"{name} start", *parts, share, of_steps])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--family", default="gemma2", choices=("gemma2", "gemma3"))
    parser.add_argument("--depths", default="4,8,16,32,62", help="at the first of the widths")
    parser.add_argument("--widths", default="128,256,512", help="at the first of the depths")
    parser.add_argument("--peer_depths", default="4,8,16", help="the peer's")
    parser.add_argument(
        "--starts",
        default="experiments/quickstart.py:smoke",
        help="config of first and second starts; '' for none",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    depths, widths, peer_depths = (
        [int(number) for number in text.split(",")]
        for text in (args.depths, args.widths, args.peer_depths)
    )
    shapes = [(depth, widths[0]) for depth in depths] + [(depths[0], width) for width in widths[1:]]
    rows, notes, by_depth = [], [], {"torch.compile (peer)": {}, "ours": {}}
    without = harness.missing("torch", "transformers")
    if without:
        notes.append(f"the peer is left out: {without}")
    for depth, width in shapes:
        settings = {"family": args.family, "depth": depth, "width": width}
        arms = [harness.Arm("ours", f"{__spec__.name}:ours", settings)]
        if not without and depth in peer_depths:
            arms.insert(
                0,
                harness.Arm(
                    "torch.compile (peer)",
                    f"{__spec__.name}:peer",
                    {**settings, "device": args.device},
                ),
            )
        for name, found in harness.medians(harness.take_turns(arms, args.repeats)).items():
            total = found["trace"] + found["compile"]
            if width == widths[0]:
                by_depth[name][depth] = total
            parts = [
                f"{found['trace']:.2f} s" if name == "ours" else "",
                f"{found['compile']:.2f} s",
                f"{total:.2f} s",
            ]
            rows.append([depth, width, name, *parts, f"{found['gib']:.1f} GiB"])
    for name, found in by_depth.items():
        if len(found) > 1:
            few, many = min(found), max(found)
            slope = np.polyfit(list(found), list(found.values()), 1)[0]
            notes.append(
                f"{name}: {many} layers take {found[many] / found[few]:.2f} x what {few} layers do; {slope * 1e3:.0f} ms a layer by least squares"
            )
    title = (
        f"{args.family}, {ROWS} x {LENGTH} tokens, training step, float32, {args.repeats} rounds"
    )
    columns = ["layers", "width", "arm", "trace and lower", "compile", "both", "peak memory"]
    harness.publish(title, columns, rows, notes, args.json)
    if args.starts:
        columns = [
            "",
            "trace",
            "lower",
            "compile",
            "all training steps",
            "whole process",
            "compile, of the first start",
            "steps, of the first start",
        ]
        title = f"\n{args.starts}, started twice with one folder of compiled programs, {args.repeats} pairs"
        file = args.json and args.json.with_name(f"{args.json.stem}_starts{args.json.suffix}")
        harness.publish(
            title, columns, starts(os.fspath(pathlib.Path(args.starts)), args.repeats), file=file
        )


if __name__ == "__main__":
    main()
