"""Input pipeline: its throughput, a training step's wait for data, and the cost of checkpoints.

    TFDS_DATA_DIR=… python -m gemma_encoder.experiments.benchmarks.input_pipeline [--json=FILE]

Throughput is in texts per second, and in texts per second and core: texts / processor time of all
threads of the process. Arms take turns, each with a new seed; the median of the repeats is printed.
The peer is seqio as its users have it, reading TensorFlow Datasets' records. "Ours, raw" tokenizes
while it reads the Arrow table in the cache folder, as every start does except the first on a data
set. The first reading, which makes that table, is timed separately. Prepared data hold tokens.

The stall of a checkpoint is the time that the training thread spends on the state of four readers
(`TrainStream.state`). The waiting share is the one that `experiments/glue.py:sst2` logs with the
tiny model, after the first window, which contains compilation.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

from gemma_encoder import runtime
from gemma_encoder.inputs.json_text import to_json

runtime.quiet()

import numpy as np
from absl import logging

from gemma_encoder.data import prepared, registry, tfds
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.data.prepared import PreparedSource
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.experiments import glue
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.tokenizer import SMALL, Tokenizer
from gemma_encoder.training import loop
from gemma_encoder.whole_files import write_whole

TASK = "glue_sst2"
ROW = 128
READERS = 4  # of the run whose checkpoint is measured

# Draws at least the given number of texts; returns how many, and the share of real tokens.
Draw = Callable[[int], tuple[int, float]]


def stream_options(seed: int, readers: int = 1) -> StreamOptions:
    """Returns the options of the recipe `experiments/glue.py:sst2`."""
    config = glue.get_config("sst2")
    shape = BatchShape(config.batch.rows, ROW, config.batch.segments, groups=readers)
    return StreamOptions(shape, ROW, readers, seed)


def ours(source: Source, tokenizer: Tokenizer, options: StreamOptions) -> Draw:
    """Returns a function that draws texts as packed batches of ours."""

    def run(minimum: int) -> tuple[int, float]:
        stream = TrainStream([source], np.ones(1), tokenizer, options)
        texts = 0
        real = []
        while texts < minimum:
            batch = next(stream)
            texts += int((batch.weight > 0).sum())
            real.append(np.mean(batch.segment_ids > 0))
        stream.close()
        return texts, float(np.mean(real))

    return run


def seqios_own(source: Source, seed: int) -> Draw:
    """Returns a function that draws the same texts with seqio's reader, tokenizer and packing."""
    seqio = runtime.import_quietly("seqio")
    tf = runtime.import_quietly("tensorflow")
    vocabulary = seqio.SentencePieceVocabulary(str(SMALL))
    data = seqio.TfdsDataSource(source.tfds_name, tfds_data_dir=tfds.data_folder())

    def run(minimum: int) -> tuple[int, float]:
        records = data.get_dataset("train", shuffle=True, seed=seed)
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
        count = 0
        real = []
        for row in packed.as_numpy_iterator():
            count += int(row["targets_segment_ids"].max())
            real.append(np.mean(row["targets_segment_ids"] > 0))
            if count >= minimum:
                break
        return count, float(np.mean(real))

    return run


def first_reading(folder: pathlib.Path) -> float:
    """Makes the table of the train split in a cache folder; returns the seconds it takes.

    The time includes TensorFlow's import.
    """
    os.environ["GEMMA_ENCODER_CACHE"] = str(folder)
    began = time.monotonic()
    registry.get(TASK).table("train")
    return time.monotonic() - began


def prepare(raw: Source, tokenizer: Tokenizer, folder: pathlib.Path) -> Source:
    """Tokenizes the task ahead of time, as `gemma-encoder prepare` does; returns its source."""
    target = folder / TASK
    prepared.begin(target, prepared.describe_prepared(raw, tokenizer, ROW))
    for part in prepared.parts(raw):
        prepared.write_part(raw, part, tokenizer, ROW, target)
    prepared.finish(target)
    return PreparedSource(TASK, folder, DataOptions())


def throughput(
    texts: int, repeats: int, raw: Source, ready: Source, tokenizer: Tokenizer
) -> list[dict]:
    """Measures the throughput of each arm; returns a row for each."""
    results: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats + 1):
        options = stream_options(seed=repeat)
        arms = {
            "seqio's tokenizer and packing (peer)": seqios_own(raw, repeat),
            "ours, raw, from the cached table": ours(raw, tokenizer, options),
            "ours, prepared": ours(ready, tokenizer, options),
        }
        for name, draw in arms.items():
            wall_began = time.monotonic()
            processor_began = time.process_time()
            count, real = draw(texts if repeat else 200)
            wall = time.monotonic() - wall_began
            processor = time.process_time() - processor_began
            figures = {
                "texts_per_second": count / wall,
                "texts_per_second_and_core": count / processor,
                "real_tokens": real,
            }
            if repeat:  # the first round warms up
                results.setdefault(name, []).append(figures)
    rows = []
    for name, turns in results.items():
        medians = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        rows.append({"arm": name, **medians})
    return rows


def states(name: str, source: Source, tokenizer: Tokenizer, repeats: int) -> dict[str, float | str]:
    """Measures the readers' states: seconds of reading and of restoring them, and their bytes."""
    options = stream_options(0, READERS)
    seconds = []
    stream = TrainStream([source], np.ones(1), tokenizer, options)
    for _ in range(10 * repeats):
        next(stream)
        began = time.perf_counter()
        saved = stream.state()
        seconds.append(time.perf_counter() - began)
    stream.close()
    stream = TrainStream([source], np.ones(1), tokenizer, options)
    began = time.perf_counter()
    stream.restore(saved)
    restoring = time.perf_counter() - began
    stream.close()
    return {
        "arm": name,
        "median_seconds": statistics.median(seconds),
        "longest_seconds": max(seconds),
        "bytes": sum(map(len, saved.values())),
        "restoring_seconds": restoring,
    }


def waiting(steps: int, folder: pathlib.Path) -> list[dict]:
    """Trains, and returns the share of time waiting for data that is logged in each window."""
    config = glue.get_config("sst2")
    config.max_eval_examples = 24
    config.train_for = f"{steps} steps"
    config.log_every = f"{steps // 4} steps"
    loop.train(config, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    windows = [line for line in lines if line["split"] == "train"]
    keys = ("step", "waiting_for_data_share", "texts_per_second")
    return [{key: line[key] for key in keys} for line in windows[1:]]


def measure(folder: pathlib.Path, texts: int, repeats: int, steps: int) -> dict:
    """Returns all figures."""
    result: dict = {"first_reading": first_reading(folder / "cache")}
    raw = registry.get(TASK)
    tokenizer = Tokenizer.load("small")
    ready = prepare(raw, tokenizer, folder / "prepared")
    result["throughput"] = throughput(texts, repeats, raw, ready, tokenizer)
    result["states"] = [
        states(name, source, tokenizer, repeats)
        for name, source in {"ours, raw": raw, "ours, prepared": ready}.items()
    ]
    return result | {"waiting": waiting(steps, folder / "run")}


def print_tables(result: dict) -> None:
    """Prints the figures of `measure` as Markdown tables."""
    print(f"first reading of the records: {result['first_reading']:.1f} s\n")
    print("| SST-2, rows of 128 | texts/s | texts/s and core | real tokens |")
    print("| --- | --- | --- | --- |")
    for row in result["throughput"]:
        print(
            f"| {row['arm']} | {row['texts_per_second']:,.0f} "
            f"| {row['texts_per_second_and_core']:,.0f} | {row['real_tokens']:.1%} |"
        )
    print(f"\n| state of {READERS} readers | stall, median | longest | size | restoring |")
    print("| --- | --- | --- | --- | --- |")
    for row in result["states"]:
        names = ("median_seconds", "longest_seconds", "restoring_seconds")
        median, longest, restoring = (f"{row[name] * 1e3:.2f} ms" for name in names)
        print(f"| {row['arm']} | {median} | {longest} | {row['bytes']:,} bytes | {restoring} |")
    print()
    for row in result["waiting"]:
        print(
            f"step {row['step']}: waiting for data {row['waiting_for_data_share']:.2%} of the time,"
            f" training on {row['texts_per_second']:.0f} texts/s"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes the figures to the file that `--json` names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=20_000, help="texts of each arm in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=80, help="training steps that measure the waiting share"
    )
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(pathlib.Path(temporary), args.texts, args.repeats, args.steps)
    print_tables(result)
    if args.json:
        write_whole(pathlib.Path(args.json), to_json(result, indent=1))


if __name__ == "__main__":
    main()
