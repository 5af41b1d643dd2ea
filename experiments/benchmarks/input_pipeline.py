"""How fast texts become packed batches, how long a training step waits for them, and what a checkpoint of the readers costs.

    TFDS_DATA_DIR=… python -m gemma_encoder.experiments.benchmarks.input_pipeline [--json=FILE]

Texts a second and core are texts over seconds of processor time, of all threads of the process: what one core does, however many work.
Arms take turns, each with a new seed; the median of the repeats is printed. The peer is seqio as its users have it, reading TensorFlow
Datasets' records. Ours raw makes tokens while it reads the Arrow table in the cache folder, which is what every start but the first one
on some data does; the first reading, which makes that table, is timed apart. Prepared data hold the tokens.

The stall of a checkpoint is the time that the training thread spends on the state of four readers (`TrainStream.state`). The waiting share
is what `experiments/glue.py:sst2` itself logs with the tiny model, after the first window, which holds compilation.
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

TASK = "glue_sst2"
ROW = 128
READERS = 4  # whose states are read


def stream_options(seed: int, readers: int = 1) -> StreamOptions:
    """As the recipe `experiments/glue.py:sst2` has them."""
    config = glue.get_config("sst2")
    shape = BatchShape(config.batch.rows, ROW, config.batch.segments, groups=readers)
    return StreamOptions(shape, ROW, readers, seed)


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
    """The same texts through seqio's reading, tokenizer and packing, in tf.data."""
    seqio, tf = runtime.import_quietly("seqio"), runtime.import_quietly("tensorflow")
    vocabulary = seqio.SentencePieceVocabulary(str(SMALL))
    data = seqio.TfdsDataSource(source.tfds_name, tfds_data_dir=tfds.data_folder())

    def run(wanted: int) -> tuple[int, float]:
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
        count, real = 0, []
        for row in packed.as_numpy_iterator():
            count += int(row["targets_segment_ids"].max())
            real.append(np.mean(row["targets_segment_ids"] > 0))
            if count >= wanted:
                break
        return count, float(np.mean(real))

    return run


def first_reading(folder: pathlib.Path) -> float:
    """Seconds in which the train split becomes a table, TensorFlow's import included; the table stays in the folder."""
    os.environ["GEMMA_ENCODER_CACHE"] = str(folder)
    began = time.monotonic()
    registry.get(TASK).table("train")
    return time.monotonic() - began


def prepare(raw: Source, tokenizer: Tokenizer, folder: pathlib.Path) -> Source:
    """The task from tokens that are made ahead, as `gemma-encoder prepare` makes them."""
    target = folder / TASK
    prepared.begin(target, prepared.describe_prepared(raw, tokenizer, ROW))
    for part in prepared.parts(raw):
        prepared.write_part(raw, part, tokenizer, ROW, target)
    prepared.finish(target)
    return PreparedSource(TASK, folder, DataOptions())


def throughput(
    texts: int, repeats: int, raw: Source, ready: Source, tokenizer: Tokenizer
) -> list[dict]:
    """One row for each arm."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for repeat in range(repeats + 1):
        options = stream_options(seed=repeat)
        arms = {
            "seqio's tokenizer and packing (peer)": seqios_own(raw, repeat),
            "ours, raw, from the cached table": ours(raw, tokenizer, options),
            "ours, prepared": ours(ready, tokenizer, options),
        }
        for name, run in arms.items():
            wall, processor = time.monotonic(), time.process_time()
            count, real = run(texts if repeat else 200)
            wall, processor = time.monotonic() - wall, time.process_time() - processor
            if repeat:  # the first round warms up
                found.setdefault(name, []).append((count / wall, count / processor, real))
    columns = ("texts_per_second", "texts_per_second_and_core", "real_tokens")
    return [
        {"arm": name}
        | {
            column: statistics.median(figures)
            for column, figures in zip(columns, zip(*values, strict=True), strict=True)
        }
        for name, values in found.items()
    ]


def states(name: str, source: Source, tokenizer: Tokenizer, repeats: int) -> dict[str, float | str]:
    """Seconds that reading the readers' states takes between batches, their bytes, and seconds of restoring them."""
    options, seconds = stream_options(0, READERS), []
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
    """The share of training that waits for data, as the program logs it, window by window."""
    config = glue.get_config("sst2")
    config.max_eval_examples, config.train_for, config.log_every = (
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


def measure(folder: pathlib.Path, texts: int, repeats: int, steps: int) -> dict:
    """All figures."""
    result: dict = {"first_reading": first_reading(folder / "cache")}
    raw, tokenizer = registry.get(TASK), Tokenizer.load("small")
    ready = prepare(raw, tokenizer, folder / "prepared")
    result["throughput"] = throughput(texts, repeats, raw, ready, tokenizer)
    result["states"] = [
        states(name, source, tokenizer, repeats)
        for name, source in {"ours, raw": raw, "ours, prepared": ready}.items()
    ]
    return result | {"waiting": waiting(steps, folder / "run")}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes what `--json` asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=20_000, help="that each arm makes in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80, help="of training, for the waiting share")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(pathlib.Path(temporary), args.texts, args.repeats, args.steps)
    print(f"first reading of the records: {result['first_reading']:.1f} s\n")
    print(
        "| SST-2, rows of 128 | texts/s | texts/s and core | real tokens |\n| --- | --- | --- | --- |"
    )
    for row in result["throughput"]:
        print(
            f"| {row['arm']} | {row['texts_per_second']:,.0f} | {row['texts_per_second_and_core']:,.0f} | {row['real_tokens']:.1%} |"
        )
    print(
        f"\n| state of {READERS} readers | stall, median | longest | size | restoring |\n| --- | --- | --- | --- | --- |"
    )
    for row in result["states"]:
        names = ("median_seconds", "longest_seconds", "restoring_seconds")
        median, longest, restoring = (f"{row[name] * 1e3:.2f} ms" for name in names)
        print(f"| {row['arm']} | {median} | {longest} | {row['bytes']:,} bytes | {restoring} |")
    print()
    for row in result["waiting"]:
        print(
            f"step {row['step']}: waiting for data {row['waiting_for_data_share']:.2%} of the time, {row['texts_per_second']:.0f} texts/s trained on"
        )
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
