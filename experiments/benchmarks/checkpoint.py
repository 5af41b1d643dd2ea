"""Checkpoints: how long a save stalls training, its time to disk, and the time of a restore.

    python -m gemma_encoder.experiments.benchmarks.checkpoint
        [--size=gemma3_270m] [--folder=DIR] [--device=cpu] [--background]

A turn is a few training steps, a save of parameters and both moments, as many steps again, and a
restore. The stall is the time until `save` returns, plus the time by which the steps after it are
slower than those before.

Ours saves as the training loop does: in the background, except on a CPU. The peer does what Trainer
and accelerate do: torch.save of the model's and the optimizer's state, while training waits. Files
go to `--folder` (by default the system's temporary folder), and in both arms to the page cache
first. Needs the extra `bench`; without it, only ours runs.
"""

import argparse
import dataclasses
import itertools
import pathlib
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from gemma_encoder.experiments.benchmarks import harness, models

ROWS = 4
LENGTH = 128
DATA = {"reader": b"the state of a reader stands here"}  # a few megabytes in a real run
COLUMNS = (
    "arm",
    "step",
    "save blocks",
    "step after it",
    "stall in all",
    "on disk after",
    "restore",
    "size",
    "peak memory",
    "stall, against the peer",
)


def timed(work: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def size_of(path: pathlib.Path) -> int:
    """Returns the bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def figures(
    step: Callable[[], float],
    steps: int,
    save: Callable[[], Callable[[], float]],
    restore: Callable[[], object],
    path: pathlib.Path,
) -> dict:
    """Measures a turn.

    Args:
        step: takes one training step and returns its seconds.
        steps: the number of steps before the save, and after it.
        save: starts saving; returns a function that waits until the checkpoint is on disk and
            returns the seconds that this took from the start of the save.
        restore: reads the checkpoint.
        path: file or folder of the checkpoint.
    """
    before = [step() for _ in range(steps)]
    began = time.perf_counter()
    finish = save()
    blocked = time.perf_counter() - began
    after = [step() for _ in range(steps)]
    on_disk = finish()
    usual = statistics.median(before)
    stall = blocked + sum(max(seconds - usual, 0.0) for seconds in after)
    return {
        "step": usual,
        "step_while": statistics.median(after),
        "blocked": blocked,
        "stall": stall,
        "on_disk": on_disk,
        "bytes": size_of(path),
        "restore": timed(restore),
    }


def steps_of(turn: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields token ids [B, L] and labels [B] of the steps of a turn."""
    for step in itertools.count():
        rng = np.random.default_rng((turn, step))
        tokens = rng.integers(5, 8000, (ROWS, LENGTH)).astype(np.int32)
        labels = rng.integers(0, 2, ROWS)
        yield tokens, labels


class OurTraining:
    """Our training program and its state, with the checkpoints of one turn after another.

    Args:
        model: the export that training starts from.
        folder: folder for the checkpoints.
        dtype: dtype of activations.
        background: whether checkpoints are written in the background; None for the default.
    """

    def __init__(
        self, model: pathlib.Path, folder: pathlib.Path, dtype: str, background: bool | None
    ):
        from gemma_encoder.weights.backbone import open_checkpoint

        self.folder = folder
        self.background = background
        self.program, self.state = models.our_program(model, ROWS, LENGTH, 1, ROWS, dtype)
        self.spec = open_checkpoint(model).inference_spec()

    def start_turn(self, turn: int) -> None:
        """Prepares an empty checkpoint folder and the batches of a turn."""
        from gemma_encoder.training.checkpoint import Checkpoints

        self.turn = turn
        self.target = self.folder / str(turn)
        self.checkpoints = Checkpoints(self.target, background=self.background)
        self.batches = steps_of(turn)

    def step(self) -> float:
        """Takes a training step; returns its seconds, the transfer of its batch included."""
        batch = models.full_batch(*next(self.batches))

        def work() -> None:
            self.state, metrics = self.program.step(self.state, self.program.shard(batch))
            float(metrics.loss)

        return timed(work)

    def save(self) -> Callable[[], float]:
        """Starts saving, as `figures` expects it."""
        import jax

        began = time.perf_counter()
        ended = []
        self.saved_step = int(self.state.step)
        spec = dataclasses.replace(self.spec, step=self.saved_step)
        self.checkpoints.save(self.state, spec, DATA, {})
        heads = self.state.parameters["heads"]
        self.saved_heads = jax.tree.map(lambda leaf: np.asarray(leaf[..., :2]), heads)

        def wait() -> None:
            self.checkpoints.wait()
            ended.append(time.perf_counter() - began)

        thread = threading.Thread(target=wait)
        thread.start()

        def finish() -> float:
            thread.join()
            return ended[0]

        return finish

    def restore(self) -> None:
        """Restores the checkpoint and checks that it holds the saved values."""
        import jax

        restored, _ = self.checkpoints.restore(self.saved_step, self.program.abstract, list(DATA))
        jax.block_until_ready(restored)
        saved = jax.tree.leaves(self.saved_heads)
        heads = jax.tree.leaves(restored.parameters["heads"])
        for expected, actual in zip(saved, heads, strict=True):
            np.testing.assert_array_equal(expected, np.asarray(actual[..., :2]))

    def end_turn(self) -> None:
        """Removes the checkpoints of the turn."""
        self.checkpoints.close()
        shutil.rmtree(self.target, ignore_errors=True)


def ours(
    model: pathlib.Path, folder: pathlib.Path, steps: int, dtype: str, background: bool | None
) -> harness.Turn:
    """Sets up our arm."""
    training = OurTraining(model, folder, dtype, background)

    def run(turn: int) -> dict[str, float]:
        training.start_turn(turn)
        try:
            return figures(training.step, steps, training.save, training.restore, training.target)
        finally:
            training.end_turn()

    return run


def peer(
    model: pathlib.Path, folder: pathlib.Path, steps: int, dtype: str, device: str
) -> harness.Turn:
    """Sets up PyTorch's arm."""
    import torch

    encoder = models.TorchEncoder(model, device, dtype)
    mask = np.ones((ROWS, LENGTH), np.int64)

    def run(turn: int) -> dict[str, float]:
        target = folder / f"{turn}.pt"
        batches = steps_of(turn)

        def step() -> float:
            tokens, labels = next(batches)
            return timed(lambda: encoder.step(tokens, mask, labels))

        def save() -> Callable[[], float]:
            modules = {"backbone": encoder.backbone.state_dict(), "head": encoder.head.state_dict()}

            def write() -> None:
                optimizer = encoder.optimizer.state_dict()
                torch.save({"model": modules, "optimizer": optimizer}, target)

            seconds = timed(write)
            return lambda: seconds

        def restore() -> None:
            restored = torch.load(target, map_location=device)
            encoder.backbone.load_state_dict(restored["model"]["backbone"])
            encoder.head.load_state_dict(restored["model"]["head"])
            encoder.optimizer.load_state_dict(restored["optimizer"])

        try:
            return figures(step, steps, save, restore, target)
        finally:
            target.unlink(missing_ok=True)

    return run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument(
        "--steps", type=int, default=4, help="training steps before a save, and after it"
    )
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        help="where checkpoints go; by default the system's temporary folder",
    )
    parser.add_argument(
        "--background", action="store_true", help="ours: save in the background on a CPU, too"
    )
    harness.add_device(parser)
    return parser.parse_args(argv)


def make_arms(args: argparse.Namespace, folder: pathlib.Path) -> tuple[list[harness.Arm], str]:
    """Returns the arms, and the reason why the peer is left out, empty if it is not."""
    shared = {"model": folder / "model", "folder": folder, "steps": args.steps, "dtype": args.dtype}
    arms = []
    reason = harness.missing("torch", "transformers") or ""
    if not reason:
        settings = {**shared, "device": args.device}
        arms.append(harness.Arm("torch.save (peer)", f"{__spec__.name}:peer", settings))
    settings = {**shared, "background": args.background or None}
    arms.append(harness.Arm("ours", f"{__spec__.name}:ours", settings))
    return arms, reason


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = pathlib.Path(temporary)
        models.write(folder / "model", args.size, LENGTH)
        arms, reason = make_arms(args, folder)
        results = harness.take_turns(arms, args.repeats)
    rows = []
    for name, medians in harness.medians(results).items():
        seconds = [
            f"{medians[part]:.2f} s"
            for part in ("step", "blocked", "step_while", "stall", "on_disk", "restore")
        ]
        size = f"{medians['bytes'] / 2**20:,.1f} MiB"
        memory = f"{medians['gib']:.1f} GiB"
        is_compared = name == "ours" and len(arms) > 1
        ratio = harness.ratio(results, name, arms[0].name, "stall") if is_compared else None
        rows.append([name, *seconds, size, memory, f"{ratio:.1f} x" if is_compared else ""])
    title = (
        f"{args.size}, parameters and two moments, {args.steps} steps on each side, "
        f"{args.repeats} rounds"
    )
    notes = [f"the peer is left out: {reason}"] if reason else []
    harness.publish(title, COLUMNS, rows, notes, args.json)


if __name__ == "__main__":
    main()
