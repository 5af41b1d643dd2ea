"""Scaling: CPU devices of one machine, and planned weak scaling on TPU chips.

    python -m gemma_encoder.experiments.benchmarks.scaling devices [--devices=1,2,4,8] [--rows=8]
    python -m gemma_encoder.experiments.benchmarks.scaling planner
        [--size=gemma2_2b] [--chips=16,64,256,1024] [--rows=8] [--length=512]

`devices` runs the training step of n XLA devices on n times the rows, in a process for each n. All
devices share the machine's cores, so more devices than cores cannot help; the figure is the
overhead of partitioning the work: time(n devices, n x rows) / (n x time(1 device, rows)), 1.00 for
none.
`data` replicates parameters, `fsdp` shards them. There is no peer: the alternatives need a process
per device.

`planner` compiles the same step for each topology with `gemma-encoder plan` (no TPU is needed;
minutes and gigabytes each, one after another) and takes the roofline time of a step at fixed rows
per chip: efficiency is time(first) / time(n). It is given twice: with compute, memory and links
fully overlapped (the longest counts), and with links not overlapped at all (added to the longer of
compute and memory). The real efficiency is in between. Peaks and links are in launch/chips.py. More
than 256 chips of v5e are slices of 256, which share the data axis over the data-center network.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import harness, models

SLICES = {
    16: ("v5e:4x4", 1),
    32: ("v5e:4x8", 1),
    64: ("v5e:8x8", 1),
    128: ("v5e:8x16", 1),
    256: ("v5e:16x16", 1),
}
MOST = 256  # chips of a v5e slice
PLAN_COLUMNS = (
    "chips",
    "topology",
    "data x fsdp x tensor",
    "rows",
    "compute",
    "memory",
    "links",
    "sent by a chip",
    "efficiency, links overlapped",
    "efficiency, links not overlapped",
    "peak of a chip",
)


def ours(devices: int, **settings) -> harness.Turn:
    """Sets up our arm in a process with `devices` CPU devices."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    return training_step(devices, **settings)


def training_step(devices: int, rows: int, size: str, length: int, axis: str) -> harness.Turn:
    """Sets up a training step on the first devices of this process.

    Args:
        devices: number of devices to use.
        rows: rows of a batch, per device.
        size: size of the model.
        length: tokens of a row.
        axis: mesh axis that has the devices, "data" or "fsdp".
    """
    import jax

    from gemma_encoder.model import sharding
    from gemma_encoder.training import recipe
    from gemma_encoder.training.build import build
    from gemma_encoder.training.state import initial_state
    from gemma_encoder.training.step import make_program

    config = recipe.default_config()
    config.tasks = ("toy_sentiment",)
    config.model.size = size
    config.model.compute_dtype = "float32"
    config.model.feed_forward_dropout = 0.0
    config.batch.rows = devices * rows
    config.batch.row_length = length
    config.batch.segments = 1
    config.batch.examples_per_step = devices * rows
    config.max_length = length
    built = build(config, dry=True)
    mesh_shape = {"data": (devices, 1, 1), "fsdp": (1, devices, 1)}[axis]
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[:devices])
    program = make_program(built, mesh, total=1_000_000, warmup=0)
    state = initial_state(built.encoder, program.optimizer, mesh, 0)

    def run(turn: int) -> dict[str, float]:
        nonlocal state
        rng = np.random.default_rng(turn)
        tokens = rng.integers(5, 8000, (rows, length)).astype(np.int32)
        labels = rng.integers(0, 2, rows)
        # Every device gets the same rows.
        host_batch = models.full_batch(np.tile(tokens, (devices, 1)), np.tile(labels, devices))
        batch = program.shard(host_batch)
        began = time.perf_counter()
        state, metrics = program.step(state, batch)
        loss = float(metrics.loss)
        return {"seconds": time.perf_counter() - began, "loss": loss}

    return run


def on_devices(args: argparse.Namespace) -> None:
    """Measures CPU devices and prints the table."""
    size = args.size or "gemma3_tiny"
    length = args.length or 128
    counts = harness.integers(args.devices)
    rows = []
    notes = []
    for axis in ("data", "fsdp"):
        shared = {"rows": args.rows, "size": size, "length": length, "axis": axis}
        arms = [
            harness.Arm(f"{count} {axis}", f"{__spec__.name}:ours", {**shared, "devices": count})
            for count in counts
        ]
        results = harness.take_turns(arms, args.repeats)
        # Each device has the same rows, so losses and updates do not depend on their number.
        difference = harness.same(axis, results, "loss", 1e-3)
        notes.append(f"{axis}: losses differ by at most {difference:.1e}")
        medians = harness.medians(results)
        for arm in arms:
            figures = medians[arm.name]
            count = arm.settings["devices"]
            overhead = harness.ratio(results, arms[0].name, arm.name) * counts[0] / count
            row = [
                axis,
                count,
                count * args.rows,
                f"{figures['seconds'] * 1e3:.0f} ms",
                f"{overhead:.2f}",
                f"{figures['gib']:.1f} GiB",
                f"{figures['spread']:.0%}",
            ]
            rows.append(row)
    columns = [
        "axis",
        "devices",
        "rows",
        "step",
        f"time / (work x time of {counts[0]})",
        "peak memory",
        "spread",
    ]
    title = (
        f"{size}, {args.rows} rows of {length} tokens a device, float32, training step, "
        f"{args.repeats} rounds"
    )
    harness.publish(title, columns, rows, notes, args.json)


def command(size: str, chips: int, rows: int, length: int, file: str) -> list[str]:
    """Returns the planner's arguments for a number of chips with `rows` rows each.

    Parameters are sharded within a slice and replicated between slices.

    Raises:
        SystemExit: no topology has that number of chips.
    """
    if chips not in SLICES and chips % MOST:
        raise SystemExit(
            f"--chips: {', '.join(map(str, SLICES))} or a multiple of {MOST}, got {chips}"
        )
    topology, slices = SLICES.get(chips) or (SLICES[MOST][0], chips // MOST)
    return [
        f"--config=msmarco:size={size}",
        f"--topology={topology}",
        f"--slices={slices}",
        f"--config.mesh=({slices},-1,1)",
        f"--config.batch.rows={chips * rows}",
        f"--config.batch.row_length={length}",
        f"--config.max_length={length}",
        f"--json={file}",
    ]


def efficiency(plans: list[dict]) -> list[list]:
    """Returns a row of `PLAN_COLUMNS` for each plan; efficiencies are relative to the first."""

    def without_overlap(plan: dict) -> float:
        return max(plan["seconds_compute"], plan["seconds_memory"]) + plan["seconds_links"]

    first = plans[0]
    rows = []
    for plan in plans:
        topology = plan["topology"]
        sent = sum(collective["traffic"] for collective in plan["collectives"])
        peak = f"{plan['peak'] / 2**30:.1f} of {plan['memory'] / 2**30:.0f} GiB"
        row = [
            plan["chips"],
            f"{plan['slices']} x {topology}" if plan["slices"] > 1 else topology,
            " x ".join(map(str, plan["mesh"])),
            plan["rows"],
            f"{plan['seconds_compute'] * 1e3:.0f} ms",
            f"{plan['seconds_memory'] * 1e3:.0f} ms",
            f"{plan['seconds_links'] * 1e3:.0f} ms",
            f"{sent / 2**30:.2f} GiB",
            f"{first['seconds'] / plan['seconds']:.1%}",
            f"{without_overlap(first) / without_overlap(plan):.1%}",
            peak if plan["fits"] else f"{peak}, does not fit",
        ]
        rows.append(row)
    return rows


def by_planner(args: argparse.Namespace) -> None:
    """Plans TPU chips and prints the table."""
    size = args.size or "gemma2_2b"
    length = args.length or 512
    plans = []
    for chips in harness.integers(args.chips):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            arguments = command(size, chips, args.rows, length, file.name)
            done = subprocess.run(
                [sys.executable, "-m", "gemma_encoder", "plan", *arguments],
                capture_output=True,
                text=True,
            )
            if done.returncode not in (0, 1):  # 1: it does not fit, as the figures show, too
                raise SystemExit(f"{chips} chips: {done.stdout[-500:]}{done.stderr[-1000:]}")
            plans.append(json.loads(pathlib.Path(file.name).read_text()))
        print(f"{chips} chips: planned", file=sys.stderr, flush=True)
    title = (
        f"{size}, {args.rows} rows of {length} tokens a chip, training step, "
        f"remat {plans[0]['remat']}, from the compiled programs; published peaks"
    )
    harness.publish(title, PLAN_COLUMNS, efficiency(plans), (), args.json)


def main(argv: list[str] | None = None) -> None:
    """Measures or plans, and prints."""
    parser = harness.parser(__doc__)
    parser.add_argument("mode", choices=("devices", "planner"))
    parser.add_argument("--size", help="gemma3_tiny for devices, gemma2_2b for the planner")
    parser.add_argument("--devices", default="1,2,4,8", help="devices: numbers of devices")
    parser.add_argument("--chips", default="16,64,256,1024", help="planner: numbers of chips")
    parser.add_argument("--rows", type=int, default=8, help="rows per device or chip")
    parser.add_argument(
        "--length", type=int, help="tokens of a row: 128 for devices, 512 for the planner"
    )
    args = parser.parse_args(argv)
    if args.mode == "devices":
        on_devices(args)
    else:
        by_planner(args)


if __name__ == "__main__":
    main()
