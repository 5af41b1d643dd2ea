"""Int8 inference: texts per second from text to class, memory and decisions, beside PyTorch's.

    TFDS_DATA_DIR=… python -m gemma_encoder.experiments.benchmarks.int8
        [--size=gemma3_270m] [--data=sst2] [--texts=400] [--model=EXPORT]
    MSMARCO_DIR=… python -m gemma_encoder.experiments.benchmarks.int8 --data=pairs

All arms have the weights of one export: random ones of a size, or those of `--model`, a folder that
`gemma-encoder export` wrote of a trained classifier, which decisions are worth counting for. A turn
classifies texts that no earlier turn had, tokenizing included: sentences of SST-2, or pairs of a
query and a passage in one text. Memory is the peak of the arm's process; its model is written
ahead in the arm's precision.

The peers are transformers in float32, in bfloat16, and in int8 by torchao (weights by channel,
activations by token) if it is installed; with `--compiled` through torch.compile. They sort texts
by length and pad batches of 32. Needs the extra `bench`; without it, only ours run.
"""

import argparse
import functools
import json
import pathlib
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import harness, models
from gemma_encoder.inputs.json_text import to_json

COLUMNS = (
    *("arm", "texts/s", "median", "peak memory", "spread"),
    *("same decisions", "against our float32", "against the best peer"),
)
# Arguments of `Predictor.load`, and the compute dtype.
PRECISIONS = {
    "float32": ({}, "float32"),
    "bfloat16": ({"weights": "bfloat16"}, "bfloat16"),
    "int8": ({"quantization": "int8"}, "float32"),
}


def read_texts(data: str) -> list[str]:
    """Returns the real texts to classify, in a fixed random order."""
    if data == "pairs":
        from gemma_encoder.experiments.benchmarks import rerank

        texts = [
            rerank.TEMPLATE.format(query=query, document=passage)
            for query, passages in rerank.read_lists(
                harness.data_file("MSMARCO_DIR", "top100.dev.tsv")
            )
            for passage in passages
        ]
    else:
        from gemma_encoder.data import registry

        source = registry.get(models.TASK)
        texts = [
            example.fields["sentence"]
            for index in range(source.size("validation"))
            for example in source.examples("validation", index)
        ]
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[index] for index in order]


def rendered(texts: list[str]) -> list[str]:
    """Returns texts in the template of the task, as a peer's tokenizer takes them."""
    from gemma_encoder.data import registry

    template = registry.get(models.TASK).task.template
    return [template.render({"sentence": text})[0] for text in texts]


def texts_of(file: str, turn: int, count: int) -> list[str]:
    """Returns the texts of a turn; turns past the end of the file start over."""
    texts = json.loads(pathlib.Path(file).read_text())
    return [texts[index % len(texts)] for index in range(turn * count, (turn + 1) * count)]


def write_ours(export: pathlib.Path, folder: pathlib.Path, precision: str) -> None:
    """Writes our checkpoint in a precision."""
    import dataclasses

    import gemma_encoder as ge
    from gemma_encoder.weights.precision import save_for_inference

    options, dtype = PRECISIONS[precision]
    loaded = ge.Predictor.load(export, **options)
    encoder = dataclasses.replace(loaded.spec.encoder, compute_dtype=dtype)
    spec = dataclasses.replace(loaded.spec, encoder=encoder)
    save_for_inference(spec, loaded.parameters, folder)


def ours(model: str, texts: dict, decisions: str) -> harness.Turn:
    """Sets up an arm of ours; each turn writes its classes to "{decisions}.{turn}.npy"."""
    import gemma_encoder as ge

    predictor = ge.Predictor.load(model)
    return functools.partial(_turn, lambda batch: predictor.predict(batch), texts, decisions)


def _turn(classify, texts: dict, decisions: str, turn: int) -> dict[str, float]:
    batch = texts_of(turn=turn, **texts)
    began = time.perf_counter()
    scores = classify(batch)
    seconds = time.perf_counter() - began
    np.save(f"{decisions}.{turn}.npy", np.argmax(scores, axis=1))
    # Unlike the peak of getrusage, this one starts with the process's own program.
    peak = harness.process_memory("VmHWM") / 2**30
    return {"seconds": seconds, "texts_per_second": len(batch) / seconds, "gib": peak}


def peer(
    model: str, texts: dict, decisions: str, precision: str, compiled: bool, max_length: int
) -> harness.Turn:
    """Sets up an arm of transformers; writes classes as `ours` does."""
    import torch
    import transformers

    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    encoder = models.TorchEncoder(pathlib.Path(model))
    encoder.backbone.to(dtype)
    if precision == "int8":
        from torchao import quantization

        config = quantization.Int8DynamicActivationInt8WeightConfig()
        quantization.quantize_(encoder.backbone, config)
    if compiled:
        encoder.forward = torch.compile(encoder.forward, dynamic=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    options = {"padding": True, "truncation": True, "max_length": max_length}

    def classify(batch: list[str]) -> np.ndarray:
        scores = np.empty((len(batch), 2), np.float32)
        order = sorted(range(len(batch)), key=lambda index: len(batch[index]))
        for start in range(0, len(order), 32):
            part = order[start : start + 32]
            encoded = tokenizer([batch[index] for index in part], return_tensors="np", **options)
            scores[part] = encoder.scores(encoded["input_ids"], encoded["attention_mask"])
        return scores

    return functools.partial(_turn, classify, texts, decisions)


def agreement(folder: pathlib.Path, name: str, reference: str, turns: range) -> float:
    """Returns the share of texts for which two arms decide the same."""
    pairs = [[np.load(folder / f"{arm}.{turn}.npy") for arm in (name, reference)] for turn in turns]
    return float(np.mean([first == second for first, second in pairs]))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__, repeats=5)
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--model", type=pathlib.Path, help="export of a trained classifier")
    parser.add_argument("--data", default="sst2", choices=("sst2", "pairs"))
    parser.add_argument("--texts", type=int, default=400, help="texts per turn")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--compiled", action="store_true", help="peers through torch.compile")
    return parser.parse_args(argv)


def make_arms(args: argparse.Namespace, folder: pathlib.Path, notes: list[str]) -> list:
    """Returns the arms by name of their files; peers first."""
    export = args.model or folder / "model"
    texts = {"file": str(folder / "texts.json"), "count": args.texts}
    as_rendered = texts | {"file": str(folder / "rendered.json")}
    arms = []
    reason = harness.missing("torch", "transformers")
    without_int8 = reason or harness.missing("torchao")
    for precision in PRECISIONS:
        if absent := without_int8 if precision == "int8" else reason:
            notes.append(f"the peer in {precision} is left out: {absent}")
            continue
        settings = {"model": str(export), "texts": as_rendered, "precision": precision}
        settings |= {"compiled": args.compiled, "max_length": args.max_length}
        settings |= {"decisions": str(folder / f"peer_{precision}")}
        arms.append(harness.Arm(f"transformers, {precision}", f"{__spec__.name}:peer", settings))
    for precision in PRECISIONS:
        models.in_a_process(write_ours, export, folder / f"model_{precision}", precision)
        settings = {"model": str(folder / f"model_{precision}"), "texts": texts}
        settings |= {"decisions": str(folder / f"ours_{precision}")}
        arms.append(harness.Arm(f"ours, {precision}", f"{__spec__.name}:ours", settings))
    return arms


def table_rows(
    args: argparse.Namespace, arms: list[harness.Arm], results: harness.Results
) -> list[list[str]]:
    """Returns the rows of the table."""
    medians = harness.medians(results)
    best = harness.fastest(medians, [name for name in medians if not name.startswith("ours")])
    rows = []
    for arm in arms:
        figures = medians[arm.name]
        decisions = pathlib.Path(arm.settings["decisions"])
        turns = range(1, args.repeats + 1)
        same = agreement(decisions.parent, decisions.name, "ours_float32", turns)
        is_ours = arm.name.startswith("ours")
        row = [
            arm.name,
            f"{figures['texts_per_second']:.1f}",
            f"{figures['seconds']:.2f} s",
            f"{figures['gib']:.2f} GiB",
            f"{figures['spread']:.0%}",
            f"{same:.1%}",
            f"{harness.ratio(results, arm.name, 'ours, float32'):.2f} x",
            f"{harness.ratio(results, arm.name, best):.2f} x" if is_ours and best else "",
        ]
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measures, compares and prints."""
    args = parse_arguments(argv)
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        texts = read_texts(args.data)
        (folder / "texts.json").write_text(to_json(texts))
        (folder / "rendered.json").write_text(to_json(rendered(texts)))
        if not args.model:
            models.write(folder / "model", args.size, args.max_length)
        arms = make_arms(args, folder, notes)
        results = harness.take_turns(arms, args.repeats)
        rows = table_rows(args, arms, results)
    title = (
        f"{args.model or f'{args.size}, random weights'}, {args.data}, {args.texts} texts in a "
        f"turn, {args.repeats} rounds"
    )
    harness.publish(title, COLUMNS, rows, notes, args.json)


if __name__ == "__main__":
    main()
