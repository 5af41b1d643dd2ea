"""Exact search: queries per second among random vectors, beside FAISS's flat index.

    python -m gemma_encoder.experiments.benchmarks.vector_search
        [--documents=1000000] [--width=128] [--queries=512] [--k=100]

Vectors of length 1, as float32 and as int8; both arms have them in memory or on disk as their
search keeps them: FAISS's IndexFlatIP in memory, ours in the block files of an index, read anew in
each turn. Results are compared before timings count. Needs the extra `retrieval`; without FAISS,
only ours runs.
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import harness

BLOCK = 65_536  # vectors of a block
COLUMNS = ("arm", "queries/s", "median", "peak memory", "spread", "same results", "against FAISS")


def vectors_of(seed: int, rows: int, width: int) -> np.ndarray:
    """Returns random vectors of length 1, the same for every arm."""
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def blocks_of(documents: int, width: int):
    """Yields the documents' vectors, a block at a time."""
    for block, first in enumerate(range(0, documents, BLOCK)):
        yield block, vectors_of(1 + block, min(BLOCK, documents - first), width)


def write_index(folder: pathlib.Path, documents: int, width: int, precision: str):
    """Writes the blocks of an index and returns its description."""
    from gemma_encoder.retrieval.blocks import FOLDER, write_block
    from gemma_encoder.retrieval.dense import dense_arrays
    from gemma_encoder.retrieval.description import IndexDescription

    description = IndexDescription(
        "dense",
        collection="random",
        fingerprint="",
        count=documents,
        id_name="pid",
        block=BLOCK,
        full_width=width,
        width=width,
        precision=precision,
        similarity="cosine",
    )
    (folder / FOLDER).mkdir(parents=True)
    for block, vectors in blocks_of(documents, width):
        write_block(folder, block, dense_arrays(vectors, description))
    return description


def ours(
    folder: str, documents: int, width: int, queries: int, k: int, results: str, precision: str
) -> harness.Turn:
    """Sets up our arm; each turn writes its results to "{results}.{turn}.npy"."""
    from gemma_encoder.retrieval.dense import search_dense
    from gemma_encoder.retrieval.index import local_mesh

    path = pathlib.Path(folder) / precision
    description = write_index(path, documents, width, precision)
    mesh = local_mesh()

    def run(turn: int) -> dict[str, float]:
        vectors = vectors_of(-turn % 2**32, queries, width)
        began = time.perf_counter()
        best = search_dense(path, description, vectors, k, mesh, lambda count: None)
        seconds = time.perf_counter() - began
        np.save(f"{results}.{turn}.npy", best[0])
        return {"seconds": seconds, "queries_per_second": queries / seconds}

    return run


def peer(documents: int, width: int, queries: int, k: int, results: str) -> harness.Turn:
    """Sets up FAISS's flat index of inner products; writes results as `ours` does."""
    import faiss

    index = faiss.IndexFlatIP(width)
    for _, vectors in blocks_of(documents, width):
        index.add(vectors)

    def run(turn: int) -> dict[str, float]:
        vectors = vectors_of(-turn % 2**32, queries, width)
        began = time.perf_counter()
        _, indices = index.search(vectors, k)
        seconds = time.perf_counter() - began
        np.save(f"{results}.{turn}.npy", indices)
        return {"seconds": seconds, "queries_per_second": queries / seconds}

    return run


def shared_results(folder: pathlib.Path, first: str, other: str, turns: range) -> float:
    """Returns the share of results that two arms have in common."""
    shares = []
    for turn in turns:
        rows = zip(
            *(np.load(folder / f"{name}.{turn}.npy") for name in (first, other)), strict=True
        )
        shares += [len(np.intersect1d(*pair)) / len(pair[0]) for pair in rows]
    return float(np.mean(shares))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--k", type=int, default=100)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures, compares and prints."""
    args = parse_arguments(argv)
    shared = {name: getattr(args, name) for name in ("documents", "width", "queries", "k")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        arms = []
        if not harness.missing("faiss-cpu"):
            settings = {**shared, "results": str(folder / "faiss")}
            arms.append(harness.Arm("FAISS flat (peer)", f"{__spec__.name}:peer", settings))
        for precision in ("float32", "int8"):
            results = str(folder / f"ours_{precision}")
            settings = {**shared, "folder": str(folder), "results": results}
            settings["precision"] = precision
            arms.append(harness.Arm(f"ours, {precision}", f"{__spec__.name}:ours", settings, True))
        turns = harness.take_turns(arms, args.repeats)
        files = {arm.name: pathlib.Path(arm.settings["results"]).name for arm in arms}
        reference = next(iter(files))
        counted = range(1, args.repeats + 1)
        same = {
            name: shared_results(folder, files[reference], file, counted)
            for name, file in files.items()
        }
    rows = []
    for name, figures in harness.medians(turns).items():
        row = [
            name,
            f"{figures['queries_per_second']:.0f}",
            f"{figures['seconds']:.2f} s",
            f"{figures['gib']:.1f} GiB",
            f"{figures['spread']:.0%}",
            f"{same[name]:.2%}",
            "" if name == reference else f"{harness.ratio(turns, name, reference):.2f} x",
        ]
        rows.append(row)
    title = (
        f"{args.documents:,} vectors of {args.width} dimensions, {args.queries} queries, "
        f"{args.k} results, {args.repeats} rounds"
    )
    if same.get("ours, float32", 1.0) < 0.9999:  # ties of rounding at the last rank
        raise SystemExit(f"the arms do not find the same: {same}")
    harness.publish(title, COLUMNS, rows, (), args.json)


if __name__ == "__main__":
    main()
