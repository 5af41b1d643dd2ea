"""Re-ranking: query-document pairs per second from text to score, beside CrossEncoder.

    MSMARCO_DIR=… python -m gemma_encoder.experiments.benchmarks.rerank
        [--size=gemma3_270m] [--queries=2] [--dtype=float32] [--device=cpu]

Lists of 100 as the first stage gives them, with their real lengths. A turn scores the lists of some
queries that no earlier turn used, tokenizing included. Both arms have the same weights and a linear
head on the last token, and get the same text, `Query: … Document: …`, truncated at the document's
end to the same length.

The peer is sentence-transformers' CrossEncoder. It takes the text as a pair, "Query: …" and
" Document: …", which its tokenizer concatenates, and it sorts by length within a call. It has an
arm for each of `--batch_sizes`; ours is compared with the best of them. Scores are compared text by
text before timings count. Needs the extra `bench`; without it, only ours runs.
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np

from gemma_encoder.data.files.lines import text_lines
from gemma_encoder.experiments.benchmarks import harness, models

TASK = "msmarco"
TEMPLATE = "Query: {query} Document: {document}"  # copied: the task's module is slow to import
# Largest difference of a score, in units of the scores' standard deviation.
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.3}
COLUMNS = ("arm", "pairs/s", "median", "peak memory", "spread", "against the best peer")


def read_lists(file: pathlib.Path) -> list[tuple[str, list[str]]]:
    """Reads each query with its documents.

    Args:
        file: `top100.dev.tsv` or `top1000.dev.tsv`: qid, pid, query, passage.
    """
    lists: dict[str, tuple[str, list[str]]] = {}
    for _, line in text_lines(file):
        qid, _, query, passage = line.split("\t")
        lists.setdefault(qid, (query, []))[1].append(passage)
    return list(lists.values())


def pairs_of(file: str, turn: int, queries: int, documents: int) -> list[tuple[str, str]]:
    """Returns the pairs of a turn, the same for every arm.

    Turns past the end of the file start over at its beginning.
    """
    lists = read_lists(pathlib.Path(file))
    indices = range(turn * queries, (turn + 1) * queries)
    return [
        (query, document)
        for query, passages in (lists[index % len(lists)] for index in indices)
        for document in passages[:documents]
    ]


def as_pair(query: str, document: str) -> tuple[str, str]:
    """Returns two texts whose concatenation is the template's text."""
    first, second = TEMPLATE.split(" Document:")
    return first.format(query=query), " Document:" + second.format(document=document)


def ours(model: str, texts: dict, scores: str, dtype: str) -> harness.Turn:
    """Sets up our arm; each turn writes its scores to "{scores}.{turn}.npy"."""
    import dataclasses

    import gemma_encoder as ge

    loaded = ge.Predictor.load(model)
    encoder = dataclasses.replace(loaded.spec.encoder, compute_dtype=dtype)
    predictor = ge.Predictor(dataclasses.replace(loaded.spec, encoder=encoder), loaded.parameters)

    def run(turn: int) -> dict[str, float]:
        pairs = pairs_of(turn=turn, **texts)
        began = time.perf_counter()
        predicted = predictor.predict(pairs)
        seconds = time.perf_counter() - began
        np.save(f"{scores}.{turn}.npy", predicted)
        return {"seconds": seconds, "pairs_per_second": len(pairs) / seconds}

    return run


def peer(
    model: str,
    texts: dict,
    scores: str,
    dtype: str,
    device: str,
    batch_size: int,
    max_length: int,
    attention: str,
) -> harness.Turn:
    """Sets up the arm of sentence-transformers; writes scores as `ours` does."""
    import torch
    import transformers
    from sentence_transformers import CrossEncoder

    transformers.logging.set_verbosity_error()
    settings = {
        "dtype": getattr(torch, dtype),
        "attn_implementation": attention or models.attention(pathlib.Path(model)),
    }
    encoder = CrossEncoder(
        model,
        device=device,
        max_length=max_length,
        model_kwargs=settings,
        activation_fn=torch.nn.Identity(),
    )

    def run(turn: int) -> dict[str, float]:
        pairs = pairs_of(turn=turn, **texts)
        began = time.perf_counter()
        predicted = encoder.predict(
            [as_pair(*pair) for pair in pairs], batch_size=batch_size, show_progress_bar=False
        )
        seconds = time.perf_counter() - began
        np.save(f"{scores}.{turn}.npy", predicted.astype(np.float32))
        return {"seconds": seconds, "pairs_per_second": len(pairs) / seconds}

    return run


def compare(folder: pathlib.Path, names: list[str], turns: range) -> float:
    """Returns the largest difference of a text's score between the first arm and any other.

    In units of the standard deviation of the first arm's scores.
    """
    differences = [0.0]
    for turn in turns:
        first, *others = (np.load(folder / f"{name}.{turn}.npy") for name in names)
        for scores in others:
            differences.append(float(np.abs(scores - first).max() / first.std()))
    return float(np.max(differences))  # NaN if any is


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument(
        "--file",
        type=pathlib.Path,
        help="lists with their texts; by default $MSMARCO_DIR/top100.dev.tsv",
    )
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--queries", type=int, default=1, help="queries per turn")
    parser.add_argument("--documents", type=int, default=100, help="most documents per query")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_sizes", default="8,32", help="batch sizes of the peer")
    parser.add_argument(
        "--peer_attention",
        default="",
        help="the peer's implementation, e.g. flex_attention; by default sdpa, or eager with a "
        "soft cap",
    )
    harness.add_device(parser)
    return parser.parse_args(argv)


def make_peers(args: argparse.Namespace, folder: pathlib.Path, texts: dict) -> list[harness.Arm]:
    """Writes the peer's model and returns an arm for each batch size."""
    models.as_sequence_classifier(folder / "model", folder / "peer", 1)
    arms = []
    for size in harness.integers(args.batch_sizes):
        settings = {
            "model": str(folder / "peer"),
            "texts": texts,
            "scores": str(folder / f"peer{size}"),
            "dtype": args.dtype,
            "device": args.device,
            "batch_size": size,
            "max_length": args.max_length,
            "attention": args.peer_attention,
        }
        name = f"CrossEncoder, batches of {size} (peer)"
        arms.append(harness.Arm(name, f"{__spec__.name}:peer", settings))
    return arms


def check_scores(folder: pathlib.Path, arms: list[harness.Arm], repeats: int, dtype: str) -> str:
    """Returns a note on the largest difference of a score.

    Raises:
        SystemExit: the difference is not below the tolerance, so times would compare different
            work.
    """
    names = [pathlib.Path(arm.settings["scores"]).name for arm in arms]
    difference = compare(folder, names, range(1, repeats + 1))
    note = f"largest difference of a score: {difference:.1e} of the scores' standard deviation"
    if not difference < TOLERANCE[dtype]:
        raise SystemExit(f"the arms do not compute the same: {note}")
    return note


def main(argv: list[str] | None = None) -> None:
    """Measures, compares and prints."""
    args = parse_arguments(argv)
    file = args.file or harness.data_file("MSMARCO_DIR", "top100.dev.tsv")
    texts = {"file": str(file), "queries": args.queries, "documents": args.documents}
    notes = []
    arms = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        models.write(folder / "model", args.size, args.max_length, TASK, "last_k")
        if reason := harness.missing("torch", "transformers", "sentence-transformers"):
            notes.append(f"the peer is left out: {reason}")
        else:
            arms += make_peers(args, folder, texts)
        settings = {
            "model": str(folder / "model"),
            "texts": texts,
            "scores": str(folder / "ours"),
            "dtype": args.dtype,
        }
        arms.append(harness.Arm("ours", f"{__spec__.name}:ours", settings))
        results = harness.take_turns(arms, args.repeats)
        if len(arms) > 1:
            notes.append(check_scores(folder, arms, args.repeats, args.dtype))
    medians = harness.medians(results)
    best = harness.fastest(medians, [name for name in medians if name != "ours"])
    rows = []
    for name, figures in medians.items():
        row = [
            name,
            f"{figures['pairs_per_second']:.1f}",
            f"{figures['seconds']:.2f} s",
            f"{figures['gib']:.1f} GiB",
            f"{figures['spread']:.0%}",
            f"{harness.ratio(results, name, best):.2f} x" if name == "ours" and best else "",
        ]
        rows.append(row)
    title = (
        f"{args.size}, {args.dtype}, {args.queries} list(s) of {args.documents} in a turn, "
        f"{args.repeats} rounds"
    )
    harness.publish(title, COLUMNS, rows, notes, args.json)


if __name__ == "__main__":
    main()
