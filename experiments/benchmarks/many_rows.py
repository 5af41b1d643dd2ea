"""Tables of very many rows: generates Parquet files, reads them as `own` data, and draws batches.

    python -m gemma_encoder.experiments.benchmarks.many_rows --folder=/tmp/rows
        [--rows=1000000,10000000,100000000]

The data are short texts with a whole number as the class, named by `own.train=train-*.parquet`. For
each number of rows three processes follow each other: one reads the files for the first time and
leaves an Arrow table in the cache folder, one opens that table again, and one makes packed training
batches from random rows.

Anonymous memory is memory that no file backs. The pages of the mapped table are not part of it,
since the system reclaims those when it needs memory. Needs some 100 bytes of disk per row; the
generated files are removed at the end.
"""

import argparse
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma_encoder.experiments.benchmarks import fresh, harness

if TYPE_CHECKING:
    import pyarrow as pa

PER_FILE = 5_000_000  # rows per Parquet file
PER_GROUP = 100_000  # rows per row group
CLASSES = 5
BYTES = 100  # of disk per row, files and table together
MIB = 2**20
COLUMNS = (
    "rows",
    "first reading",
    "rows/s",
    "anonymous memory",
    "peak resident",
    "second opening",
    "anonymous memory of it",
    "texts/s of batches",
    "anonymous memory of them",
    "peak resident of them",
    "of it mapped files",
)


def generate(folder: pathlib.Path, rows: int) -> None:
    """Writes train-00000.parquet and so on: texts of 3 to 60 letters, and labels from 0 to 4."""
    import pyarrow as pa
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlucm"), rng.integers(2, 10))) for _ in range(5000)]
    pool = np.frombuffer(" ".join(rng.choice(words, 100_000)).encode(), np.uint8)
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())])
    for index, first in enumerate(range(0, rows, PER_FILE)):
        with pa.parquet.ParquetWriter(folder / f"train-{index:05d}.parquet", schema) as file:
            for begin in range(first, min(first + PER_FILE, rows), PER_GROUP):
                count = min(PER_GROUP, rows - begin, first + PER_FILE - begin)
                texts = _random_texts(rng, pool, count)
                labels = pa.array(rng.integers(0, CLASSES, count))
                file.write_batch(pa.record_batch([texts, labels], schema))


def _random_texts(rng: np.random.Generator, pool: np.ndarray, count: int) -> "pa.Array":
    """Cuts a random stretch of the pool's letters into texts."""
    import pyarrow as pa

    lengths = rng.integers(3, 61, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total = offsets[-1]
    start = rng.integers(len(pool) - total) if total < len(pool) else 0
    letters = np.resize(pool[start:], total)
    letters[offsets[:-1]] = ord("a")  # no text is blank
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(letters)]
    return pa.Array.from_buffers(pa.string(), count, buffers)


class Peak:
    """Peak of the process's anonymous memory inside the context, in bytes, sampled every 20 ms."""

    def __enter__(self) -> "Peak":
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self._sample()

    def _sample(self) -> None:
        self.bytes = max(self.bytes, harness.process_memory("RssAnon"))

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        self._sample()


def _source(folder: str):
    from gemma_encoder.data import registry
    from gemma_encoder.data.source import DataOptions

    return registry.get("own", DataOptions(own={"train": f"{folder}/train-*.parquet"}))


def opening(folder: str) -> dict[str, float]:
    """Opens the data; reads the files if the cache folder does not hold their table yet."""
    from gemma_encoder.data.tasks import own  # noqa: F401, so that imports are not timed

    before = harness.process_memory("RssAnon")
    began = time.perf_counter()
    with Peak() as peak:
        source = _source(folder)
    return {
        "opening": time.perf_counter() - began,
        "records": source.size("train") + source.size("validation"),
        "anonymous": (peak.bytes - before) / MIB,
        "resident": harness.process_memory("VmHWM") / MIB,
    }


def batches(folder: str, texts: int) -> dict[str, float]:
    """Draws packed batches of 64 rows of 128 tokens until they hold `texts` texts."""
    from gemma_encoder.data.pipeline import TrainStream
    from gemma_encoder.data.stream_options import StreamOptions
    from gemma_encoder.inputs.batch import BatchShape
    from gemma_encoder.inputs.tokenizer import Tokenizer

    source = _source(folder)
    options = StreamOptions(BatchShape(64, 128, 16), 128)
    stream = TrainStream([source], np.ones(1), Tokenizer.load("small"), options)
    next(stream)  # starts its thread
    before = harness.process_memory("RssAnon")
    drawn = 0
    began = time.perf_counter()
    with Peak() as peak:
        while drawn < texts:
            drawn += int((next(stream).weight > 0).sum())
    seconds = time.perf_counter() - began
    stream.close()
    return {
        "texts": drawn / seconds,
        "anonymous": (peak.bytes - before) / MIB,
        "resident": harness.process_memory("VmHWM") / MIB,
        "mapped": harness.process_memory("RssFile") / MIB,
    }


def measure(folder: pathlib.Path, rows: int, texts: int) -> list[str]:
    """Generates and measures a table; returns its row of figures, in the order of `COLUMNS`.

    Raises:
        SystemExit: the disk is too small, or not every row was read.
    """
    free = shutil.disk_usage(folder).free
    needed = 1.2 * rows * BYTES
    if free < needed:
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB free; {rows} rows need some {needed / 1e9:.1f} GB"
        )
    environment = {"GEMMA_ENCODER_CACHE": str(folder / "cache")}

    def in_new_process(function: Callable, **settings) -> dict[str, float]:
        name = f"{__spec__.name}:{function.__name__}"
        return fresh.run(name, {"folder": str(folder), **settings}, environment)

    generate(folder, rows)
    first = in_new_process(opening)
    second = in_new_process(opening)
    drawn = in_new_process(batches, texts=texts)
    if not rows == first["records"] == second["records"]:
        raise SystemExit(f"{rows} rows were written, {first['records']:.0f} were read")
    return [
        f"{rows:,}",
        f"{first['opening']:.1f} s",
        f"{rows / first['opening']:,.0f}",
        f"{first['anonymous']:.0f} MiB",
        f"{first['resident']:.0f} MiB",
        f"{second['opening']:.2f} s",
        f"{second['anonymous']:.0f} MiB",
        f"{drawn['texts']:,.0f}",
        f"{drawn['anonymous']:.0f} MiB",
        f"{drawn['resident']:.0f} MiB",
        f"{drawn['mapped']:.0f} MiB",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; removes the generated files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", default="1000000,10000000,100000000", help="numbers of rows, separated by commas"
    )
    parser.add_argument("--texts", type=int, default=100_000, help="texts to draw in batches")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="on a disk with enough space; created if absent"
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    args = parser.parse_args(argv)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for count in harness.integers(args.rows):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(measure(pathlib.Path(folder), count, args.texts))
    title = f"a table of short texts as Parquet, {os.cpu_count()} cores, a process for each column"
    harness.publish(title, COLUMNS, rows, file=args.json)


if __name__ == "__main__":
    main()
