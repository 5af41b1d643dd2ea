"""Encoding: documents per second from text to vector, beside SentenceTransformer.encode.

    MSMARCO_DIR=… python -m gemma_encoder.experiments.benchmarks.encode_documents
        [--size=gemma3_270m] [--documents=200] [--dtype=float32] [--device=cpu]

Documents of collection.tsv with their real lengths, tokenization included; mean pooling, vectors of
length 1. A turn encodes documents that no earlier turn used. All arms have the same weights and
truncate to the same length; vectors are compared before timings count. The peer sorts by length
within a call and has an arm for each of `--batch_sizes`; ours packs texts into rows and is compared
with the best of them. Needs the extra `bench`; without it, only ours runs.
"""

import argparse
import itertools
import pathlib
import tempfile
import time

import numpy as np

from gemma_encoder.data.files.lines import text_lines
from gemma_encoder.experiments.benchmarks import harness, models

PROMPT = "Document: "
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of a vector of length 1
COLUMNS = ("arm", "documents/s", "median", "peak memory", "spread", "against the best peer")


def documents_of(file: str, turn: int, count: int) -> list[str]:
    """Returns the documents of a turn, the same for every arm."""
    lines = itertools.islice(text_lines(pathlib.Path(file)), turn * count, (turn + 1) * count)
    return [line.split("\t", 1)[1] for _, line in lines]


def ours(model: str, file: str, count: int, vectors: str, dtype: str) -> harness.Turn:
    """Sets up our arm; each turn writes its vectors to "{vectors}.{turn}.npy"."""
    import gemma_encoder as ge

    predictor = ge.Predictor.load(model, compute_dtype=dtype)

    def run(turn: int) -> dict[str, float]:
        texts = documents_of(file, turn, count)
        began = time.perf_counter()
        result = predictor.embed(texts, prompt=PROMPT)
        seconds = time.perf_counter() - began
        np.save(f"{vectors}.{turn}.npy", result)
        return {"seconds": seconds, "documents_per_second": len(texts) / seconds}

    return run


def peer(
    model: str,
    file: str,
    count: int,
    vectors: str,
    dtype: str,
    device: str,
    batch_size: int,
    max_length: int,
) -> harness.Turn:
    """Sets up an arm of sentence-transformers; writes vectors as `ours` does."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer

    transformers.logging.set_verbosity_error()
    options = {
        "attn_implementation": models.attention(pathlib.Path(model)),
        "dtype": getattr(torch, dtype),
    }
    encoder = SentenceTransformer(model, device=device, model_kwargs=options)
    encoder.max_seq_length = max_length

    def run(turn: int) -> dict[str, float]:
        texts = documents_of(file, turn, count)
        began = time.perf_counter()
        result = encoder.encode(texts, batch_size=batch_size, prompt=PROMPT)
        seconds = time.perf_counter() - began
        np.save(f"{vectors}.{turn}.npy", np.asarray(result, np.float32))
        return {"seconds": seconds, "documents_per_second": len(texts) / seconds}

    return run


def compare(folder: pathlib.Path, names: list[str], turns: range) -> float:
    """Returns the largest distance of a document's vectors between the first arm and any other."""
    distances = [0.0]
    for turn in turns:
        first, *others = (np.load(folder / f"{name}.{turn}.npy") for name in names)
        distances += [float(np.linalg.norm(other - first, axis=1).max()) for other in others]
    return float(np.max(distances))  # NaN if any is


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__, repeats=5)
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--documents", type=int, default=200, help="documents of a turn")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_sizes", default="8,32", help="batch sizes of the peer")
    harness.add_device(parser)
    return parser.parse_args(argv)


def make_arms(args: argparse.Namespace, folder: pathlib.Path, file: str) -> list[harness.Arm]:
    """Returns the peer's arms, if it is installed, and ours as the last."""
    on_cpu = args.device == "cpu"
    shared = {
        "model": str(folder / "model"),
        "file": file,
        "count": args.documents,
        "dtype": args.dtype,
    }
    arms = []
    if not harness.missing("torch", "transformers", "sentence-transformers"):
        for size in harness.integers(args.batch_sizes):
            options = {"device": args.device, "batch_size": size, "max_length": args.max_length}
            for pages in (False, True) if on_cpu else (False,):
                vectors = str(folder / f"peer{size}{pages}")
                name = f"sentence-transformers, batches of {size}{', huge pages' * pages} (peer)"
                settings = {**shared, **options, "vectors": vectors}
                arms.append(harness.Arm(name, f"{__spec__.name}:peer", settings, pages))
    settings = {**shared, "vectors": str(folder / "ours")}
    arms.append(harness.Arm("ours", f"{__spec__.name}:ours", settings, huge_pages=on_cpu))
    return arms


def main(argv: list[str] | None = None) -> None:
    """Measures, compares and prints."""
    args = parse_arguments(argv)
    file = str(harness.data_file("MSMARCO_DIR", "collection.tsv"))
    notes = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        models.write_embedder(folder / "model", args.size, args.max_length)
        arms = make_arms(args, folder, file)
        results = harness.take_turns(arms, args.repeats)
        names = [pathlib.Path(arm.settings["vectors"]).name for arm in arms]
        distance = compare(folder, names, range(1, args.repeats + 1))
    if reason := harness.missing("torch", "transformers", "sentence-transformers"):
        notes.append(f"the peer is left out: {reason}")
    notes.append(f"largest distance of a document's vectors: {distance:.1e}")
    if not distance < TOLERANCE[args.dtype]:
        raise SystemExit(f"the arms do not compute the same: {notes[-1]}")
    medians = harness.medians(results)
    best = harness.fastest(medians, [name for name in medians if name != "ours"])
    rows = []
    for name, figures in medians.items():
        row = [
            name,
            f"{figures['documents_per_second']:.1f}",
            f"{figures['seconds']:.2f} s",
            f"{figures['gib']:.1f} GiB",
            f"{figures['spread']:.0%}",
            f"{harness.ratio(results, name, best):.2f} x" if name == "ours" and best else "",
        ]
        rows.append(row)
    title = (
        f"{args.size}, {args.dtype}, {args.documents} documents in a turn, {args.repeats} rounds"
    )
    harness.publish(title, COLUMNS, rows, notes, args.json)


if __name__ == "__main__":
    main()
