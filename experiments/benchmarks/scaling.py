"""What more devices cost: CPU devices of one machine at fixed work a device, and the planner's weak scaling for TPU chips.

    python -m gemma_encoder.experiments.benchmarks.scaling devices [--devices=1,2,4,8] [--rows=8]
    python -m gemma_encoder.experiments.benchmarks.scaling planner [--size=gemma2_2b] [--chips=16,64,256,1024] [--rows=8] [--length=512]

`devices`: the training step of n XLA devices on n times the rows, a process for each n. All share the machine's cores, so beyond them
nothing can be won; what is told is the overhead of cutting the work up: time(n devices, n x rows) / (n x time(1 device, rows)), 1.00 where it
costs nothing. `data` copies parameters, `fsdp` cuts them up. No peer: what a user would pick instead needs a process a device.

`planner`: compiles the very step for each topology by `gemma-encoder plan` (no TPU is needed; minutes and gigabytes each, one after another) and
takes, at fixed rows a chip, the roofline's time of a step: efficiency is time(first) / time(n). Once with compute, memory and links wholly
overlapped (the longest counts), once with links not overlapped at all (added to the longer of compute and memory); the truth lies
between. Peaks and links: launch/chips.py. More than 256 chips of v5e are slices of 256, which share the data axis over the data-centre network.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import harness

SLICES = {
    16: ("v5e:4x4", 1),
    32: ("v5e:4x8", 1),
    64: ("v5e:8x8", 1),
    128: ("v5e:8x16", 1),
    256: ("v5e:16x16", 1),
}
MOST = 256  # chips of a v5e slice


def ours(devices: int, **settings) -> harness.Turn:
    """Our arm, in a process that has so many devices."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    return training_step(devices, **settings)


def training_step(devices: int, rows: int, size: str, length: int, axis: str) -> harness.Turn:
    """A training step on so many of this process's devices."""
    import jax

    from gemma_encoder.inputs.batch import BatchShape, empty_batch
    from gemma_encoder.model import sharding
    from gemma_encoder.training import recipe
    from gemma_encoder.training.build import build
    from gemma_encoder.training.state import initial_state
    from gemma_encoder.training.step import make_program

    config = recipe.default_config()
    config.tasks, config.model.size = ("toy_sentiment",), size
    config.model.compute_dtype, config.model.feed_forward_dropout = "float32", 0.0
    config.batch.rows, config.batch.row_length, config.batch.segments, config.max_length = (
        devices * rows,
        length,
        1,
        length,
    )
    config.batch.examples_per_step = devices * rows
    built = build(config, dry=True)
    mesh = sharding.make_mesh(
        {"data": (devices, 1, 1), "fsdp": (1, devices, 1)}[axis], jax.devices()[:devices]
    )
    program = make_program(built, mesh, total=1_000_000, warmup=0)
    held = [initial_state(built.encoder, program.optimizer, mesh, 0)]
    blank = empty_batch(BatchShape(devices * rows, length))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), blank.tokens.shape)

    def run(turn: int) -> dict[str, float]:
        rng = np.random.default_rng(turn)
        tokens = np.tile(
            rng.integers(5, 8000, (rows, length)).astype(np.int32), (devices, 1)
        )  # every device's work is the same
        labels = np.tile(rng.integers(0, 2, (rows, 1)).astype(np.float32), (devices, 1))
        weight = np.ones((devices * rows, 1), np.float32)
        batch = program.shard(
            blank._replace(
                tokens=tokens,
                segment_ids=np.ones_like(tokens),
                positions=positions,
                label=labels,
                weight=weight,
            )
        )
        began = time.perf_counter()
        held[0], metrics = program.step(held[0], batch)
        loss = float(metrics.loss)
        return {"seconds": time.perf_counter() - began, "loss": loss}

    return run


def on_devices(args: argparse.Namespace) -> None:
    """Measures CPU devices."""
    counts, rows, notes = [int(text) for text in args.devices.split(",")], [], []
    for axis in ("data", "fsdp"):
        shared = {
            "rows": args.rows,
            "size": args.size or "gemma3_tiny",
            "length": args.length or 128,
            "axis": axis,
        }
        arms = [
            harness.Arm(f"{count} {axis}", f"{__spec__.name}:ours", {**shared, "devices": count})
            for count in counts
        ]
        seen = harness.take_turns(arms, args.repeats)
        # The mean over rows is the same on any number of devices, since each has the same rows; so are the parameters that follow from it.
        notes.append(
            f"{axis}: losses differ by at most {harness.same(axis, seen, 'loss', 1e-3):.1e}"
        )
        for arm, found in zip(arms, harness.medians(seen).values(), strict=True):
            count = arm.settings["devices"]
            overhead = harness.ratio(seen, arms[0].name, arm.name) * counts[0] / count
            rows.append(
                [
                    axis,
                    count,
                    count * args.rows,
                    f"{found['seconds'] * 1e3:.0f} ms",
                    f"{overhead:.2f}",
                    f"{found['gib']:.1f} GiB",
                    f"{found['spread']:.0%}",
                ]
            )
    columns = [
        "axis",
        "devices",
        "rows",
        "step",
        f"time / (work x time of {counts[0]})",
        "peak memory",
        "spread",
    ]
    title = f"{args.size or 'gemma3_tiny'}, {args.rows} rows of {args.length or 128} tokens a device, float32, training step, {args.repeats} rounds"
    harness.publish(title, columns, rows, notes, args.json)


def command(size: str, chips: int, rows: int, length: int, file: str) -> list[str]:
    """The planner's arguments for so many chips with `rows` rows each; parameters are cut up within a slice and copied between slices."""
    if chips not in SLICES and chips % MOST:
        raise SystemExit(
            f"--chips: {', '.join(map(str, SLICES))} or a multiple of {MOST}, got {chips}"
        )
    topology, slices = SLICES.get(chips) or (SLICES[MOST][0], chips // MOST)
    shape = [
        f"--config.batch.rows={chips * rows}",
        f"--config.batch.row_length={length}",
        f"--config.max_length={length}",
    ]
    return [
        f"--config=msmarco:size={size}",
        f"--topology={topology}",
        f"--slices={slices}",
        f"--config.mesh=({slices},-1,1)",
        *shape,
        f"--json={file}",
    ]


def efficiency(plans: list[dict]) -> list[list]:
    """A row of the table for each plan, the first being what the others are compared with."""

    def apart(plan: dict) -> float:
        return max(plan["seconds_compute"], plan["seconds_memory"]) + plan["seconds_links"]

    rows = []
    for plan in plans:
        sent = sum(one["traffic"] for one in plan["collectives"]) / 2**30
        parts = [
            f"{plan[part] * 1e3:.0f} ms"
            for part in ("seconds_compute", "seconds_memory", "seconds_links")
        ]
        slices = (
            f"{plan['slices']} x {plan['topology']}" if plan["slices"] > 1 else plan["topology"]
        )
        fits = f"{plan['peak'] / 2**30:.1f} of {plan['memory'] / 2**30:.0f} GiB{'' if plan['fits'] else ', does not fit'}"
        shares = [
            f"{plans[0]['seconds'] / plan['seconds']:.1%}",
            f"{apart(plans[0]) / apart(plan):.1%}",
        ]
        rows.append(
            [
                plan["chips"],
                slices,
                " x ".join(map(str, plan["mesh"])),
                plan["rows"],
                *parts,
                f"{sent:.2f} GiB",
                *shares,
                fits,
            ]
        )
    return rows


def by_planner(args: argparse.Namespace) -> None:
    """Plans TPU chips."""
    plans, size, length = [], args.size or "gemma2_2b", args.length or 512
    for chips in (int(text) for text in args.chips.split(",")):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "gemma_encoder",
                    "plan",
                    *command(size, chips, args.rows, length, file.name),
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode not in (0, 1):  # 1: it does not fit, which the figures say too
                raise SystemExit(f"{chips} chips: {done.stdout[-500:]}{done.stderr[-1000:]}")
            plans.append(json.loads(pathlib.Path(file.name).read_text()))
        print(f"{chips} chips: planned", file=sys.stderr, flush=True)
    columns = [
        "chips",
        "topology",
        "data x fsdp x tensor",
        "rows",
        "compute",
        "memory",
        "links",
        "sent by a chip",
    ]
    columns += [
        "efficiency, links overlapped",
        "efficiency, links not overlapped",
        "peak of a chip",
    ]
    title = f"{size}, {args.rows} rows of {length} tokens a chip, training step, remat {plans[0]['remat']}, from the compiled programs; published peaks"
    harness.publish(title, columns, efficiency(plans), (), args.json)


def main(argv: list[str] | None = None) -> None:
    """Measures or plans, and prints."""
    parser = harness.parser(__doc__)
    parser.add_argument("what", choices=("devices", "planner"))
    parser.add_argument("--size", help="gemma3_tiny for devices, gemma2_2b for the planner")
    parser.add_argument("--devices", default="1,2,4,8", help="devices: how many")
    parser.add_argument("--chips", default="16,64,256,1024", help="planner: how many")
    parser.add_argument("--rows", type=int, default=8, help="of a device or chip")
    parser.add_argument(
        "--length", type=int, help="tokens of a row: 128 for devices, 512 for the planner"
    )
    args = parser.parse_args(argv)
    (on_devices if args.what == "devices" else by_planner)(args)


if __name__ == "__main__":
    main()
