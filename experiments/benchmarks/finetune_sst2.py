"""Fine-tuning on SST-2's real texts: packed rows beside the peer's padded batches, the same texts per update, tokens made ahead.

    TFDS_DATA_DIR=… python -m gemma_encoder.experiments.benchmarks.finetune_sst2 [--size=gemma3_270m] [--rows=8] [--dtype=float32] [--device=cpu]

The peer is transformers' model under PyTorch, its batches as its Trainer makes them: random texts padded to the longest of the batch,
and texts of like length together (its LengthGroupedSampler). Ours packs the texts into rows of 128. An update of each arm sees as many
texts as ours holds on average; full fine-tuning by AdamW, no dropout. Needs the extra `bench`.
"""

import pathlib
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import harness, models

ROW = 128
SEGMENTS = 12


def write_tokens(file: pathlib.Path, count: int) -> None:
    """Token ids and labels of SST-2's first texts, tokenised as our recipe does, as `Trainer` and our packer both take them."""
    from gemma_encoder.data import registry
    from gemma_encoder.inputs.template import encode
    from gemma_encoder.inputs.tokenizer import Tokenizer

    source = registry.get(models.TASK)
    indices = range(min(count, source.size("train")))
    examples = [example for index in indices for example in source.examples("train", index)]
    encoded = encode(
        Tokenizer.load("small"),
        source.task.template,
        [example.fields for example in examples],
        ROW,
        "SST-2",
    )
    lengths = np.array([len(text.tokens) for text in encoded])
    np.savez(
        file,
        tokens=np.concatenate([text.tokens for text in encoded]),
        lengths=lengths,
        labels=np.array([example.label for example in examples]),
    )


def read_tokens(file: pathlib.Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Token ids of each text, and labels [N]."""
    stored = np.load(file)
    return np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1]), stored["labels"]


def packed_batches(file: pathlib.Path, rows: int):
    """Our batches, without end, in a new order each epoch."""
    from gemma_encoder.inputs.batch import BatchShape
    from gemma_encoder.inputs.packing import Packer, PackingGroup, Segment

    texts, labels = read_tokens(file)
    packer, rng = Packer(BatchShape(rows, ROW, SEGMENTS)), np.random.default_rng(0)
    while True:
        for number in rng.permutation(len(texts)):
            packer.add(
                PackingGroup((Segment(texts[number], 0, float(labels[number]), int(number)),))
            )
            while packer.ready:
                yield packer.emit()


def ours(
    folder: pathlib.Path,
    tokens: pathlib.Path,
    rows: int,
    texts: int,
    updates: int,
    dtype: str,
    remat: str,
) -> harness.Turn:
    """Our arm."""
    program, state = models.our_program(folder, rows, ROW, SEGMENTS, texts, dtype, remat)
    held, batches = [state], packed_batches(tokens, rows)
    del state

    def run(turn: int) -> dict[str, float]:
        count, losses, real, began = 0, [], 0, time.perf_counter()
        for _ in range(updates):
            batch = next(batches)
            count, real = (
                count + int((batch.weight > 0).sum()),
                real + int((batch.segment_ids > 0).sum()),
            )
            held[0], metrics = program.step(held[0], program.shard(batch))
            losses.append(metrics.loss)
        last = [float(loss) for loss in losses]
        seconds = time.perf_counter() - began
        return {
            "texts_per_second": count / seconds,
            "texts": count / updates,
            "real": real / (updates * rows * ROW),
            "loss": float(np.mean(last)),
        }

    return run


def peer(
    folder: pathlib.Path,
    tokens: pathlib.Path,
    texts: int,
    updates: int,
    dtype: str,
    device: str,
    grouped: bool,
) -> harness.Turn:
    """The arm of Hugging Face transformers."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    model = models.TorchEncoder(folder, device, dtype)
    ids, labels = read_tokens(tokens)
    lengths = [len(text) for text in ids]
    generator = torch.Generator().manual_seed(0)

    def batches():
        while True:
            sampler = (
                LengthGroupedSampler(texts, lengths=lengths, generator=generator)
                if grouped
                else torch.randperm(len(ids), generator=generator)
            )
            order = [int(number) for number in sampler]
            chosen = [
                order[start : start + texts] for start in range(0, len(order) - texts + 1, texts)
            ]
            # Grouped batches come longest first within each of the sampler's large groups; their order is drawn anew, or few updates would all be long.
            for place in (
                torch.randperm(len(chosen), generator=generator) if grouped else range(len(chosen))
            ):
                yield chosen[int(place)]

    endless = batches()

    def run(turn: int) -> dict[str, float]:
        losses, real, whole, began = [], 0, 0, time.perf_counter()
        for _ in range(updates):
            members = next(endless)
            longest = max(lengths[number] for number in members)
            padded, mask = (
                np.zeros((texts, longest), np.int64),
                np.zeros((texts, longest), np.int64),
            )
            for place, number in enumerate(members):
                padded[place, : lengths[number]], mask[place, : lengths[number]] = ids[number], 1
            losses.append(model.step(padded, mask, labels[members]))
            real, whole = real + int(mask.sum()), whole + mask.size
        seconds = time.perf_counter() - began
        return {
            "texts_per_second": texts * updates / seconds,
            "texts": texts,
            "real": real / whole,
            "loss": float(np.mean(losses)),
        }

    return run


def main() -> None:
    """Measures and prints."""
    parser = harness.parser(__doc__)
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--updates", type=int, default=4, help="in a turn")
    parser.add_argument("--texts", type=int, default=8000, help="of SST-2 that are used")
    parser.add_argument(
        "--remat", default="none", help="ours: what the backward pass computes again"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, tokens = pathlib.Path(temporary) / "model", pathlib.Path(temporary) / "tokens.npz"
        write_tokens(tokens, args.texts)
        stream = packed_batches(tokens, args.rows)
        texts = round(float(np.mean([(next(stream).weight > 0).sum() for _ in range(50)])))
        models.write(folder, args.size, ROW)
        shared = {
            "folder": folder,
            "tokens": tokens,
            "texts": texts,
            "updates": args.updates,
            "dtype": args.dtype,
        }
        arms = [
            harness.Arm(
                "transformers, dynamic padding (peer)",
                f"{__spec__.name}:peer",
                {**shared, "device": args.device, "grouped": False},
            ),
            harness.Arm(
                "transformers, grouped by length (peer)",
                f"{__spec__.name}:peer",
                {**shared, "device": args.device, "grouped": True},
            ),
            harness.Arm(
                "ours, packed",
                f"{__spec__.name}:ours",
                {**shared, "rows": args.rows, "remat": args.remat},
                huge_pages=args.device == "cpu",
            ),
        ]
        seen = harness.take_turns(arms, args.repeats)
    rows = []
    for name, found in harness.medians(seen).items():
        rates = (
            [
                1 / harness.ratio(seen, arms[2].name, arm.name, "texts_per_second")
                for arm in arms[:2]
            ]
            if name == arms[2].name
            else []
        )
        against = ", ".join(f"{rate:.2f} x" for rate in rates)
        rows.append(
            [
                name,
                f"{found['texts_per_second']:.1f}",
                f"{found['texts']:.0f}",
                f"{found['real']:.1%}",
                f"{found['loss']:.3f}",
                f"{found['gib']:.1f} GiB",
                against,
            ]
        )
    columns = [
        "arm",
        "texts/s",
        "texts per update",
        "real tokens",
        "mean loss",
        "peak memory",
        "against the peers",
    ]
    harness.publish(
        f"SST-2, {args.size}, {args.dtype}, {args.repeats} rounds of {args.updates} updates",
        columns,
        rows,
        file=args.json,
    )


if __name__ == "__main__":
    main()
