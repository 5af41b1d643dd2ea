"""Cost of checking digests: one of our checkpoints, loaded with and without the check.

    python -m gemma_encoder.experiments.benchmarks.load_checked
        [--size=gemma2_2b] [--folder=DIR] [--cold] [--repeats=5]

A checkpoint of random parameters in float32 (10.5 GB for gemma2_2b) is saved as the training loop
does, without moments, and loaded as `Predictor.load` does. The arms take turns in processes of
their own. "Processors" is the time of all threads, which depends less on other programs.

By default files come from the page cache, where reading is fastest and the check's share largest;
with `--cold` they are dropped from it before each turn. The check alone, and the writing of
digests, which is part of a save, are timed once a turn in the arm that checks.
"""

import argparse
import contextlib
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator

from gemma_encoder.experiments.benchmarks import harness

COLUMNS = (
    "arm",
    "load",
    "spread",
    "processors",
    "check alone",
    "writing digests",
    "peak memory",
    "load, against unchecked",
)
CHECKED = "checked"
UNCHECKED = "unchecked"
AGAIN = "unchecked, again"  # tells how much figures differ by chance


def save(folder: pathlib.Path, size: str) -> None:
    """Saves a checkpoint of step 1 to a workdir."""
    import jax
    import jax.numpy as jnp

    import gemma_encoder as ge
    from gemma_encoder.data import registry
    from gemma_encoder.experiments.benchmarks import models
    from gemma_encoder.model.encoder import initial_parameters
    from gemma_encoder.training.checkpoint import Checkpoints
    from gemma_encoder.training.state import TrainState
    from gemma_encoder.weights.native import InferenceSpec

    task = registry.get(models.TASK).task
    config = ge.EncoderConfig(ge.GEMMA_CONFIGS[size], {task.head: task.num_outputs})
    spec = InferenceSpec(config, (task,), ge.Tokenizer.load("small"), 128, 128, "right", 1)
    state = TrainState(initial_parameters(config, jax.random.key(0)), {}, jnp.int32(1))
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(state, spec, {}, {})
        checkpoints.wait()


def run_in_a_process(function, *arguments) -> None:
    """Calls a function in a process of its own, whose memory is free afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} failed; see its traceback above")


@contextlib.contextmanager
def _switched(on: bool) -> Iterator[None]:
    """Switches the check of digests on or off."""
    from gemma_encoder import digests

    before = os.environ.get(digests.OFF, "1")
    os.environ[digests.OFF] = "1" if on else "0"
    try:
        yield
    finally:
        os.environ[digests.OFF] = before


def drop_from_cache(folder: pathlib.Path) -> None:
    """Drops the files of a folder from the page cache."""
    os.sync()  # pages that are not on disk yet would stay
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loader(folder: pathlib.Path, checks: bool, cold: bool) -> harness.Turn:
    """Sets up an arm that loads a checkpoint."""
    import jax

    from gemma_encoder import digests
    from gemma_encoder.model import sharding
    from gemma_encoder.weights import backbone

    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    checkpoint = folder / "checkpoints" / "1"

    def timed(work) -> float:
        if cold:
            drop_from_cache(folder)
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def run(turn: int) -> dict[str, float]:
        processors = time.process_time()
        with _switched(checks):
            seconds = timed(lambda: jax.block_until_ready(backbone.load_encoder(folder, mesh)[1]))
        processors = time.process_time() - processors
        figures = {"seconds": seconds, "processors": processors, "check": 0.0, "write": 0.0}
        if checks:
            with _switched(True):
                figures["check"] = timed(lambda: digests.check(checkpoint))
            figures["write"] = timed(lambda: digests.write(checkpoint))
        return figures

    return run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--size", default="gemma2_2b")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        help="where the checkpoint goes; by default the system's temporary folder",
    )
    parser.add_argument(
        "--cold", action="store_true", help="drop the files from the page cache before each turn"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = pathlib.Path(temporary)
        run_in_a_process(save, folder, args.size)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        arms = [
            harness.Arm(
                name,
                f"{__spec__.name}:loader",
                {"folder": folder, "checks": name == CHECKED, "cold": args.cold},
            )
            for name in (UNCHECKED, CHECKED, AGAIN)
        ]
        results = harness.take_turns(arms, args.repeats)
    rows = []
    for name, medians in harness.medians(results).items():
        parts = [
            f"{medians[part]:.2f} s" if medians[part] else ""
            for part in ("processors", "check", "write")
        ]
        ratio = harness.ratio(results, UNCHECKED, name)
        rows.append(
            [
                name,
                f"{medians['seconds']:.2f} s",
                f"{medians['spread']:.0%}",
                *parts,
                f"{medians['gib']:.1f} GiB",
                f"{ratio:.3f} x",
            ]
        )
    caches = "files not in the page cache" if args.cold else "files in the page cache"
    title = f"{args.size}, {size / 1e9:.1f} GB, {caches}, {args.repeats} rounds"
    harness.publish(title, COLUMNS, rows, [], args.json)


if __name__ == "__main__":
    main()
