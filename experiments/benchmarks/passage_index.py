"""What a collection of MS MARCO's size costs: generates one, indexes it and a run of train queries, and reads passages and lists.

    nice python -m gemma_encoder.experiments.benchmarks.passage_index --folder=/tmp/passages

Needs some 8 GB in the folder, which is emptied at the end, and some minutes. Every part runs in a process of its own, so that each peak of
resident memory is that part's. The page cache is emptied of the files before each part that is called cold.
"""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import platform
import shutil
import sys
import time

import numpy as np
from absl import app, flags, logging

FOLDER = flags.DEFINE_string(
    "folder",
    None,
    "An empty or absent folder for the generated files; it is removed at the end.",
    required=True,
)
PASSAGES = flags.DEFINE_integer(
    "passages", 8_841_823, "Passages of the collection; MS MARCO has 8,841,823."
)
QUERIES = flags.DEFINE_integer("queries", 50_000, "Queries of the run, 1,000 passages each.")
IDS = flags.DEFINE_enum(
    "ids",
    "numbers",
    ["numbers", "words"],
    "Ids of passages: 0, 1, …, as MS MARCO's, or text, as BEIR's.",
)
READS = flags.DEFINE_integer("reads", 100_000, "Random passages to read.")
JSON = flags.DEFINE_string(
    "json", None, "Where to write the figures; by default only to the terminal."
)
DEPTH = 1000


def pid(number: int, ids: str) -> str:
    """The id of a passage."""
    return str(number) if ids == "numbers" else f"doc-{number * 2654435761 % 2**32:08x}"


def generate(folder: pathlib.Path, passages: int, queries: int, ids: str) -> None:
    """Writes collection, queries, qrels and run. Passages have MS MARCO's lengths, 335 bytes on average, and some letters beyond ASCII."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlucmé"), rng.integers(2, 10))) for _ in range(5000)]
    pool = " ".join(rng.choice(words, 1_000_000))
    with (folder / "collection.tsv").open("w", encoding="utf-8", newline="\n") as file:
        for begin in range(0, passages, 100_000):
            count = min(100_000, passages - begin)
            starts = rng.integers(0, len(pool) - 2000, count).tolist()
            lengths = np.clip(rng.lognormal(5.72, 0.36, count), 20, 1900).astype(int).tolist()
            file.writelines(
                f"{pid(begin + i, ids)}\t{pool[s : s + n]}.\n"
                for i, (s, n) in enumerate(zip(starts, lengths, strict=True))
            )
    with (
        (folder / "queries.train.tsv").open("w") as asked,
        (folder / "qrels.train.tsv").open("w") as judged,
        (folder / "run.train.tsv").open("w") as run,
    ):
        for query in range(queries):
            found = rng.choice(passages, DEPTH, replace=False).tolist()
            asked.write(f"{query * 7}\twhat is number {query}\n")
            judged.write(f"{query * 7}\t0\t{pid(found[int(rng.integers(DEPTH))], ids)}\t1\n")
            run.writelines(
                f"{query * 7}\t{pid(document, ids)}\t{rank}\n"
                for rank, document in enumerate(found, 1)
            )


def forget(folder: pathlib.Path) -> None:
    """Asks the kernel to drop the files of a folder from memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_memory() -> int:
    """The most bytes that this process has had resident."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def open_passages(folder: pathlib.Path):
    """The collection."""
    from gemma_encoder.data.files.corpus import Corpus, TsvLayout

    return Corpus(folder / "collection.tsv", TsvLayout("pid", "passage"))


def measure_build(folder: pathlib.Path) -> dict[str, float]:
    """Builds the index of the collection."""
    before = peak_memory()
    began = time.perf_counter()
    open_passages(folder)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    return {
        "build_seconds": seconds,
        "index_bytes": size,
        "build_peak_bytes": peak_memory(),
        "import_bytes": before,
    }


def measure_reads(folder: pathlib.Path, ids: str, passages: int, reads: int) -> dict[str, float]:
    """Opens the index and reads random passages by id, all of them twice."""
    names = [
        pid(number, ids)
        for number in np.random.default_rng(1).integers(0, passages, reads).tolist()
    ]
    began = time.perf_counter()
    texts = open_passages(folder)
    texts[names[0]]
    result = {"cold_open_seconds": time.perf_counter() - began}
    numbers = [texts.ids.index(name) for name in names]
    for name in ("cold", "warm"):
        began = time.perf_counter()
        for number in numbers:
            texts.text(number)
        result[f"{name}_reads_per_second"] = reads / (time.perf_counter() - began)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(texts.text, numbers[:1000])) == [
            texts.text(number) for number in numbers[:1000]
        ]
    return result | {"read_peak_bytes": peak_memory()}


def measure_lists(folder: pathlib.Path) -> dict[str, float]:
    """Reads the run into its compact form, then draws training lists as training does."""
    os.environ["MSMARCO_DIR"] = str(folder)
    logging.set_verbosity(logging.ERROR)
    from gemma_encoder.data import registry
    from gemma_encoder.data.pipeline import training_order
    from gemma_encoder.data.source import DataOptions
    from gemma_encoder.data.stream_options import StreamOptions
    from gemma_encoder.inputs.batch import BatchShape

    source = registry.get("msmarco", DataOptions(list_size=36))
    began = time.perf_counter()
    queries = source.size("train")
    seconds = time.perf_counter() - began
    run_peak = peak_memory()
    order = training_order([source], np.ones(1), StreamOptions(BatchShape(1, 128), 128), 0)
    began, lists = time.perf_counter(), 1000
    for number in range(lists):
        source.training_examples(order[number].index, seed=0, epoch=0)
    rate = lists / (time.perf_counter() - began)
    return {
        "run_seconds": seconds,
        "run_lines": queries * DEPTH,
        "run_peak_bytes": run_peak,
        "lists_per_second": rate,
        "training_data_peak_bytes": peak_memory(),
    }


def apart(function, *arguments) -> dict[str, float]:
    """A function's result, from a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return pool.submit(function, *arguments).result()


def main(_: list[str]) -> None:
    """Measures and prints."""
    folder = pathlib.Path(FOLDER.value).expanduser()
    needed = PASSAGES.value * 400 + QUERIES.value * DEPTH * 60
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty")
    free = shutil.disk_usage(folder).free
    if free < 1.2 * needed:
        sys.exit(
            f"error: {folder} has {free / 1e9:.1f} GB free; some {1.2 * needed / 1e9:.1f} GB are needed"
        )
    os.environ["GEMMA_ENCODER_CACHE"] = str(folder / "cache")
    try:
        print(f"generating {PASSAGES.value} passages and {QUERIES.value} queries", flush=True)
        generate(folder, PASSAGES.value, QUERIES.value, IDS.value)
        figures: dict[str, float | str] = {
            "passages": PASSAGES.value,
            "ids": IDS.value,
            "collection_bytes": (folder / "collection.tsv").stat().st_size,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "cores": os.cpu_count() or 0,
        }
        forget(folder)
        figures |= apart(measure_build, folder)
        forget(folder)
        figures |= apart(measure_reads, folder, IDS.value, PASSAGES.value, READS.value)
        figures |= apart(measure_lists, folder)
        for name, value in figures.items():
            if name.endswith("_bytes"):
                print(f"{name.removesuffix('_bytes'):<24} {value / 1e6:>14,.1f} MB")
            else:
                print(
                    f"{name:<24} {value:>14,.2f}"
                    if isinstance(value, float)
                    else f"{name:<24} {value:>14}"
                )
        if JSON.value:
            pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    app.run(main)
