"""Contrastive training: pairs per second, beside sentence-transformers' multiple-negatives losses.

    MSMARCO_DIR=… python -m gemma_encoder.experiments.benchmarks.retrieval
        [--size=gemma3_270m] [--pairs=64] [--micro_batches=4] [--dtype=float32] [--device=cpu]

A step trains on pairs of a query and its relevant document, real texts with their real lengths, all
other documents of the batch as negatives: InfoNCE on cosines, temperature 0.05, mean pooling, AdamW
on every parameter, no dropout. All arms have the same weights, pairs and texts, which are truncated
to the same length; their losses are compared before timings count.

The peers are sentence-transformers' CachedMultipleNegativesRankingLoss, whose mini-batches hold as
many texts as our micro-batches, and with --whole_batch MultipleNegativesRankingLoss, which holds
the whole batch: it is faster where that fits, as nothing is computed twice.
Ours packs texts into rows and computes the same gradient by micro-batches. Peak memory grows with
`--pairs` in the arms that hold the whole batch only. Needs the extra `bench`; without it, only ours
runs.
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import harness, models

TASK = "msmarco_retrieval"
PROMPTS = {"query": "Query: ", "document": "Document: "}
TEMPERATURE = 0.05
# The mean over a batch of a loss of order one; bfloat16 has three digits, times 1 / temperature.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}
COLUMNS = ("arm", "pairs/s", "median", "peak memory", "spread", "against the peers")


def read_pairs(folder: str, turn: int, count: int) -> tuple[list[str], list[str]]:
    """Returns the queries of a turn and a relevant document of each, the same for every arm."""
    from gemma_encoder.data.files.lines import text_lines

    texts = []
    for name in ("queries.train.tsv", "collection.tsv"):
        lines = text_lines(pathlib.Path(folder) / name)
        texts.append(dict(line.split("\t", 1) for _, line in lines))
    judged = [line.split() for _, line in text_lines(pathlib.Path(folder) / "qrels.train.tsv")]
    positives = {qid: pid for qid, _, pid, grade in reversed(judged) if int(grade) > 0}
    pairs = sorted(positives.items())[turn * count : (turn + 1) * count]
    return [texts[0][qid] for qid, _ in pairs], [texts[1][pid] for _, pid in pairs]


def ours(
    model: str,
    folder: str,
    pairs: int,
    micro_batches: int,
    row_length: int,
    max_length: int,
    dtype: str,
    remat: str,
) -> harness.Turn:
    """Sets up our arm: a training step a turn, tokenization and packing included."""
    from gemma_encoder.inputs.batch import Batch, BatchShape

    first = read_pairs(folder, 0, pairs)
    shape = None
    program = state = None

    def run(turn: int) -> dict[str, float]:
        nonlocal program, state, shape
        texts = read_pairs(folder, turn, pairs)
        if program is None:
            segments = row_length // 8
            rows = rows_needed(model, first, micro_batches, row_length, max_length)
            shape = BatchShape(rows, row_length, segments, pairs // micro_batches, 2, 1)
            program, state = our_program(model, shape, micro_batches, pairs, dtype, remat)
        began = time.perf_counter()
        blocks = pack(model, texts, micro_batches, shape, max_length)
        batch = Batch(*(np.concatenate(field) for field in zip(*blocks, strict=True)))
        state, metrics = program.step(state, program.shard(batch))
        loss = float(metrics.loss)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "loss": loss, "pairs_per_second": pairs / seconds}

    return run


def encoded(model: str, texts: tuple[list[str], list[str]], max_length: int) -> list[list]:
    """Returns the token ids of queries and of documents, with their prompts."""
    from gemma_encoder.inputs.template import Template, encode
    from gemma_encoder.weights.backbone import load_tokenizer

    tokenizer = load_tokenizer(model)
    result = []
    for role, items in zip(PROMPTS, texts, strict=True):
        template = Template(PROMPTS[role] + "{text}")
        names = [f"{role} {index}" for index in range(len(items))]
        fields = [{"text": item} for item in items]
        result.append(
            [text.tokens for text in encode(tokenizer, template, fields, max_length, names)]
        )
    return result


def rows_needed(
    model: str,
    texts: tuple[list[str], list[str]],
    micro_batches: int,
    row_length: int,
    max_length: int,
) -> int:
    """Returns rows of a micro-batch that hold a batch's pairs with a tenth to spare."""
    tokens = sum(len(ids) for side in encoded(model, texts, max_length) for ids in side)
    return -(-int(tokens * 1.15) // (micro_batches * row_length)) + 1


def pack(
    model: str,
    texts: tuple[list[str], list[str]],
    micro_batches: int,
    shape,
    max_length: int,
) -> list:
    """Returns a packed batch for each micro-batch, with equally many pairs."""
    from gemma_encoder.inputs.packing import Packer, PackingGroup, Segment

    queries, documents = encoded(model, texts, max_length)
    count = len(queries) // micro_batches
    target = np.zeros(1, np.float32)
    blocks = []
    for micro_batch in range(micro_batches):
        packer = Packer(shape)
        # The longest first: so they fit.
        indices = range(micro_batch * count, (micro_batch + 1) * count)
        for index in sorted(indices, key=lambda i: -len(documents[i])):
            query = Segment(queries[index], 0, 0.0, index, 1, target)
            document = Segment(documents[index], 0, 1.0, index, 2, target)
            packer.add(PackingGroup((query, document), is_list=True))
        blocks.append(packer.emit())
        if len(packer):
            raise SystemExit("a micro-batch has too few rows for its pairs")
    return blocks


def our_program(model: str, shape, micro_batches: int, pairs: int, dtype: str, remat: str):
    """Returns our training program and its state from the export's weights."""
    import dataclasses

    import jax

    from gemma_encoder.model import sharding
    from gemma_encoder.model.config import HeadConfig
    from gemma_encoder.training import recipe
    from gemma_encoder.training.build import build
    from gemma_encoder.training.state import initial_state
    from gemma_encoder.training.step import make_program
    from gemma_encoder.weights.backbone import load_encoder

    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    spec, parameters = load_encoder(pathlib.Path(model), mesh)
    config = recipe.default_config()
    config.tasks = (TASK,)
    config.batch.rows = shape.rows * micro_batches
    config.batch.row_length = shape.row_length
    config.batch.segments = shape.segments
    config.batch.micro_batches = micro_batches
    config.batch.examples_per_step = pairs
    config.max_length = shape.row_length
    config.retrieval.negatives = 0
    config.loss_options.retrieval.temperature = TEMPERATURE
    config.model.pooling.normalize = True
    config.model.update({"compute_dtype": dtype, "remat": remat, "feed_forward_dropout": 0.0})
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "constant"
    built = build(config, dry=True)
    head = HeadConfig(spec.encoder.pooled_dim, "embedding")
    encoder = dataclasses.replace(
        spec.encoder,
        compute_dtype=dtype,
        remat=remat,
        heads={built.tasks[0].head: head},
    )
    groups = shape.groups * micro_batches
    whole = dataclasses.replace(shape, rows=shape.rows * micro_batches, groups=groups)
    built = dataclasses.replace(
        built,
        encoder=encoder,
        stream=dataclasses.replace(built.stream, shape=whole),
        losses=built.losses._replace(groups=shape.groups),
    )
    program = make_program(built, mesh, total=1_000_000, warmup=0)
    state = initial_state(encoder, program.optimizer, mesh, 0, parameters, program.is_trainable)
    return program, state


def peer(
    model: str,
    folder: str,
    pairs: int,
    mini_batch: int,
    max_length: int,
    dtype: str,
    device: str,
) -> harness.Turn:
    """Sets up an arm of sentence-transformers; a `mini_batch` of 0 holds the whole batch."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer, losses

    transformers.logging.set_verbosity_error()
    options = {"attn_implementation": models.attention(pathlib.Path(model)), "dtype": torch.float32}
    encoder = SentenceTransformer(model, device=device, model_kwargs=options)
    encoder.max_seq_length = max_length
    if mini_batch:
        loss = losses.CachedMultipleNegativesRankingLoss(
            encoder, scale=1 / TEMPERATURE, mini_batch_size=mini_batch
        )
    else:
        loss = losses.MultipleNegativesRankingLoss(encoder, scale=1 / TEMPERATURE)
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
    )
    encoder.train()

    def run(turn: int) -> dict[str, float]:
        texts = read_pairs(folder, turn, pairs)
        began = time.perf_counter()
        features = []
        for role, side in zip(PROMPTS, texts, strict=True):
            columns = encoder.tokenize([PROMPTS[role] + text for text in side])
            features.append(
                {name: x.to(device) if torch.is_tensor(x) else x for name, x in columns.items()}
            )
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            value = loss(features, torch.arange(pairs, device=device))
        value.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        result = float(value.detach())
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "loss": result, "pairs_per_second": pairs / seconds}

    return run


def make_arms(args: argparse.Namespace, model: pathlib.Path, folder: str) -> list[harness.Arm]:
    """Returns the peer's arms, if it is installed, and ours as the last."""
    shared = {
        "model": str(model),
        "folder": folder,
        "pairs": args.pairs,
        "max_length": args.max_length,
        "dtype": args.dtype,
    }
    on_cpu = args.device == "cpu"
    arms = []
    if not harness.missing("torch", "transformers", "sentence-transformers"):
        texts = 2 * args.pairs // args.micro_batches
        whole = (("whole batch", 0),) if args.whole_batch else ()
        for name, size in ((f"cached, mini-batches of {texts}", texts), *whole):
            settings = {**shared, "mini_batch": size, "device": args.device}
            function = f"{__spec__.name}:peer"
            arms.append(harness.Arm(f"sentence-transformers, {name} (peer)", function, settings))
            if on_cpu:
                # Our programs start themselves with huge pages; this is what the peer gains by it.
                title = f"sentence-transformers, {name}, huge pages (peer)"
                arms.append(harness.Arm(title, function, settings, huge_pages=True))
    settings = {
        **shared,
        "micro_batches": args.micro_batches,
        "row_length": args.row_length,
        "remat": args.remat,
    }
    arms.append(harness.Arm("ours", f"{__spec__.name}:ours", settings, huge_pages=on_cpu))
    return arms


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__, repeats=5)
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of a global batch")
    parser.add_argument("--micro_batches", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a text at most")
    parser.add_argument("--row_length", type=int, default=256, help="ours: tokens of a row")
    parser.add_argument(
        "--whole_batch", action="store_true", help="adds arms: the peer without mini-batches"
    )
    parser.add_argument("--remat", default="none", help="ours: the rematerialization policy")
    harness.add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures, compares and prints."""
    args = parse_arguments(argv)
    if args.pairs % args.micro_batches:
        raise SystemExit(f"--pairs={args.pairs} must be a multiple of {args.micro_batches}")
    folder = str(harness.data_file("MSMARCO_DIR", "queries.train.tsv").parent)
    notes = []
    with tempfile.TemporaryDirectory() as temporary:
        model = pathlib.Path(temporary) / "model"
        models.write_embedder(model, args.size, args.max_length)
        arms = make_arms(args, model, folder)
        results = harness.take_turns(arms, args.repeats)
    if reason := harness.missing("torch", "transformers", "sentence-transformers"):
        notes.append(f"the peer is left out: {reason}")
    difference = harness.same("training step", results, "loss", TOLERANCE[args.dtype])
    notes.append(f"largest difference of a loss: {difference:.1e}")
    peers = [arm.name for arm in arms[:-1]]
    rows = []
    for name, figures in harness.medians(results).items():
        speedups = [harness.ratio(results, name, peer) for peer in peers] if name == "ours" else []
        row = [
            name,
            f"{figures['pairs_per_second']:.2f}",
            f"{figures['seconds']:.2f} s",
            f"{figures['gib']:.1f} GiB",
            f"{figures['spread']:.0%}",
            ", ".join(f"{speedup:.2f} x" for speedup in speedups),
        ]
        rows.append(row)
    title = (
        f"{args.size}, {args.dtype}, {args.pairs} pairs in {args.micro_batches} micro-batches, "
        f"texts of at most {args.max_length} tokens, {args.repeats} rounds"
    )
    harness.publish(title, COLUMNS, rows, notes, args.json)


if __name__ == "__main__":
    main()
