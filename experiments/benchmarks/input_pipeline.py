"""How fast texts become packed batches, and how long a training step waits for them.

    TFDS_DATA_DIR=… python -m gemma_encoder.experiments.benchmarks.input_pipeline [--json=FILE]

Texts a second and core are texts over seconds of processor time, of all threads of the process: what one core does, however many work.
Arms take turns, each with a new seed; the median of the repeats is printed. The waiting share is what `experiments/glue.py:sst2` itself
logs with the tiny model, after the first window, which holds compilation.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

from gemma_encoder import runtime

runtime.quiet()

import numpy as np
from absl import logging

from gemma_encoder.data import prepared, registry
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.data.prepared import PreparedSource
from gemma_encoder.data.source import DataOptions, Source, load_seqio
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.experiments import glue
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.tokenizer import SMALL, Tokenizer
from gemma_encoder.training import loop

ROW = 128


def stream_options(seed: int) -> StreamOptions:
    """As the recipe `experiments/glue.py:sst2` has them."""
    config = glue.get_config("sst2")
    shape = BatchShape(config.batch.rows, ROW, config.batch.segments)
    return StreamOptions(shape, ROW, seed=seed)


def ours(
    source: Source, tokenizer: Tokenizer, options: StreamOptions
) -> Callable[[int], tuple[int, float]]:
    """Draws batches until they hold so many texts; gives their number and the share of tokens that are real."""

    def run(wanted: int) -> tuple[int, float]:
        stream, texts, real = TrainStream([source], np.ones(1), tokenizer, options), 0, []
        while texts < wanted:
            batch = next(stream)
            texts += int((batch.weight > 0).sum())
            real.append(np.mean(batch.segment_ids > 0))
        stream.close()
        return texts, float(np.mean(real))

    return run


def seqios_own(source: Source, seed: int) -> Callable[[int], tuple[int, float]]:
    """The same texts through seqio's tokeniser and its packing, in tf.data."""
    seqio = load_seqio()
    import tensorflow as tf

    vocabulary = seqio.SentencePieceVocabulary(str(SMALL))

    def run(wanted: int) -> tuple[int, float]:
        records = source.dataset("train", seed=seed)
        texts = records.map(
            lambda r: {"targets": tf.strings.join(["sst2 sentence: ", r["sentence"]])}
        )
        tokens = seqio.preprocessors.tokenize(
            texts,
            {"targets": seqio.Feature(vocabulary, add_eos=True)},
            copy_pretokenized=False,
            with_eos=True,
        )
        packed = seqio.utils.trim_and_pack_dataset(tokens, {"targets": ROW}, use_custom_ops=False)
        count, real = 0, []
        for row in packed.as_numpy_iterator():
            count += int(row["targets_segment_ids"].max())
            real.append(np.mean(row["targets_segment_ids"] > 0))
            if count >= wanted:
                break
        return count, float(np.mean(real))

    return run


def throughput(texts: int, repeats: int, folder: pathlib.Path) -> list[dict]:
    """One row for each arm."""
    tokenizer, raw = Tokenizer.load("small"), registry.get("glue_sst2")
    found: dict[str, list[tuple[float, float, float]]] = {}
    for repeat in range(repeats + 1):
        options = stream_options(seed=repeat)
        target = folder / str(repeat) / "glue_sst2"
        prepared.begin(target, prepared.describe(raw, tokenizer, options, 1))
        prepared.write(raw, prepared.Part("train"), tokenizer, options, target)
        prepared.finish(target)
        ready = PreparedSource("glue_sst2", target.parent, DataOptions())
        arms = {
            "seqio's tokeniser and packing (peer)": seqios_own(raw, repeat),
            "ours, raw": ours(raw, tokenizer, options),
            "ours, prepared": ours(ready, tokenizer, options),
        }
        for name, run in arms.items():
            wall, processor = time.monotonic(), time.process_time()
            count, real = run(texts if repeat else 200)
            wall, processor = time.monotonic() - wall, time.process_time() - processor
            if repeat:  # the first round warms up
                found.setdefault(name, []).append((count / wall, count / processor, real))
    return [
        {
            "arm": name,
            "texts_per_second": statistics.median(v[0] for v in values),
            "texts_per_second_and_core": statistics.median(v[1] for v in values),
        }
        | {"real_tokens": statistics.median(v[2] for v in values)}
        for name, values in found.items()
    ]


def waiting(steps: int, folder: pathlib.Path) -> list[dict]:
    """The share of training that waits for data, as the program logs it, window by window."""
    config = glue.get_config("sst2")
    config.max_eval, config.train_for, config.log_every = (
        24,
        f"{steps} steps",
        f"{steps // 4} steps",
    )
    loop.train(config, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("step", "waiting_for_data_share", "texts_per_second")}
        for line in lines
        if line["split"] == "train"
    ][1:]


def main() -> None:
    """Measures, prints, and writes what `--json` asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=20_000, help="that each arm makes in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80, help="of training, for the waiting share")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "throughput": throughput(args.texts, args.repeats, pathlib.Path(folder)),
            "waiting": waiting(args.steps, pathlib.Path(folder) / "run"),
        }
    print(
        "| SST-2, rows of 128 | texts/s | texts/s and core | real tokens |\n| --- | --- | --- | --- |"
    )
    for row in result["throughput"]:
        print(
            f"| {row['arm']} | {row['texts_per_second']:,.0f} | {row['texts_per_second_and_core']:,.0f} | {row['real_tokens']:.1%} |"
        )
    for row in result["waiting"]:
        print(
            f"step {row['step']}: waiting for data {row['waiting_for_data_share']:.2%} of the time, {row['texts_per_second']:.0f} texts/s trained on"
        )
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
