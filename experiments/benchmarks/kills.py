"""Kills a run at random moments and compares its result with that of an undisturbed run.

    python -m gemma_encoder.experiments.benchmarks.kills --kills=30 --folder=/tmp/kills
    python -m gemma_encoder.experiments.benchmarks.kills --predict --kills=20 --folder=/tmp/kills

The run trains a mixture with packing and dropout and saves every few steps, so that some kills hit
saves. Each kill is a SIGKILL at a random moment between the first step of a start and the time in
which all steps would be done. Every rerun must restore a complete checkpoint or start
from scratch, and in the end losses and parameters must be equal to the bit.

With --predict, the run is the prediction of a file. After each kill, it is started with another
model of the same step, which must be refused; in the end, its output must be equal to the byte.
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
from collections.abc import Mapping
from typing import IO, NamedTuple, NoReturn

import numpy as np

from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.weights import native
from gemma_encoder.whole_files import write_whole

FIELDS = {
    "train_for": "240 steps",
    "checkpoint_every": "3 steps",
    "log_every": "1 steps",
    "evaluate_every": "120 steps",
    "model.attention_dropout": "0.1",
}


class Start(NamedTuple):
    """The outcome of one start of the run.

    Attributes:
        was_killed: False if the run finished before it could be killed.
        first, last: the first and the last step that it logged.
        in_save: whether it was killed while a checkpoint was being written.
    """

    was_killed: bool
    first: int
    last: int
    in_save: bool = False


TEXTS = 80_000  # of the predicted file
PROGRAM = [sys.executable, "-m", "gemma_encoder"]


def command(workdir: pathlib.Path, **changes: object) -> list[str]:
    """Returns the command line of the run."""
    fields = [f"--config.{name}={value}" for name, value in (FIELDS | changes).items()]
    return [
        *PROGRAM,
        "train",
        "--config=quickstart:smoke",
        *fields,
        f"--workdir={workdir}",
    ]


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    """Returns the step and the loss of every training line in the log."""
    return [
        (line["step"], line["loss"]) for line in read_metrics(workdir) if line["split"] == "train"
    ]


def killed(workdir: pathlib.Path, seconds: float, log: IO[str]) -> Start:
    """Starts the run and kills it `seconds` after its first new step.

    Raises:
        SystemExit: the run failed by itself.
    """
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
            raise SystemExit(f"the run failed with exit code {process.returncode}; see the log")
        return Start(False, first, losses(workdir)[-1][0])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    in_save = any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))
    return Start(True, first, losses(workdir)[-1][0], in_save)


def kill_repeatedly(workdir: pathlib.Path, kills: int, seed: int, log: IO[str]) -> dict[str, int]:
    """Kills the run up to `kills` times and lets it finish.

    Returns the number of kills, of kills in saves, and of steps that had to be repeated.
    """
    rng = random.Random(seed)
    counts = {"kills": 0, "in_saves": 0, "steps_done_again": 0}
    while True:
        # Short, so that the run does not finish before the last kill; afterwards as long as needed.
        seconds = rng.uniform(0, 2.5) if counts["kills"] < kills else 3600.0
        start = killed(workdir, seconds, log)
        if not start.was_killed:
            return counts
        steps = native.checkpoint_steps(workdir)
        newest = steps[-1] if steps else None
        counts["kills"] += 1
        counts["in_saves"] += start.in_save
        counts["steps_done_again"] += start.last - (newest or 0)
        print(
            f"kill {counts['kills']}: from step {start.first} to {start.last}, "
            f"newest complete checkpoint {newest}{', in a save' if start.in_save else ''}",
            flush=True,
        )


def equal_parameters(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Returns True if the last checkpoints of two runs hold the same parameters, to the bit."""
    checkpoints = [native.find(workdir) for workdir in (first, second)]
    encoder = native.load_inference_spec(checkpoints[0]).encoder
    trees = [native.load_parameters(checkpoint, encoder) for checkpoint in checkpoints]
    import jax

    return jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), *trees))


class FilePrediction:
    """The prediction of a file by one of two models, which is killed.

    Args:
        folder: a folder, to which the models and the texts are written.
        log: receives the output of the programs.
    """

    def __init__(self, folder: pathlib.Path, log: IO[str]):
        self._log = log
        self._texts = folder / "texts.txt"
        self._output = folder / "killed.jsonl"
        self._straight = folder / "straight.jsonl"
        self._part = folder / "killed.jsonl.part"
        self._models = [folder / f"model_{seed}" for seed in range(2)]
        for seed, model in enumerate(self._models):
            short = {"train_for": "6 steps", "evaluate_every": "0 steps", "tasks": "toy_sentiment"}
            subprocess.run(command(model, seed=seed, **short), stdout=log, stderr=log, check=True)
        words = ("good", "dull", "very", "long", "plot", "cast", "the", "an", "end", "was")
        lines = (" ".join(words[int(digit)] for digit in str(index)) for index in range(TEXTS))
        write_whole(self._texts, "".join(f"{line} .\n" for line in lines))

    def command(self, model: int, output: pathlib.Path) -> list[str]:
        """Returns the command line of a prediction."""
        files = [f"--workdir={self._models[model]}", f"--input={self._texts}"]
        return [*PROGRAM, "predict", *files, f"--output={output}"]

    def run_straight(self) -> float:
        """Predicts without a kill and returns the seconds that it took."""
        began = time.monotonic()
        subprocess.run(
            self.command(0, self._straight), stdout=self._log, stderr=self._log, check=True
        )
        return time.monotonic() - began

    def done(self) -> int:
        """Returns the number of texts that are committed."""
        state = self._part.with_name(f"{self._part.name}.json")
        return json.loads(state.read_text())["progress"]["rows"] if state.exists() else 0

    def killed(self, seconds: float) -> bool:
        """Starts and kills it, at the earliest after the first commit; False if it has ended."""
        process = subprocess.Popen(
            self.command(0, self._output), stdout=self._log, stderr=self._log
        )
        deadline = time.monotonic() + seconds
        while process.poll() is None and (time.monotonic() < deadline or not self.done()):
            time.sleep(0.005)
        if process.poll() is not None:
            return False
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return True

    def is_refused(self) -> bool:
        """Returns True if the other model is refused in one line and leaves everything as it is."""
        before = self._part.read_bytes(), self.done()
        other = subprocess.run(
            self.command(1, self._output), capture_output=True, text=True, check=False
        )
        is_told = "was left by another command (checkpoint: " in other.stderr.splitlines()[-1]
        return (
            other.returncode == 2 and is_told and before == (self._part.read_bytes(), self.done())
        )

    def kill_repeatedly(self, kills: int, seed: int) -> dict[str, int | bool]:
        """Kills it and starts it with another model in between, then lets it finish."""
        limit = self.run_straight()
        print(f"the undisturbed prediction: {limit:.0f} s", flush=True)
        rng = random.Random(seed)
        counts = {"kills": 0, "refused": 0}
        while counts["kills"] < kills and self.killed(rng.uniform(0, limit / 6)):
            counts["kills"] += 1
            counts["refused"] += self.is_refused()
            print(f"kill {counts['kills']}: {self.done()} texts are done", flush=True)
        while self.killed(3600.0):
            pass
        return {**counts, "equal": self._output.read_bytes() == self._straight.read_bytes()}


def main() -> None:
    """Runs, kills, compares and prints; exits with code 1 if the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a folder to create")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    parser.add_argument("--predict", action="store_true", help="kill the prediction of a file")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    if args.predict:
        with (args.folder / "log").open("w") as log:
            result = FilePrediction(args.folder, log).kill_repeatedly(args.kills, args.seed)
        _end(result, args.json, result["equal"] and result["refused"] == args.kills)
    straight = args.folder / "straight"
    interrupted = args.folder / "killed"
    with (args.folder / "log").open("w") as log:
        began = time.monotonic()
        subprocess.run(command(straight), stdout=log, stderr=log, check=True)
        print(f"the undisturbed run: {time.monotonic() - began:.0f} s", flush=True)
        counts = kill_repeatedly(interrupted, args.kills, args.seed, log)
    result = {
        **counts,
        "losses_equal": losses(straight) == losses(interrupted),
        "parameters_equal": equal_parameters(straight, interrupted),
    }
    equal = result["losses_equal"] and result["parameters_equal"]
    _end(result, args.json, equal and result["kills"] >= args.kills)


def _end(result: Mapping[str, int | bool], file: pathlib.Path | None, is_right: bool) -> NoReturn:
    """Prints and writes the figures; exits with code 1 if they are not right."""
    print(to_json(result))
    if file:
        write_whole(file, to_json(result, indent=1))
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
