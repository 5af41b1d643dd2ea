"""Time of one short text from string to probabilities, in a warm process, beside two peers.

    python -m gemma_encoder.experiments.benchmarks.latency [--size=gemma3_mini] [--device=cpu]

A turn predicts `--texts` different texts of six to 41 words, one call each, and gives the median
and the 95th percentile of their times. All arms get the same texts and weights; the first turn
warms up, ours by `Predictor.warm_up(max_rows=1)`.

The peers are transformers' pipeline, and its model called directly with its tokenizer, both without
padding. Probabilities are compared. Needs the extra `bench`; without it, only ours runs.
"""

import argparse
import pathlib
import random
import tempfile
import time
from collections.abc import Callable

import numpy as np

from gemma_encoder.experiments.benchmarks import harness, models

PEERS = {"pipeline": "transformers, pipeline (peer)", "direct": "transformers, model call (peer)"}
OURS = "ours"
COLUMNS = ("arm", "median", "95th percentile", "spread", "against the best peer")
WORDS = ["wing", "flow", "plot", "actor", "song", "scene", "light", "fine"]


def texts_of(count: int, seed: int) -> list[str]:
    """Returns texts of six to 41 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(6, 41))) for _ in range(count)]


def figures_of(predict: Callable[[str], float], count: int, turn: int) -> dict[str, float]:
    """Times one call for each text of a turn.

    Args:
        predict: function of a text; returns the probability of the last class.
        count: number of texts.
        turn: seed of the texts.
    """
    times = []
    probabilities = []
    for text in texts_of(count, turn):
        began = time.perf_counter()
        probabilities.append(predict(text))
        times.append(time.perf_counter() - began)
    return {
        "seconds": float(np.median(times)),
        "p95": float(np.percentile(times, 95)),
        "probability": float(np.mean(probabilities)),
    }


def ours(model: str, count: int) -> harness.Turn:
    """Sets up our arm."""
    from gemma_encoder import runtime

    runtime.quiet()
    import gemma_encoder as ge

    predictor = ge.Predictor.load(model)
    predictor.warm_up(max_rows=1)
    return lambda turn: figures_of(
        lambda text: float(predictor.predict([text])[0, -1]), count, turn
    )


def pipeline(model: str, count: int, device: str, prompt: str) -> harness.Turn:
    """Sets up the peer's pipeline; `prompt` is what the task's template has before a text."""
    import torch
    import transformers

    classify = transformers.pipeline(
        "text-classification", model=model, device=device, dtype=torch.float32, top_k=None
    )

    def predict(text: str) -> float:
        return next(
            entry["score"] for entry in classify([prompt + text])[0] if entry["label"] == "1"
        )

    return lambda turn: figures_of(predict, count, turn)


def direct(model: str, count: int, device: str, prompt: str) -> harness.Turn:
    """Sets up the peer's model, which is called with its tokenizer; see `pipeline`."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    settings = {
        "dtype": torch.float32,
        "attn_implementation": models.attention(pathlib.Path(model)),
    }
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(model, **settings)
    classifier.to(device).eval()

    @torch.inference_mode()
    def predict(text: str) -> float:
        inputs = tokenizer([prompt + text], return_tensors="pt").to(device)
        return float(classifier(**inputs).logits.softmax(-1)[0, -1])

    return lambda turn: figures_of(predict, count, turn)


def make_arms(args: argparse.Namespace, folder: pathlib.Path) -> tuple[list[harness.Arm], str]:
    """Returns the arms, and the reason why the peers are left out, empty if they are not."""
    arms = []
    reason = harness.missing("torch", "transformers") or ""
    if not reason:
        from gemma_encoder.data import registry

        models.as_sequence_classifier(folder / "model", folder / "peer", 2)
        prompt = registry.get(models.TASK).task.template.text.partition("{")[0]
        settings = {"model": str(folder / "peer"), "count": args.texts, "device": args.device}
        settings |= {"prompt": prompt}
        arms += [
            harness.Arm(name, f"{__spec__.name}:{function}", settings)
            for function, name in PEERS.items()
        ]
    settings = {"model": str(folder / "model"), "count": args.texts}
    arms.append(harness.Arm(OURS, f"{__spec__.name}:ours", settings, huge_pages=True))
    return arms, reason


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--size", default="gemma3_mini")
    parser.add_argument("--texts", type=int, default=200, help="texts of a turn")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures, compares and prints."""
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        models.write(folder / "model", args.size, 128, pooling="last_k")
        arms, reason = make_arms(args, folder)
        results = harness.take_turns(arms, args.repeats)
    notes = [f"the peers are left out: {reason}"] if reason else []
    difference = harness.same("latency", results, "probability", 1e-3)
    notes.append(f"largest difference of a mean probability: {difference:.1e}")
    medians = harness.medians(results)
    best = harness.fastest(medians, [name for name in medians if name != OURS])
    rows = []
    for name, figures in medians.items():
        times = [f"{figures[key] * 1e3:.2f} ms" for key in ("seconds", "p95")]
        speedup = f"{harness.ratio(results, name, best):.2f} x" if best and name == OURS else ""
        rows.append([name, *times, f"{figures['spread']:.0%}", speedup])
    title = f"{args.size}, float32, one text a call, {args.texts} texts, {args.repeats} rounds"
    harness.publish(title, COLUMNS, rows, notes, args.json)


if __name__ == "__main__":
    main()
