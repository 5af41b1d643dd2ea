"""From the start of a Python process to the first prediction: ours beside transformers' pipeline and sentence-transformers' CrossEncoder.

    python -m gemma_encoder.experiments.benchmarks.cold_start [--size=gemma3_tiny] [--device=cpu]

Every turn is a new process: imports, loading the same weights from the same disk, compiling where there is something to compile, and
the score of one text that no turn before has seen. Seconds count from before the process is started. The files' pages are in memory
after the warm-up turn, for all arms. "Programs kept" is ours with JAX_COMPILATION_CACHE_DIR set to a folder that a turn before has filled.
Scores are compared. Needs the extra `bench` (without it, ours runs alone).
"""

import pathlib
import tempfile
import time

from gemma_encoder.experiments.benchmarks import fresh, harness, models, rerank

TASK = "msmarco"
OURS = ("ours", "ours, programs kept")


def text_of(turn: int) -> tuple[str, str]:
    """The query and the document of a turn."""
    return (
        f"what is known about wing number {turn}",
        f"document {turn} tells of the boundary layer of a wing in a slipstream .",
    )


def ours(model: str, turn: int) -> dict[str, float]:
    """Our process."""
    began = time.perf_counter()
    import gemma_encoder as ge

    predictor_class = ge.Predictor
    imported = time.perf_counter()
    predictor = predictor_class.load(model)
    loaded = time.perf_counter()
    score = float(predictor.predict([text_of(turn)])[0])
    return {
        "score": score,
        "import": imported - began,
        "load": loaded - imported,
        "predict": time.perf_counter() - loaded,
    }


def cross_encoder(model: str, turn: int, device: str) -> dict[str, float]:
    """sentence-transformers' process."""
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
    return {
        "score": score,
        "import": imported - began,
        "load": loaded - imported,
        "predict": time.perf_counter() - loaded,
    }


def pipeline(model: str, turn: int, device: str) -> dict[str, float]:
    """transformers' process."""
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
    return {
        "score": score,
        "import": imported - began,
        "load": loaded - imported,
        "predict": time.perf_counter() - loaded,
    }


def in_new_process(function: str, settings: dict, environment: dict | None = None) -> harness.Turn:
    """An arm that starts a process for each turn."""
    return fresh.turns(function, settings, environment, turn_as="turn")


def main(argv: list[str] | None = None) -> None:
    """Measures, compares, prints."""
    parser = harness.parser(__doc__)
    parser.add_argument("--size", default="gemma3_tiny")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    notes, arms = [], []

    def add(name: str, function: str, settings: dict, environment: dict | None = None) -> None:
        given = {
            "function": f"{__spec__.name}:{function}",
            "settings": settings,
            "environment": environment,
        }
        arms.append(harness.Arm(name, f"{__spec__.name}:in_new_process", given))

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        models.write(folder / "model", args.size, 128, TASK, "last_k")
        if reason := harness.missing("torch", "transformers", "sentence-transformers"):
            notes.append(f"the peers are left out: {reason}")
        else:
            models.as_sequence_classifier(folder / "model", folder / "peer", 1)
            theirs = {"model": str(folder / "peer"), "device": args.device}
            add("transformers, pipeline (peer)", "pipeline", theirs)
            add("sentence-transformers, CrossEncoder (peer)", "cross_encoder", theirs)
        compiled_anew = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # nothing from the user's cache
        add(OURS[0], "ours", {"model": str(folder / "model")}, compiled_anew)
        kept = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        add(OURS[1], "ours", {"model": str(folder / "model")}, kept)
        seen = harness.take_turns(arms, args.repeats)
    notes.append(
        f"largest difference of a score: {harness.same('cold start', seen, 'score', 1e-3):.1e}"
    )
    found, rows = harness.medians(seen), []
    best = min(
        (name for name in found if name not in OURS),
        key=lambda name: found[name]["seconds"],
        default=None,
    )
    for name, figures in found.items():
        against = f"{harness.ratio(seen, name, best):.2f} x" if name in OURS and best else ""
        parts = [f"{figures[part]:.2f} s" for part in ("seconds", "import", "load", "predict")]
        rows.append(
            [name, *parts, f"{figures['gib']:.2f} GiB", f"{figures['spread']:.0%}", against]
        )
    columns = [
        "arm",
        "start to first score",
        "of it imports",
        "loading",
        "predicting",
        "peak memory",
        "spread",
        "against the best peer",
    ]
    harness.publish(
        f"{args.size}, float32, one text, a process a turn, {args.repeats} rounds",
        columns,
        rows,
        notes,
        args.json,
    )


if __name__ == "__main__":
    main()
