"""Fine-tuning on SST-2's real texts: packed rows beside the peer's padded batches.

    TFDS_DATA_DIR=… python -m gemma_encoder.experiments.benchmarks.finetune_sst2
        [--size=gemma3_270m] [--rows=8] [--dtype=float32] [--device=cpu]

Texts are tokenized ahead of time. The peer is transformers' model in PyTorch, with batches as its
Trainer makes them: random texts padded to the longest of the batch, and texts of similar length
together (its LengthGroupedSampler). Ours packs the texts into rows of 128 tokens.

An update of each arm sees as many texts as a batch of ours holds on average. Full fine-tuning with
AdamW, no dropout. Needs the extra `bench`.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma_encoder.experiments.benchmarks import harness, models

if TYPE_CHECKING:
    from gemma_encoder.inputs.batch import Batch

ROW = 128
SEGMENTS = 12
COLUMNS = (
    "arm",
    "texts/s",
    "texts per update",
    "real tokens",
    "mean loss",
    "peak memory",
    "against the peers",
)


def write_tokens(file: pathlib.Path, count: int) -> None:
    """Writes token ids and labels of SST-2's first texts, tokenized as our recipe does."""
    from gemma_encoder.data import registry
    from gemma_encoder.inputs.template import encode
    from gemma_encoder.inputs.tokenizer import Tokenizer

    source = registry.get(models.TASK)
    indices = range(min(count, source.size("train")))
    examples = [example for index in indices for example in source.examples("train", index)]
    fields = [example.fields for example in examples]
    encoded = encode(Tokenizer.load("small"), source.task.template, fields, ROW, "SST-2")
    np.savez(
        file,
        tokens=np.concatenate([text.tokens for text in encoded]),
        lengths=np.array([len(text.tokens) for text in encoded]),
        labels=np.array([example.label for example in examples]),
    )


def read_tokens(file: pathlib.Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the token ids of each text, and labels [N]."""
    stored = np.load(file)
    return np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1]), stored["labels"]


def packed_batches(file: pathlib.Path, rows: int) -> "Iterator[Batch]":
    """Yields our batches endlessly, in a new order each epoch."""
    from gemma_encoder.inputs.batch import BatchShape
    from gemma_encoder.inputs.packing import Packer, PackingGroup, Segment

    texts, labels = read_tokens(file)
    packer = Packer(BatchShape(rows, ROW, SEGMENTS))
    rng = np.random.default_rng(0)
    while True:
        for index in rng.permutation(len(texts)):
            segment = Segment(texts[index], 0, float(labels[index]), int(index))
            packer.add(PackingGroup((segment,)))
            while packer.ready:
                yield packer.emit()


def texts_per_batch(file: pathlib.Path, rows: int, batches: int) -> int:
    """Returns the mean number of texts in our first batches, rounded."""
    stream = packed_batches(file, rows)
    counts = [(next(stream).weight > 0).sum() for _ in range(batches)]
    return round(float(np.mean(counts)))


def ours(
    folder: pathlib.Path,
    tokens: pathlib.Path,
    rows: int,
    texts: int,
    updates: int,
    dtype: str,
    remat: str,
) -> harness.Turn:
    """Sets up our arm."""
    program, state = models.our_program(folder, rows, ROW, SEGMENTS, texts, dtype, remat)
    batches = packed_batches(tokens, rows)

    def run(turn: int) -> dict[str, float]:
        nonlocal state
        count = 0
        real = 0
        losses = []
        began = time.perf_counter()
        for _ in range(updates):
            batch = next(batches)
            count += int((batch.weight > 0).sum())
            real += int((batch.segment_ids > 0).sum())
            state, metrics = program.step(state, program.shard(batch))
            losses.append(metrics.loss)
        loss = float(np.mean([float(loss) for loss in losses]))  # waits for the last update
        seconds = time.perf_counter() - began
        return {
            "texts_per_second": count / seconds,
            "texts": count / updates,
            "real": real / (updates * rows * ROW),
            "loss": loss,
        }

    return run


def peer_batches(lengths: Sequence[int], texts: int, grouped: bool) -> Iterator[list[int]]:
    """Yields the indices of the texts of each batch endlessly, in a new order each epoch.

    Args:
        lengths: tokens of each text.
        texts: number of texts in a batch.
        grouped: whether a batch holds texts of similar length.
    """
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    generator = torch.Generator().manual_seed(0)
    while True:
        if grouped:
            sampler = LengthGroupedSampler(texts, lengths=lengths, generator=generator)
        else:
            sampler = torch.randperm(len(lengths), generator=generator)
        order = [int(index) for index in sampler]
        starts = range(0, len(order) - texts + 1, texts)
        batches = [order[start : start + texts] for start in starts]
        batch_order = range(len(batches))
        if grouped:
            # The sampler yields the longest batches first within each of its large groups. Without
            # a new order, a few updates would see long texts only.
            batch_order = torch.randperm(len(batches), generator=generator)
        for index in batch_order:
            yield batches[int(index)]


def peer(
    folder: pathlib.Path,
    tokens: pathlib.Path,
    texts: int,
    updates: int,
    dtype: str,
    device: str,
    grouped: bool,
) -> harness.Turn:
    """Sets up the arm of Hugging Face transformers."""
    model = models.TorchEncoder(folder, device, dtype)
    ids, labels = read_tokens(tokens)
    lengths = [len(text) for text in ids]
    batches = peer_batches(lengths, texts, grouped)

    def run(turn: int) -> dict[str, float]:
        losses = []
        real = 0
        total = 0
        began = time.perf_counter()
        for _ in range(updates):
            indices = next(batches)
            longest = max(lengths[index] for index in indices)
            padded = np.zeros((texts, longest), np.int64)
            mask = np.zeros((texts, longest), np.int64)
            for row, index in enumerate(indices):
                padded[row, : lengths[index]] = ids[index]
                mask[row, : lengths[index]] = 1
            losses.append(model.step(padded, mask, labels[indices]))
            real += int(mask.sum())
            total += mask.size
        seconds = time.perf_counter() - began
        return {
            "texts_per_second": texts * updates / seconds,
            "texts": texts,
            "real": real / total,
            "loss": float(np.mean(losses)),
        }

    return run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--rows", type=int, default=8, help="ours: rows of a batch")
    parser.add_argument("--updates", type=int, default=4, help="updates per turn")
    parser.add_argument("--texts", type=int, default=8000, help="texts of SST-2 to use")
    parser.add_argument("--remat", default="none", help="ours: the rematerialization policy")
    harness.add_device(parser)
    return parser.parse_args(argv)


def make_arms(
    args: argparse.Namespace, folder: pathlib.Path, tokens: pathlib.Path
) -> list[harness.Arm]:
    """Returns two arms of the peer and ours, in this order."""
    shared = {
        "folder": folder,
        "tokens": tokens,
        "texts": texts_per_batch(tokens, args.rows, batches=50),
        "updates": args.updates,
        "dtype": args.dtype,
    }
    peer_settings = {**shared, "device": args.device}
    our_settings = {**shared, "rows": args.rows, "remat": args.remat}
    return [
        harness.Arm(
            "transformers, dynamic padding (peer)",
            f"{__spec__.name}:peer",
            {**peer_settings, "grouped": False},
        ),
        harness.Arm(
            "transformers, grouped by length (peer)",
            f"{__spec__.name}:peer",
            {**peer_settings, "grouped": True},
        ),
        harness.Arm(
            "ours, packed",
            f"{__spec__.name}:ours",
            our_settings,
            huge_pages=args.device == "cpu",
        ),
    ]


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "model"
        tokens = pathlib.Path(temporary) / "tokens.npz"
        write_tokens(tokens, args.texts)
        arms = make_arms(args, folder, tokens)
        models.write(folder, args.size, ROW)
        results = harness.take_turns(arms, args.repeats)
    *peers, our_arm = (arm.name for arm in arms)
    rows = []
    for name, figures in harness.medians(results).items():
        speedups = []
        if name == our_arm:
            speedups = [
                1 / harness.ratio(results, our_arm, peer_name, "texts_per_second")
                for peer_name in peers
            ]
        row = [
            name,
            f"{figures['texts_per_second']:.1f}",
            f"{figures['texts']:.0f}",
            f"{figures['real']:.1%}",
            f"{figures['loss']:.3f}",
            f"{figures['gib']:.1f} GiB",
            ", ".join(f"{speedup:.2f} x" for speedup in speedups),
        ]
        rows.append(row)
    title = f"SST-2, {args.size}, {args.dtype}, {args.repeats} rounds of {args.updates} updates"
    harness.publish(title, COLUMNS, rows, file=args.json)


if __name__ == "__main__":
    main()
