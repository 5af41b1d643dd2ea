"""A forward pass and a training step of a whole encoder, ours beside Hugging Face transformers', on the same weights and tokens.

    python -m gemma_encoder.experiments.benchmarks.train_step \
        [--size=gemma3_270m] [--rows=16] [--length=128] [--steps=4] [--dtype=float32] [--device=cpu] [--compiled]

Full fine-tuning: every parameter is trained by AdamW (float32 moments), gradients are clipped, no dropout. Rows are full: nothing is won by
packing here. A turn is `--steps` batches one after another, as in training; times are of one batch. Before timings count, scores and the losses
of the first steps are compared. Needs the extra `bench`.
"""

import pathlib
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import harness, models

LAST_TOKEN = 8_000  # of the small tokenizer: ids are drawn below it


def inputs(number: int, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, L] and labels [B] of a batch, the same for every arm."""
    rng = np.random.default_rng(number)
    return rng.integers(5, LAST_TOKEN, (rows, length)).astype(np.int32), rng.integers(0, 2, rows)


def in_a_row(step: harness.Turn, steps: int) -> harness.Turn:
    """Turns of so many batches, each with the mean figures of a batch.

    Where a machine is virtual, its host may take back the memory that a step gave back, if nothing asks for it for some seconds: the first
    step after a pause then pays for it again, which one in the middle of training does not.
    """

    def run(turn: int) -> dict[str, float]:
        began = time.perf_counter()
        seen = [step(turn * steps + number) for number in range(steps)]
        seconds = (time.perf_counter() - began) / steps
        return {"seconds": seconds} | {
            name: float(np.mean([one[name] for one in seen])) for name in seen[0]
        }

    return run


def ours(
    folder: pathlib.Path, rows: int, length: int, steps: int, dtype: str, train: bool, remat: str
) -> harness.Turn:
    """Our arm."""
    import jax

    from gemma_encoder.evaluation.forward import compile_forward
    from gemma_encoder.inputs.batch import Batch, BatchShape, empty_batch
    from gemma_encoder.model import sharding

    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])

    def batch(number: int) -> Batch:
        tokens, labels = inputs(number, rows, length)
        blank = empty_batch(BatchShape(rows, length))
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        ones = np.ones((rows, 1), np.float32)
        return blank._replace(
            tokens=tokens,
            segment_ids=np.ones_like(tokens),
            positions=positions,
            label=labels[:, None].astype(np.float32),
            weight=ones,
        )

    if train:
        program, state = models.our_program(folder, rows, length, 1, rows, dtype, remat)
        held = [state]
        del state

        def step(number: int) -> dict[str, float]:
            held[0], metrics = program.step(held[0], program.shard(batch(number)))
            return {"loss": float(metrics.loss)}

        return in_a_row(step, steps)
    from gemma_encoder.weights.backbone import load_encoder

    spec, parameters = load_encoder(folder, mesh)
    config = spec.encoder.__class__.from_dict({**spec.encoder.to_dict(), "compute_dtype": dtype})
    forward = compile_forward(config, mesh)

    def scores(number: int) -> dict[str, float]:
        said = np.asarray(forward(parameters, batch(number)).scores[models.TASK])
        return {"score": float(said[:, 0, 0].sum())}

    return in_a_row(scores, steps)


def peer(
    folder: pathlib.Path,
    rows: int,
    length: int,
    steps: int,
    dtype: str,
    train: bool,
    device: str,
    compiled: bool,
) -> harness.Turn:
    """The arm of Hugging Face transformers."""
    model = models.TorchEncoder(folder, device, dtype, compiled)
    mask = np.ones((rows, length), np.int64)

    def step(number: int) -> dict[str, float]:
        tokens, labels = inputs(number, rows, length)
        return {"loss": model.step(tokens, mask, labels)}

    def scores(number: int) -> dict[str, float]:
        return {"score": float(model.scores(inputs(number, rows, length)[0], mask)[:, 0].sum())}

    return in_a_row(step if train else scores, steps)


def main() -> None:
    """Measures, compares, prints."""
    parser = harness.parser(__doc__)
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="batches of a turn, one after another")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the activations"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="of the peer; ours takes what JAX finds",
    )
    parser.add_argument(
        "--remat", default="none", help="ours: what the backward pass computes again"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="another arm: the peer under torch.compile"
    )
    args = parser.parse_args()
    from gemma_encoder.model.sizes import GEMMA_CONFIGS

    flops = GEMMA_CONFIGS[args.size].forward_flops(args.rows * args.length, args.length)
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "model"
        models.write(folder, args.size, args.length)
        shared = {
            "folder": folder,
            "rows": args.rows,
            "length": args.length,
            "steps": args.steps,
            "dtype": args.dtype,
        }
        for what, train in (("forward", False), ("training step", True)):
            theirs = {**shared, "train": train, "device": args.device}
            arms = [
                harness.Arm(
                    "transformers (peer)", f"{__spec__.name}:peer", {**theirs, "compiled": False}
                )
            ]
            if args.compiled:
                arms.append(
                    harness.Arm(
                        "transformers, torch.compile (peer)",
                        f"{__spec__.name}:peer",
                        {**theirs, "compiled": True},
                    )
                )
            if (
                args.device == "cpu"
            ):  # ours starts itself with huge pages; what they would give the peer
                arms.append(
                    harness.Arm(
                        "transformers, huge pages (peer)",
                        f"{__spec__.name}:peer",
                        {**theirs, "compiled": False},
                        huge_pages=True,
                    )
                )
            arms.append(
                harness.Arm(
                    "ours",
                    f"{__spec__.name}:ours",
                    {**shared, "train": train, "remat": args.remat},
                    huge_pages=args.device == "cpu",
                )
            )
            seen = harness.take_turns(arms, args.repeats)
            figure = "loss" if train else "score"
            for turns in zip(*seen.values(), strict=True):
                values = [turn[figure] for turn in turns]
                # Sums of 16 scores of order one in float32; bfloat16 keeps three digits.
                if max(values) - min(values) > (0.05 if args.dtype == "bfloat16" else 2e-3) * max(
                    1.0, abs(values[0])
                ):
                    raise SystemExit(
                        f"{what}: the arms do not compute the same: {dict(zip(seen, values, strict=True))}"
                    )
            for name, found in harness.medians(seen).items():
                speed = args.rows * args.length / found["seconds"]
                against = (
                    ", ".join(f"{harness.ratio(seen, name, arm.name):.2f} x" for arm in arms[:-1])
                    if name == "ours"
                    else ""
                )
                rate = (3 if train else 1) * flops / found["seconds"] / 1e9
                rows.append(
                    [
                        what,
                        name,
                        f"{found['seconds']:.2f} s",
                        f"{speed:,.0f}",
                        f"{rate:,.0f}",
                        f"{found['gib']:.1f} GiB",
                        f"{found['spread']:.0%}",
                        against,
                    ]
                )
    columns = [
        "what",
        "arm",
        "median",
        "tokens/s",
        "model GFLOP/s",
        "peak memory",
        "spread",
        "against the peers",
    ]
    harness.publish(
        f"{args.size}, {args.rows} x {args.length} tokens, {args.dtype}, {args.repeats} rounds of {args.steps}",
        columns,
        rows,
        notes,
        args.json,
    )


if __name__ == "__main__":
    main()
