"""Compile time of a training step against depth and width, and the savings of a second start.

    python -m gemma_encoder.experiments.benchmarks.compile_time
        [--depths=4,8,16,32,62] [--widths=128,256,512] [--family=gemma2] [--starts=…]

Ours is the whole training step (forward, backward, AdamW), traced and lowered, then compiled, with
all caches cleared before each turn. The peer is transformers' model under torch.compile (Inductor,
its caches off): the first forward and backward pass minus the second. Its graph contains a simple
loss, but not the optimizer.

A second start runs the training program with the compilation cache that the first start filled. The
table shows the time of the whole process, and how much of it is tracing, lowering and compiling.
Needs the extra `bench` for the peer; without it, only ours runs.
"""

import argparse
import os
import pathlib
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import fresh, harness

ROWS = 2
LENGTH = 128
PEER = "torch.compile (peer)"
COMPILING = {  # JAX's monitoring events, and their names in the table
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
COLUMNS = ("layers", "width", "arm", "trace and lower", "compile", "both", "peak memory")
START_COLUMNS = (
    "",
    "trace",
    "lower",
    "compile",
    "all training steps",
    "whole process",
    "compile, of the first start",
    "steps, of the first start",
)


def changes(depth: int, width: int) -> dict[str, int]:
    """Returns the transformer's fields that differ from the family's tiny model."""
    return {"num_layers": depth, "embed_dim": width, "hidden_dim": 4 * width}


def transformer(family: str, depth: int, width: int):
    """Returns the config of the family's tiny model at another depth and width."""
    import dataclasses

    from gemma_encoder.model.sizes import GEMMA_CONFIGS

    return dataclasses.replace(GEMMA_CONFIGS[f"{family}_tiny"], **changes(depth, width))


def ours(family: str, depth: int, width: int) -> harness.Turn:
    """Sets up our arm."""
    import jax

    from gemma_encoder.model import sharding
    from gemma_encoder.training import recipe
    from gemma_encoder.training.build import build
    from gemma_encoder.training.step import make_program

    config = recipe.default_config()
    config.tasks = ("toy_sentiment",)
    config.model.compute_dtype = "float32"
    config.model.size = f"{family}_tiny"
    config.model.transformer = changes(depth, width)
    config.batch.rows = ROWS
    config.batch.row_length = LENGTH
    config.batch.examples_per_step = ROWS
    config.max_length = LENGTH
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
    """Sets up the arm of transformers under torch.compile."""
    import torch
    import transformers

    from gemma_encoder.model.config import EncoderConfig
    from gemma_encoder.weights.export import transformer_json

    torch._inductor.config.force_disable_caches = True
    values = transformer_json(EncoderConfig(transformer(family, depth, width)))
    config = transformers.AutoConfig.for_model(**values)
    attention = "eager" if values["attn_logit_softcapping"] else "sdpa"
    model = transformers.AutoModel.from_config(config, attn_implementation=attention).to(device)

    def run(turn: int) -> dict[str, float]:
        torch._dynamo.reset()
        compiled = torch.compile(model)
        token_ids = np.random.default_rng(turn).integers(5, 8000, (ROWS, LENGTH))
        tokens = torch.from_numpy(token_ids).to(device)
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            output = compiled(input_ids=tokens, attention_mask=torch.ones_like(tokens))
            output.last_hidden_state.float().mean().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return {"trace": 0.0, "compile": seconds[0] - seconds[1]}

    return run


def start(config: str, workdir: str, cache: str) -> dict[str, float]:
    """Runs the training program once, in this process.

    Returns the seconds of tracing, of lowering, of compiling, and of all training steps.

    Args:
        config: "file" or "file:argument" of a training config.
        workdir: workdir of the run.
        cache: folder of the compilation cache.
    """
    import importlib.util

    import jax

    from gemma_encoder.training import loop

    compiling = dict.fromkeys(COMPILING.values(), 0.0)

    def add(event: str, seconds: float, **_) -> None:
        if event in COMPILING:
            compiling[COMPILING[event]] += seconds

    jax.monitoring.register_event_duration_secs_listener(add)
    file, _, argument = config.partition(":")
    spec = importlib.util.spec_from_file_location("experiment", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    experiment = module.get_config(argument)
    experiment.compilation_cache = cache
    outcome = loop.train(experiment, workdir)
    return {**compiling, "steps": outcome.seconds}


def starts(config: str, repeats: int) -> list[list]:
    """Measures pairs of a first and a second start; returns the rows of their table.

    Figures are medians over the pairs; each pair begins with an empty folder.
    """
    results: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for name, turns in results.items():
                settings = {
                    "config": config,
                    "workdir": f"{folder}/{name}",
                    "cache": f"{folder}/cache",
                }
                turns.append(fresh.run(f"{__spec__.name}:start", settings))
    medians = harness.medians(results)
    rows = []
    for name, figures in medians.items():
        seconds = [
            f"{figures[part]:.1f} s" for part in ("trace", "lower", "compile", "steps", "seconds")
        ]
        shares = ["", ""]
        if name == "second":
            first = medians["first"]
            shares = [f"{figures[part] / first[part]:.0%}" for part in ("compile", "steps")]
        rows.append([f"{name} start", *seconds, *shares])
    return rows


def measure(args: argparse.Namespace, with_peer: bool) -> list[dict]:
    """Measures every depth at the first width, and every width at the first depth.

    Returns the median figures of each arm, with "depth", "width", "arm" and "total" seconds.
    """
    depths = harness.integers(args.depths)
    widths = harness.integers(args.widths)
    peer_depths = harness.integers(args.peer_depths)
    shapes = [(depth, widths[0]) for depth in depths] + [(depths[0], width) for width in widths[1:]]
    measured = []
    for depth, width in shapes:
        settings = {"family": args.family, "depth": depth, "width": width}
        arms = []
        if with_peer and depth in peer_depths:
            peer_settings = {**settings, "device": args.device}
            arms.append(harness.Arm(PEER, f"{__spec__.name}:peer", peer_settings))
        arms.append(harness.Arm("ours", f"{__spec__.name}:ours", settings))
        for name, figures in harness.medians(harness.take_turns(arms, args.repeats)).items():
            total = figures["trace"] + figures["compile"]
            shape = {"depth": depth, "width": width}
            measured.append({**figures, **shape, "arm": name, "total": total})
    return measured


def as_row(figures: dict) -> list:
    """Returns the row of the table for an arm's figures."""
    return [
        figures["depth"],
        figures["width"],
        figures["arm"],
        f"{figures['trace']:.2f} s" if figures["arm"] == "ours" else "",
        f"{figures['compile']:.2f} s",
        f"{figures['total']:.2f} s",
        f"{figures['gib']:.1f} GiB",
    ]


def growth(arm: str, totals: dict[int, float]) -> str:
    """Returns the note on how an arm's compile time grows with depth.

    Args:
        arm: name of the arm.
        totals: seconds by depth; at least two depths.
    """
    fewest = min(totals)
    most = max(totals)
    slope = np.polyfit(list(totals), list(totals.values()), 1)[0]
    return (
        f"{arm}: {most} layers take {totals[most] / totals[fewest]:.2f} x what {fewest} layers do; "
        f"{slope * 1e3:.0f} ms a layer by least squares"
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--family", default="gemma2", choices=("gemma2", "gemma3"))
    parser.add_argument("--depths", default="4,8,16,32,62", help="layers, at the first width")
    parser.add_argument("--widths", default="128,256,512", help="widths, at the first depth")
    parser.add_argument("--peer_depths", default="4,8,16", help="depths at which the peer runs")
    parser.add_argument(
        "--starts",
        default="experiments/quickstart.py:smoke",
        help="config of the first and second starts; '' for none",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    args = parse_arguments(argv)
    reason = harness.missing("torch", "transformers")
    notes = [f"the peer is left out: {reason}"] if reason else []
    measured = measure(args, with_peer=not reason)
    for arm in (PEER, "ours"):
        totals = {
            figures["depth"]: figures["total"]
            for figures in measured
            if figures["arm"] == arm and figures["width"] == measured[0]["width"]
        }
        if len(totals) > 1:
            notes.append(growth(arm, totals))
    title = (
        f"{args.family}, {ROWS} x {LENGTH} tokens, training step, float32, {args.repeats} rounds"
    )
    harness.publish(title, COLUMNS, [as_row(figures) for figures in measured], notes, args.json)
    if args.starts:
        title = (
            f"\n{args.starts}, started twice with one folder of compiled programs, "
            f"{args.repeats} pairs"
        )
        rows = starts(os.fspath(pathlib.Path(args.starts)), args.repeats)
        file = args.json and args.json.with_name(f"{args.json.stem}_starts{args.json.suffix}")
        harness.publish(title, START_COLUMNS, rows, file=file)


if __name__ == "__main__":
    main()
