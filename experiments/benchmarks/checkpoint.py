"""How long saving a checkpoint holds training up, until it is on disk, and how long restoring takes: ours beside torch.save.

    python -m gemma_encoder.experiments.benchmarks.checkpoint [--size=gemma3_270m] [--folder=DIR] [--device=cpu] [--background]

A turn is some training steps, a save of parameters and both moments, as many steps again, and a restore of what was saved. Ours saves as the
training loop does, in the background except on a CPU: what counts is the time for which `save` does not return, and what the steps after
it take more than those before. The peer is what Trainer and accelerate do: torch.save of the model's and the optimiser's state, with
training standing still. Files go to `--folder` (by default the system's temporary one) and, in both arms, to the page cache first.
Needs the extra `bench` (without it, ours runs alone).
"""

import pathlib
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable

import numpy as np

from gemma_encoder.experiments.benchmarks import harness, models

ROWS, LENGTH = 4, 128
DATA = {"reader": b"the state of a reader stands here"}  # a few megabytes in a run


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def size_of(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(
        file.stat().st_size
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    )


def figures(
    step: Callable[[], float],
    steps: int,
    save: Callable[[], Callable[[], float]],
    restore: Callable[[], object],
    path: pathlib.Path,
) -> dict:
    """What a turn saw.

    Args:
        step: takes one, and gives its seconds.
        steps: how many, before the save and after it.
        save: starts saving, and gives what waits for the end and says after how many seconds it came.
        restore: reads what was saved.
        path: where it lies.
    """
    before = [step() for _ in range(steps)]
    began = time.perf_counter()
    finish = save()
    blocked = time.perf_counter() - began
    after = [step() for _ in range(steps)]
    on_disk = finish()
    usual = statistics.median(before)
    stall = blocked + sum(max(seconds - usual, 0.0) for seconds in after)
    found = {
        "step": usual,
        "step_while": statistics.median(after),
        "blocked": blocked,
        "stall": stall,
        "on_disk": on_disk,
    }
    return {**found, "bytes": size_of(path), "restore": timed(restore)}


def tokens_of(turn: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, L] and labels [B] of a step."""
    rng = np.random.default_rng((turn, number))
    return rng.integers(5, 8000, (ROWS, LENGTH)).astype(np.int32), rng.integers(0, 2, ROWS)


def ours(
    model: pathlib.Path, folder: pathlib.Path, steps: int, dtype: str, background: bool | None
) -> harness.Turn:
    """Our arm."""
    import dataclasses
    import itertools

    import jax

    from gemma_encoder.inputs.batch import BatchShape, empty_batch
    from gemma_encoder.training.checkpoint import Checkpoints
    from gemma_encoder.weights.backbone import open_checkpoint

    program, state = models.our_program(model, ROWS, LENGTH, 1, ROWS, dtype)
    spec = open_checkpoint(model).inference_spec()
    held, blank = [state], empty_batch(BatchShape(ROWS, LENGTH))
    del state

    def run(turn: int) -> dict[str, float]:
        target, numbers = folder / str(turn), itertools.count()
        checkpoints = Checkpoints(target, background=background)

        def step() -> float:
            tokens, labels = tokens_of(turn, next(numbers))
            positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
            fields = {
                "tokens": tokens,
                "segment_ids": np.ones_like(tokens),
                "positions": positions,
                "label": labels[:, None].astype(np.float32),
            }
            batch = blank._replace(**fields, weight=np.ones((ROWS, 1), np.float32))

            def work() -> None:
                held[0], metrics = program.step(held[0], program.shard(batch))
                float(metrics.loss)

            return timed(work)

        def save() -> Callable[[], float]:
            began, ended = time.perf_counter(), []
            checkpoints.save(held[0], dataclasses.replace(spec, step=turn), DATA, {})
            saved.append(
                jax.tree.map(lambda leaf: np.asarray(leaf[..., :2]), held[0].parameters["heads"])
            )

            def wait() -> None:
                checkpoints.wait()
                ended.append(time.perf_counter() - began)

            thread = threading.Thread(target=wait)
            thread.start()

            def finish() -> float:
                thread.join()
                return ended[0]

            return finish

        def restore() -> None:
            found, _ = checkpoints.restore(turn, program.abstract, list(DATA))
            jax.block_until_ready(found)
            for mine, theirs in zip(
                jax.tree.leaves(saved[-1]), jax.tree.leaves(found.parameters["heads"]), strict=True
            ):
                np.testing.assert_array_equal(mine, np.asarray(theirs[..., :2]))

        saved: list = []
        try:
            return figures(step, steps, save, restore, target)
        finally:
            checkpoints.close()
            shutil.rmtree(target, ignore_errors=True)

    return run


def peer(
    model: pathlib.Path, folder: pathlib.Path, steps: int, dtype: str, device: str
) -> harness.Turn:
    """PyTorch's arm."""
    import itertools

    import torch

    encoder = models.TorchEncoder(model, device, dtype)
    mask = np.ones((ROWS, LENGTH), np.int64)

    def run(turn: int) -> dict[str, float]:
        target, numbers = folder / f"{turn}.pt", itertools.count()

        def step() -> float:
            tokens, labels = tokens_of(turn, next(numbers))
            return timed(lambda: encoder.step(tokens, mask, labels))

        def save() -> Callable[[], float]:
            modules = {"backbone": encoder.backbone.state_dict(), "head": encoder.head.state_dict()}
            seconds = timed(
                lambda: torch.save(
                    {"model": modules, "optimizer": encoder.optimizer.state_dict()}, target
                )
            )
            return lambda: seconds

        def restore() -> None:
            found = torch.load(target, map_location=device)
            encoder.backbone.load_state_dict(found["model"]["backbone"])
            encoder.head.load_state_dict(found["model"]["head"])
            encoder.optimizer.load_state_dict(found["optimizer"])

        try:
            return figures(step, steps, save, restore, target)
        finally:
            target.unlink(missing_ok=True)

    return run


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--steps", type=int, default=4, help="before a save, and after it")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        help="where checkpoints go; by default the system's temporary folder",
    )
    parser.add_argument(
        "--background", action="store_true", help="ours: in the background on a CPU, too"
    )
    harness.add_device(parser)
    args = parser.parse_args(argv)
    notes, arms = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = pathlib.Path(temporary)
        models.write(folder / "model", args.size, LENGTH)
        settings = {
            "model": folder / "model",
            "folder": folder,
            "steps": args.steps,
            "dtype": args.dtype,
        }
        if reason := harness.missing("torch", "transformers"):
            notes.append(f"the peer is left out: {reason}")
        else:
            arms.append(
                harness.Arm(
                    "torch.save (peer)",
                    f"{__spec__.name}:peer",
                    {**settings, "device": args.device},
                )
            )
        arms.append(
            harness.Arm(
                "ours", f"{__spec__.name}:ours", {**settings, "background": args.background or None}
            )
        )
        seen = harness.take_turns(arms, args.repeats)
    rows = []
    for name, found in harness.medians(seen).items():
        against = (
            f"{harness.ratio(seen, 'ours', arms[0].name, 'stall'):.1f} x"
            if name == "ours" and len(arms) > 1
            else ""
        )
        parts = [
            f"{found[part]:.2f} s"
            for part in ("step", "blocked", "step_while", "stall", "on_disk", "restore")
        ]
        rows.append(
            [name, *parts, f"{found['bytes'] / 2**20:,.1f} MiB", f"{found['gib']:.1f} GiB", against]
        )
    columns = [
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
    ]
    harness.publish(
        f"{args.size}, parameters and two moments, {args.steps} steps on each side, {args.repeats} rounds",
        columns,
        rows,
        notes,
        args.json,
    )


if __name__ == "__main__":
    main()
