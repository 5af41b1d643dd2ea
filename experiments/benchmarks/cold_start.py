"""Time from the start of a Python process to its first prediction, beside two peers.

    python -m gemma_encoder.experiments.benchmarks.cold_start [--size=gemma3_tiny] [--device=cpu]

Every turn is a new process: imports, loading the same weights from the same disk, compiling where
needed, and the score of one text that no earlier turn used. Time counts from before the process
starts. After the warm-up turn the files are in the page cache, for all arms. "Programs kept" is
ours with JAX_COMPILATION_CACHE_DIR set to a folder that an earlier turn filled.

The peers are transformers' pipeline and sentence-transformers' CrossEncoder. Scores are compared.
Needs the extra `bench`; without it, only ours runs.
"""

import argparse
import pathlib
import tempfile
import time

from gemma_encoder.experiments.benchmarks import fresh, harness, models, rerank

TASK = "msmarco"
OURS = ("ours", "ours, programs kept")
COLUMNS = (
    "arm",
    "start to first score",
    "of it imports",
    "loading",
    "predicting",
    "peak memory",
    "spread",
    "against the best peer",
)


def text_of(turn: int) -> tuple[str, str]:
    """Returns the query and the document of a turn."""
    return (
        f"what is known about wing number {turn}",
        f"document {turn} tells of the boundary layer of a wing in a slipstream .",
    )


def times_of(score: float, began: float, imported: float, loaded: float) -> dict[str, float]:
    """Returns the score, and the seconds of importing, of loading, and of predicting until now."""
    return {
        "score": score,
        "import": imported - began,
        "load": loaded - imported,
        "predict": time.perf_counter() - loaded,
    }


def ours(model: str, turn: int) -> dict[str, float]:
    """Scores a text in our process."""
    began = time.perf_counter()
    import gemma_encoder as ge

    predictor_class = ge.Predictor  # imports it: the package is lazy
    imported = time.perf_counter()
    predictor = predictor_class.load(model)
    loaded = time.perf_counter()
    score = float(predictor.predict([text_of(turn)])[0])
    return times_of(score, began, imported, loaded)


def cross_encoder(model: str, turn: int, device: str) -> dict[str, float]:
    """Scores a text in sentence-transformers' process."""
    began = time.perf_counter()
    import torch
    from sentence_transformers import CrossEncoder

    imported = time.perf_counter()
    settings = {
        "dtype": torch.float32,
        "attn_implementation": models.attention(pathlib.Path(model)),
    }
    encoder = CrossEncoder(
        model,
        device=device,
        max_length=128,
        model_kwargs=settings,
        activation_fn=torch.nn.Identity(),
    )
    loaded = time.perf_counter()
    score = float(encoder.predict([rerank.as_pair(*text_of(turn))], show_progress_bar=False)[0])
    return times_of(score, began, imported, loaded)


def pipeline(model: str, turn: int, device: str) -> dict[str, float]:
    """Scores a text in transformers' process."""
    began = time.perf_counter()
    import torch
    import transformers

    imported = time.perf_counter()
    classify = transformers.pipeline(
        "text-classification",
        model=model,
        device=device,
        dtype=torch.float32,
        function_to_apply="none",
    )
    loaded = time.perf_counter()
    score = float(classify(["".join(rerank.as_pair(*text_of(turn)))])[0]["score"])
    return times_of(score, began, imported, loaded)


def in_new_process(function: str, settings: dict, environment: dict | None = None) -> harness.Turn:
    """Sets up an arm that starts a process for each turn."""
    return fresh.turns(function, settings, environment, turn_as="turn")


def make_arm(
    name: str, function: str, settings: dict, environment: dict | None = None
) -> harness.Arm:
    """Returns the arm that runs a function of this module in new processes."""
    arguments = {
        "function": f"{__spec__.name}:{function}",
        "settings": settings,
        "environment": environment,
    }
    return harness.Arm(name, f"{__spec__.name}:in_new_process", arguments)


def make_arms(args: argparse.Namespace, folder: pathlib.Path) -> tuple[list[harness.Arm], str]:
    """Returns the arms, and the reason why the peers are left out, empty if they are not."""
    arms = []
    reason = harness.missing("torch", "transformers", "sentence-transformers") or ""
    if not reason:
        models.as_sequence_classifier(folder / "model", folder / "peer", 1)
        settings = {"model": str(folder / "peer"), "device": args.device}
        arms.append(make_arm("transformers, pipeline (peer)", "pipeline", settings))
        arms.append(
            make_arm("sentence-transformers, CrossEncoder (peer)", "cross_encoder", settings)
        )
    settings = {"model": str(folder / "model")}
    without_cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # ignores the user's cache, too
    with_cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arms.append(make_arm(OURS[0], "ours", settings, without_cache))
    arms.append(make_arm(OURS[1], "ours", settings, with_cache))
    return arms, reason


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--size", default="gemma3_tiny")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures, compares and prints."""
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        models.write(folder / "model", args.size, 128, TASK, "last_k")
        arms, reason = make_arms(args, folder)
        results = harness.take_turns(arms, args.repeats)
    notes = [f"the peers are left out: {reason}"] if reason else []
    difference = harness.same("cold start", results, "score", 1e-3)
    notes.append(f"largest difference of a score: {difference:.1e}")
    medians = harness.medians(results)
    best = harness.fastest(medians, [name for name in medians if name not in OURS])
    rows = []
    for name, figures in medians.items():
        seconds = [f"{figures[part]:.2f} s" for part in ("seconds", "import", "load", "predict")]
        is_compared = best and name in OURS
        speedup = f"{harness.ratio(results, name, best):.2f} x" if is_compared else ""
        memory = f"{figures['gib']:.2f} GiB"
        rows.append([name, *seconds, memory, f"{figures['spread']:.0%}", speedup])
    title = f"{args.size}, float32, one text, a process a turn, {args.repeats} rounds"
    harness.publish(title, COLUMNS, rows, notes, args.json)


if __name__ == "__main__":
    main()
