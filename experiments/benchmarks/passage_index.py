"""Costs of a passage collection of MS MARCO's size: indexing, reading, and drawing lists.

    nice python -m gemma_encoder.experiments.benchmarks.passage_index --folder=/tmp/passages

Generates a collection, indexes it and a run of train queries, and reads passages and lists. Needs
some 8 GB in the folder, which is removed at the end, and some minutes. Every part runs in a process
of its own, so each peak of resident memory belongs to that part. Before each part that is called
cold, the files are dropped from the page cache.
"""

import concurrent.futures
import multiprocessing
import os
import pathlib
import platform
import shutil
import sys
import time

import numpy as np
from absl import app, flags, logging

from gemma_encoder.experiments.benchmarks import harness
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.whole_files import write_whole

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
    "Passage ids: 0, 1, … as in MS MARCO, or text as in BEIR.",
)
READS = flags.DEFINE_integer("reads", 100_000, "Random passages to read.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to; by default none.")
DEPTH = 1000  # passages per query of the run


def pid(index: int, ids: str) -> str:
    """Returns the id of a passage."""
    return str(index) if ids == "numbers" else f"doc-{index * 2654435761 % 2**32:08x}"


def generate(folder: pathlib.Path, passages: int, queries: int, ids: str) -> None:
    """Writes collection, queries, qrels and run.

    Passages have MS MARCO's lengths, 335 bytes on average, and some letters beyond ASCII.
    """
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlucmé"), rng.integers(2, 10))) for _ in range(5000)]
    pool = " ".join(rng.choice(words, 1_000_000))
    with (folder / "collection.tsv").open("w", encoding="utf-8", newline="\n") as file:
        for begin in range(0, passages, 100_000):
            count = min(100_000, passages - begin)
            starts = rng.integers(0, len(pool) - 2000, count).tolist()
            lengths = np.clip(rng.lognormal(5.72, 0.36, count), 20, 1900).astype(int).tolist()
            for index, (start, length) in enumerate(zip(starts, lengths, strict=True), begin):
                file.write(f"{pid(index, ids)}\t{pool[start : start + length]}.\n")
    with (
        (folder / "queries.train.tsv").open("w") as queries_file,
        (folder / "qrels.train.tsv").open("w") as qrels_file,
        (folder / "run.train.tsv").open("w") as run_file,
    ):
        for query in range(queries):
            qid = query * 7
            retrieved = rng.choice(passages, DEPTH, replace=False).tolist()
            relevant = retrieved[int(rng.integers(DEPTH))]
            queries_file.write(f"{qid}\twhat is number {query}\n")
            qrels_file.write(f"{qid}\t0\t{pid(relevant, ids)}\t1\n")
            run_file.writelines(
                f"{qid}\t{pid(index, ids)}\t{rank}\n" for rank, index in enumerate(retrieved, 1)
            )


def forget(folder: pathlib.Path) -> None:
    """Asks the kernel to drop the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_memory() -> int:
    """Returns the peak resident memory of this process, in bytes."""
    return harness.process_memory("VmHWM")


def open_passages(folder: pathlib.Path):
    """Opens the collection; builds its index if there is none."""
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
    drawn = np.random.default_rng(1).integers(0, passages, reads).tolist()
    names = [pid(index, ids) for index in drawn]
    began = time.perf_counter()
    corpus = open_passages(folder)
    corpus[names[0]]
    result = {"cold_open_seconds": time.perf_counter() - began}
    indices = [corpus.ids.index(name) for name in names]
    for state in ("cold", "warm"):
        began = time.perf_counter()
        for index in indices:
            corpus.text(index)
        result[f"{state}_reads_per_second"] = reads / (time.perf_counter() - began)
    # Reads from several threads return the same texts.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        from_threads = list(pool.map(corpus.text, indices[:1000]))
    assert from_threads == [corpus.text(index) for index in indices[:1000]]
    return result | {"read_peak_bytes": peak_memory()}


def measure_lists(folder: pathlib.Path) -> dict[str, float]:
    """Reads the run into its compact form, then draws lists as training does."""
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
    lists = 1000
    began = time.perf_counter()
    for position in range(lists):
        source.training_examples(order[position].index, seed=0, epoch=0)
    rate = lists / (time.perf_counter() - began)
    return {
        "run_seconds": seconds,
        "run_lines": queries * DEPTH,
        "run_peak_bytes": run_peak,
        "lists_per_second": rate,
        "training_data_peak_bytes": peak_memory(),
    }


def apart(function, *arguments) -> dict[str, float]:
    """Calls a function in a process of its own and returns its result."""
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return pool.submit(function, *arguments).result()


def measure(folder: pathlib.Path) -> dict[str, float | str]:
    """Generates the files that the flags describe and returns all figures."""
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
    return figures


def print_figures(figures: dict[str, float | str]) -> None:
    """Prints a line per figure, bytes in MB."""
    for name, value in figures.items():
        if name.endswith("_bytes"):
            print(f"{name.removesuffix('_bytes'):<24} {value / 1e6:>14,.1f} MB")
        elif isinstance(value, float):
            print(f"{name:<24} {value:>14,.2f}")
        else:
            print(f"{name:<24} {value:>14}")


def main(_: list[str]) -> None:
    """Checks the folder, measures, prints, and removes the folder."""
    folder = pathlib.Path(FOLDER.value).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty; --folder must name an empty or absent folder")
    free = shutil.disk_usage(folder).free
    needed = 1.2 * (PASSAGES.value * 400 + QUERIES.value * DEPTH * 60)
    if free < needed:
        sys.exit(
            f"error: {folder} has {free / 1e9:.1f} GB free; some {needed / 1e9:.1f} GB are needed"
        )
    os.environ["GEMMA_ENCODER_CACHE"] = str(folder / "cache")
    try:
        figures = measure(folder)
        print_figures(figures)
        if JSON.value:
            write_whole(pathlib.Path(JSON.value), to_json(figures, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    app.run(main)
