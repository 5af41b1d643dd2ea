"""Forward pass and training step of a whole encoder, beside Hugging Face transformers'.

    python -m gemma_encoder.experiments.benchmarks.train_step
        [--size=gemma3_270m] [--rows=16] [--length=128] [--steps=4] [--dtype=float32]
        [--device=cpu] [--compiled]

Both arms have the same weights and tokens. Full fine-tuning: AdamW trains every parameter (float32
moments), gradients are clipped, no dropout. Rows are full, so packing makes no difference here. A
turn is `--steps` batches in a row, as in training; times are per batch. Scores and the losses of
the first steps are compared before timings count. Needs the extra `bench`.
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import harness, models

LAST_TOKEN = 8_000  # vocabulary size of the small tokenizer; ids are drawn below it
# Sums of 16 scores of order one in float32; bfloat16 has three digits.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.05}
COLUMNS = (
    "what",
    "arm",
    "median",
    "tokens/s",
    "model GFLOP/s",
    "peak memory",
    "spread",
    "against the peers",
)


def inputs(step: int, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids [B, L] and labels [B] of a batch, the same for every arm."""
    rng = np.random.default_rng(step)
    return rng.integers(5, LAST_TOKEN, (rows, length)).astype(np.int32), rng.integers(0, 2, rows)


def in_a_row(step: harness.Turn, steps: int) -> harness.Turn:
    """Returns turns of `steps` new batches each, with the mean figures of a batch.

    The host of a virtual machine may take back memory that a step freed if it is not used for some
    seconds. The first step after a pause pays for it again, unlike one in the middle of training.
    """

    def run(turn: int) -> dict[str, float]:
        began = time.perf_counter()
        batches = [step(turn * steps + index) for index in range(steps)]
        seconds = (time.perf_counter() - began) / steps
        figures = {name: float(np.mean([batch[name] for batch in batches])) for name in batches[0]}
        return {"seconds": seconds} | figures

    return run


def ours(
    folder: pathlib.Path, rows: int, length: int, steps: int, dtype: str, train: bool, remat: str
) -> harness.Turn:
    """Sets up our arm: training steps, or forward passes."""
    if train:
        return in_a_row(_our_training(folder, rows, length, dtype, remat), steps)
    return in_a_row(_our_forward(folder, rows, length, dtype), steps)


def _our_training(
    folder: pathlib.Path, rows: int, length: int, dtype: str, remat: str
) -> harness.Turn:
    program, state = models.our_program(folder, rows, length, 1, rows, dtype, remat)

    def step(index: int) -> dict[str, float]:
        nonlocal state
        batch = models.full_batch(*inputs(index, rows, length))
        state, metrics = program.step(state, program.shard(batch))
        return {"loss": float(metrics.loss)}

    return step


def _our_forward(folder: pathlib.Path, rows: int, length: int, dtype: str) -> harness.Turn:
    import jax

    from gemma_encoder.evaluation.forward import compile_forward
    from gemma_encoder.model import sharding
    from gemma_encoder.weights.backbone import load_encoder

    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    spec, parameters = load_encoder(folder, mesh)
    config = spec.encoder.__class__.from_dict({**spec.encoder.to_dict(), "compute_dtype": dtype})
    forward = compile_forward(config, mesh)

    def step(index: int) -> dict[str, float]:
        batch = models.full_batch(*inputs(index, rows, length))
        scores = np.asarray(forward(parameters, batch).scores[models.TASK])
        return {"score": float(scores[:, 0, 0].sum())}

    return step


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
    """Sets up the arm of Hugging Face transformers: training steps, or forward passes."""
    model = models.TorchEncoder(folder, device, dtype, compiled)
    mask = np.ones((rows, length), np.int64)

    def training(index: int) -> dict[str, float]:
        tokens, labels = inputs(index, rows, length)
        return {"loss": model.step(tokens, mask, labels)}

    def forward(index: int) -> dict[str, float]:
        tokens, _ = inputs(index, rows, length)
        return {"score": float(model.scores(tokens, mask)[:, 0].sum())}

    return in_a_row(training if train else forward, steps)


def make_arms(args: argparse.Namespace, folder: pathlib.Path, train: bool) -> list[harness.Arm]:
    """Returns the peer's arms, and ours as the last."""
    on_cpu = args.device == "cpu"
    shared = {
        "folder": folder,
        "rows": args.rows,
        "length": args.length,
        "steps": args.steps,
        "dtype": args.dtype,
        "train": train,
    }
    function = f"{__spec__.name}:peer"
    eager = {**shared, "device": args.device, "compiled": False}
    arms = [harness.Arm("transformers (peer)", function, eager)]
    if args.compiled:
        compiled = {**eager, "compiled": True}
        arms.append(harness.Arm("transformers, torch.compile (peer)", function, compiled))
    if on_cpu:
        # Our programs start themselves with huge pages; this arm shows what the peer gains by them.
        name = "transformers, huge pages (peer)"
        arms.append(harness.Arm(name, function, eager, huge_pages=True))
    settings = {**shared, "remat": args.remat}
    arms.append(harness.Arm("ours", f"{__spec__.name}:ours", settings, huge_pages=on_cpu))
    return arms


def check_same(subject: str, results: harness.Results, figure: str, dtype: str) -> None:
    """Raises SystemExit if the arms differ in a figure, relative to that of the first arm."""
    for turns in zip(*results.values(), strict=True):
        values = [turn[figure] for turn in turns]
        tolerance = TOLERANCE[dtype] * max(1.0, abs(values[0]))
        if not np.ptp(values) <= tolerance:  # NaN fails, too
            by_arm = dict(zip(results, values, strict=True))
            raise SystemExit(f"{subject}: the arms do not compute the same: {by_arm}")


def compare(args: argparse.Namespace, folder: pathlib.Path, train: bool) -> list[list]:
    """Runs the arms, checks that they agree, and returns their rows of the table."""
    from gemma_encoder.model.sizes import GEMMA_CONFIGS

    subject = "training step" if train else "forward"
    tokens = args.rows * args.length
    flop = GEMMA_CONFIGS[args.size].forward_flops(tokens, args.length)
    if train:
        flop *= 3  # a backward pass takes twice a forward pass
    arms = make_arms(args, folder, train)
    results = harness.take_turns(arms, args.repeats)
    check_same(subject, results, "loss" if train else "score", args.dtype)
    peers = [arm.name for arm in arms[:-1]]
    rows = []
    for name, figures in harness.medians(results).items():
        speedups = [harness.ratio(results, name, peer) for peer in peers] if name == "ours" else []
        row = [
            subject,
            name,
            f"{figures['seconds']:.2f} s",
            f"{tokens / figures['seconds']:,.0f}",
            f"{flop / figures['seconds'] / 1e9:,.0f}",
            f"{figures['gib']:.1f} GiB",
            f"{figures['spread']:.0%}",
            ", ".join(f"{speedup:.2f} x" for speedup in speedups),
        ]
        rows.append(row)
    return rows


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="batches per turn, in a row")
    harness.add_device(parser)
    parser.add_argument("--remat", default="none", help="ours: the rematerialization policy")
    parser.add_argument(
        "--compiled", action="store_true", help="adds an arm: the peer under torch.compile"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures, compares and prints."""
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "model"
        models.write(folder, args.size, args.length)
        rows = [row for train in (False, True) for row in compare(args, folder, train)]
    title = (
        f"{args.size}, {args.rows} x {args.length} tokens, {args.dtype}, "
        f"{args.repeats} rounds of {args.steps}"
    )
    harness.publish(title, COLUMNS, rows, file=args.json)


if __name__ == "__main__":
    main()
