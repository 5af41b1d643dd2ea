"""Re-ranking: query-document pairs a second from text to score, ours beside sentence-transformers' CrossEncoder on the same weights.

    MSMARCO_DIR=… python -m gemma_encoder.experiments.benchmarks.rerank [--size=gemma3_270m] [--queries=2] [--dtype=float32] [--device=cpu]

Lists of 100 as the first stage gives them, with their real lengths; a turn scores the lists of some queries that no turn before has
seen, tokenising included. Both arms get the same text, `Query: … Document: …`, cut at the document's end to the same length, and
score by a linear head on the last token. CrossEncoder takes it as a pair, "Query: …" and " Document: …", which its tokenizer puts together
without anything between. It sorts by length within a call; it has an arm for each of `--batch_sizes`, and the best of them is
what ours is compared with. Scores are compared text by text before timings count. Needs the extra `bench`
(without it, ours runs alone).
"""

import pathlib
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import harness, models

TASK = "msmarco"
TEMPLATE = "Query: {query} Document: {document}"  # the task's own, whose module is heavy to import


def read_lists(file: pathlib.Path) -> list[tuple[str, list[str]]]:
    """Each query with its documents, from `top100.dev.tsv` (or `top1000.dev.tsv`): qid, pid, query, passage."""
    lists: dict[str, tuple[str, list[str]]] = {}
    for line in file.read_text().splitlines():
        number, _, query, passage = line.split("\t")
        lists.setdefault(number, (query, []))[1].append(passage)
    return list(lists.values())


def pairs_of(file: str, turn: int, queries: int, documents: int) -> list[tuple[str, str]]:
    """The pairs of a turn, the same for every arm; turns beyond the file's end begin at its start again."""
    lists = read_lists(pathlib.Path(file))
    chosen = [lists[number % len(lists)] for number in range(turn * queries, (turn + 1) * queries)]
    return [(query, document) for query, found in chosen for document in found[:documents]]


def as_pair(query: str, document: str) -> tuple[str, str]:
    """Two texts that make the template's text when they stand one behind the other."""
    first, second = TEMPLATE.split(" Document:")
    return first.format(query=query), " Document:" + second.format(document=document)


def ours(model: str, texts: dict, scores: str, dtype: str) -> harness.Turn:
    """Our arm."""
    import dataclasses

    import gemma_encoder as ge

    loaded = ge.Predictor.load(model)
    encoder = dataclasses.replace(loaded.spec.encoder, compute_dtype=dtype)
    predictor = ge.Predictor(dataclasses.replace(loaded.spec, encoder=encoder), loaded.parameters)

    def run(turn: int) -> dict[str, float]:
        pairs = pairs_of(turn=turn, **texts)
        began = time.perf_counter()
        said = predictor.predict(pairs)
        seconds = time.perf_counter() - began
        np.save(f"{scores}.{turn}.npy", said)
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
    """The arm of sentence-transformers."""
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
        said = encoder.predict(
            [as_pair(*pair) for pair in pairs], batch_size=batch_size, show_progress_bar=False
        )
        seconds = time.perf_counter() - began
        np.save(f"{scores}.{turn}.npy", said.astype(np.float32))
        return {"seconds": seconds, "pairs_per_second": len(pairs) / seconds}

    return run


def compare(folder: pathlib.Path, names: list[str], turns: range) -> float:
    """The largest difference of a text's score between the first arm and any other, in units of the scores' standard deviation."""
    largest = 0.0
    for turn in turns:
        first, *rest = (np.load(folder / f"{name}.{turn}.npy") for name in names)
        largest = max(
            [largest, *(float(np.abs(other - first).max() / first.std()) for other in rest)]
        )
    return largest


def main(argv: list[str] | None = None) -> None:
    """Measures, compares, prints."""
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument(
        "--file",
        type=pathlib.Path,
        help="lists with their texts; by default $MSMARCO_DIR/top100.dev.tsv",
    )
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--queries", type=int, default=1, help="in a turn")
    parser.add_argument("--documents", type=int, default=100, help="of each query at most")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_sizes", default="8,32", help="of the peer")
    parser.add_argument(
        "--peer_attention",
        default="",
        help="the peer's, e.g. flex_attention; by default sdpa, or eager with a soft cap",
    )
    harness.add_device(parser)
    args = parser.parse_args(argv)
    file = args.file or harness.data_file("MSMARCO_DIR", "top100.dev.tsv")
    texts = {"file": str(file), "queries": args.queries, "documents": args.documents}
    notes, arms = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        models.write(folder / "model", args.size, args.max_length, TASK, "last_k")
        if reason := harness.missing("torch", "transformers", "sentence-transformers"):
            notes.append(f"the peer is left out: {reason}")
        else:
            models.as_sequence_classifier(folder / "model", folder / "peer", 1)
            for size in (int(text) for text in args.batch_sizes.split(",")):
                settings = {
                    "model": str(folder / "peer"),
                    "texts": texts,
                    "scores": str(folder / f"peer{size}"),
                    "dtype": args.dtype,
                }
                settings |= {
                    "device": args.device,
                    "batch_size": size,
                    "max_length": args.max_length,
                    "attention": args.peer_attention,
                }
                arms.append(
                    harness.Arm(
                        f"CrossEncoder, batches of {size} (peer)", f"{__spec__.name}:peer", settings
                    )
                )
        settings = {
            "model": str(folder / "model"),
            "texts": texts,
            "scores": str(folder / "ours"),
            "dtype": args.dtype,
        }
        arms.append(harness.Arm("ours", f"{__spec__.name}:ours", settings))
        seen = harness.take_turns(arms, args.repeats)
        if len(arms) > 1:
            difference = compare(
                folder,
                [pathlib.Path(arm.settings["scores"]).name for arm in arms],
                range(1, args.repeats + 1),
            )
            notes.append(
                f"largest difference of a score: {difference:.1e} of the scores' standard deviation"
            )
            if not difference < (0.3 if args.dtype == "bfloat16" else 1e-2):
                raise SystemExit(f"the arms do not compute the same: {notes[-1]}")
    found = harness.medians(seen)
    best = min(
        (name for name in found if name != "ours"),
        key=lambda name: found[name]["seconds"],
        default=None,
    )
    rows = []
    for name, figures in found.items():
        against = f"{harness.ratio(seen, 'ours', best):.2f} x" if name == "ours" and best else ""
        rows.append(
            [
                name,
                f"{figures['pairs_per_second']:.1f}",
                f"{figures['seconds']:.2f} s",
                f"{figures['gib']:.1f} GiB",
                f"{figures['spread']:.0%}",
                against,
            ]
        )
    title = f"{args.size}, {args.dtype}, {args.queries} list(s) of {args.documents} in a turn, {args.repeats} rounds"
    harness.publish(
        title,
        ["arm", "pairs/s", "median", "peak memory", "spread", "against the best peer"],
        rows,
        notes,
        args.json,
    )


if __name__ == "__main__":
    main()
