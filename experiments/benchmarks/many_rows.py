"""Reading a table of very many rows: generates one as Parquet files, reads it as `own` data, and draws batches.

    python -m gemma_encoder.experiments.benchmarks.many_rows --folder=/tmp/rows [--rows=1000000,10000000,100000000]

The data are what `own.train=train-*.parquet` names: short texts with a class as a whole number. For each number of rows three
processes follow each other: one reads the files for the first time and leaves an Arrow table in the cache folder, one opens that table
again, and one makes packed training batches from random rows. Anonymous memory is what no file backs: the pages of the mapped table are
apart from it, since the system takes those back when it needs memory. Needs some 100 bytes of disk a row; the folder is removed at the end.
"""

import argparse
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from gemma_encoder.experiments.benchmarks import fresh, harness

PER_FILE = 5_000_000  # rows
PER_GROUP = 100_000  # rows of a row group
CLASSES = 5
BYTES = 100  # of disk a row, files and table together


def generate(folder: pathlib.Path, rows: int) -> None:
    """Writes train-00000.parquet and so on: texts of 3 to 60 letters from a pool, and labels from 0 to 4."""
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
                lengths = rng.integers(3, 61, count)
                offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
                start = rng.integers(len(pool) - offsets[-1]) if offsets[-1] < len(pool) else 0
                letters = np.resize(pool[start:], offsets[-1])
                letters[offsets[:-1]] = ord("a")  # no text is blank
                buffers = [None, pa.py_buffer(offsets), pa.py_buffer(letters)]
                texts = pa.Array.from_buffers(pa.string(), count, buffers)
                labels = pa.array(rng.integers(0, CLASSES, count))
                file.write_batch(pa.record_batch([texts, labels], schema))


class Peak:
    """The most anonymous memory that the process holds meanwhile, in bytes, looked at every 20 ms."""

    def __enter__(self) -> "Peak":
        self._ended, self.bytes = threading.Event(), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.bytes = max(self.bytes, memory("RssAnon"))

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        self.bytes = max(self.bytes, memory("RssAnon"))


def memory(field: str) -> int:
    """Bytes of a field of this process's status: RssAnon, RssFile, VmHWM."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def _source(folder: str):
    from gemma_encoder.data import registry
    from gemma_encoder.data.source import DataOptions

    return registry.get("own", DataOptions(own={"train": f"{folder}/train-*.parquet"}))


def opening(folder: str) -> dict[str, float]:
    """Opens the data: reads the files where the cache folder does not hold their table."""
    from gemma_encoder.data.tasks import own  # noqa: F401, imports are not in the time

    before = memory("RssAnon")
    began = time.perf_counter()
    with Peak() as peak:
        source = _source(folder)
    return {
        "opening": time.perf_counter() - began,
        "records": source.size("train") + source.size("validation"),
        "anonymous": (peak.bytes - before) / 2**20,
        "resident": memory("VmHWM") / 2**20,
    }


def batches(folder: str, texts: int) -> dict[str, float]:
    """Draws packed batches of 64 rows of 128 tokens until they hold so many texts."""
    from gemma_encoder.data.pipeline import TrainStream
    from gemma_encoder.data.stream_options import StreamOptions
    from gemma_encoder.inputs.batch import BatchShape
    from gemma_encoder.inputs.tokenizer import Tokenizer

    source, drawn = _source(folder), 0
    options = StreamOptions(BatchShape(64, 128, 16), 128)
    stream = TrainStream([source], np.ones(1), Tokenizer.load("small"), options)
    next(stream)  # the thread is under way
    before, began = memory("RssAnon"), time.perf_counter()
    with Peak() as peak:
        while drawn < texts:
            drawn += int((next(stream).weight > 0).sum())
    seconds = time.perf_counter() - began
    stream.close()
    return {
        "texts": drawn / seconds,
        "anonymous": (peak.bytes - before) / 2**20,
        "resident": memory("VmHWM") / 2**20,
        "mapped": memory("RssFile") / 2**20,
    }


def measure(folder: pathlib.Path, rows: int, texts: int) -> list[str]:
    """The figures of one number of rows, for the table."""
    free = shutil.disk_usage(folder).free
    if free < 1.2 * rows * BYTES:
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB free; {rows} rows need some {1.2 * rows * BYTES / 1e9:.1f} GB"
        )
    environment = {"GEMMA_ENCODER_CACHE": str(folder / "cache")}

    def apart(function: Callable, **settings) -> dict[str, float]:
        return fresh.run(
            f"{__spec__.name}:{function.__name__}",
            {"folder": str(folder), **settings},
            environment,
        )

    generate(folder, rows)
    first, second, drawn = apart(opening), apart(opening), apart(batches, texts=texts)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and removes what was generated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", default="1000000,10000000,100000000", help="with commas between them"
    )
    parser.add_argument("--texts", type=int, default=100_000, help="that are drawn")
    parser.add_argument("--folder", type=pathlib.Path, help="on a disk with room; made if absent")
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    args = parser.parse_args(argv)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for count in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(measure(pathlib.Path(folder), count, args.texts))
    title = f"a table of short texts as Parquet, {os.cpu_count()} cores, a process for each column"
    harness.publish(title, COLUMNS, rows, file=args.json)


if __name__ == "__main__":
    main()
