"""Kills a training run at random moments, again and again, and compares what it leaves with a run that nothing happened to.

    python -m gemma_encoder.experiments.benchmarks.kills --kills=30 --folder=/tmp/kills

The run trains a mixture with packing and dropout and saves every few steps, so that kills also fall into saves. Each kill is SIGKILL, at
a moment drawn between the first step of a start and the time in which all steps would be done; what counts is that every start of the
same command finds a whole checkpoint, or begins anew, and that in the end losses and parameters are equal to the bit.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np

from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.weights import native

FIELDS = {
    "train_for": "240 steps",
    "checkpoint_every": "3 steps",
    "log_every": "1 steps",
    "evaluate_every": "120 steps",
    "model.attention_dropout": "0.1",
}


def command(workdir: pathlib.Path) -> list[str]:
    """The run."""
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    return [
        sys.executable,
        "-m",
        "gemma_encoder",
        "train",
        "--config=quickstart:smoke",
        *fields,
        f"--workdir={workdir}",
    ]


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    """Step and loss of every training line."""
    return [
        (line["step"], line["loss"]) for line in read_metrics(workdir) if line["split"] == "train"
    ]


def killed(workdir: pathlib.Path, seconds: float, log) -> tuple[bool, int, int, bool]:
    """Starts the run and kills it `seconds` after its first new step: whether it was killed, first and last step, and whether a save was under way."""
    before = len(losses(workdir))
    process = subprocess.Popen(command(workdir), stdout=log, stderr=log)
    while process.poll() is None and len(losses(workdir)) <= before:
        before = min(before, len(losses(workdir)))  # lines past the restored step are dropped
        time.sleep(0.02)
    first = losses(workdir)[-1][0] if losses(workdir) else 0
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if process.poll() is not None:
        if process.returncode:
            raise SystemExit(f"a start failed with exit code {process.returncode}; see the log")
        return False, first, losses(workdir)[-1][0], False
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    saving = any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))
    return True, first, losses(workdir)[-1][0], saving


def main() -> None:
    """Runs, kills, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument(
        "--folder", type=pathlib.Path, required=True, help="an empty or absent folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    rng = random.Random(args.seed)
    with (args.folder / "log").open("w") as log:
        began = time.monotonic()
        subprocess.run(command(args.folder / "straight"), stdout=log, stderr=log, check=True)
        print(f"the run that nothing happens to: {time.monotonic() - began:.0f} s", flush=True)
        kills, in_saves, lost = 0, 0, 0
        while True:
            # Short, so that the run is not over before the last kill; once all kills are done, as long as it takes.
            seconds = rng.uniform(0, 2.5) if kills < args.kills else 3600.0
            was_killed, first, last, saving = killed(args.folder / "killed", seconds, log)
            if not was_killed:
                break
            kills, in_saves = kills + 1, in_saves + saving
            kept = native.checkpoint_steps(args.folder / "killed")
            lost += last - (kept[-1] if kept else 0)
            print(
                f"kill {kills}: from step {first} to {last}, newest whole checkpoint {kept[-1] if kept else None}{', in a save' if saving else ''}",
                flush=True,
            )
    straight, found = (native.find(args.folder / name) for name in ("straight", "killed"))
    encoder = native.load_inference_spec(straight).encoder
    one, other = (native.load_parameters(path, encoder) for path in (straight, found))
    import jax

    equal = jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), one, other))
    result = {
        "kills": kills,
        "in_saves": in_saves,
        "steps_done_again": lost,
        "losses_equal": losses(args.folder / "straight") == losses(args.folder / "killed"),
        "parameters_equal": equal,
    }
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    sys.exit(0 if result["losses_equal"] and equal and kills >= args.kills else 1)


if __name__ == "__main__":
    main()
