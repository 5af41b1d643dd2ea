"""Time of a smoke run to its first step and to its end, on a first and on a second start.

    TFDS_DATA_DIR=… MSMARCO_DIR=… python -m gemma_encoder.experiments.benchmarks.starts
        [--peer=PYTHON] [--only=own,sst2,msmarco]

Runs are the program's own smoke runs, as a user starts them: a CSV of 48 texts
(`own:classification,smoke`), SST-2 of TensorFlow Datasets (`glue:sst2,smoke`), and files in MS
MARCO's layout (`msmarco:smoke`). A first start has an empty cache folder: it reads the data and
compiles. The second start uses the tables and programs in that folder. The whole process is timed,
from before Python starts to its end; the first step ends when its loss is printed.

The peer is a script around transformers' Trainer on the same CSV: a model of the same shape from
disk, the same tokenizer, the same number of updates and of texts in each, two evaluations of the
same 24 texts, and a checkpoint. `--peer` names a Python that has torch, transformers and
accelerate, by default this one.

Processor seconds are those of all cores; they tell a busy machine from a slow program. PyTorch's
threads spin while they wait for each other, which makes it several times slower where other jobs
run; there, compare under OMP_WAIT_POLICY=passive.
"""

import argparse
import csv
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

import gemma_encoder
from gemma_encoder import runtime
from gemma_encoder.experiments.benchmarks import harness, models
from gemma_encoder.inputs.json_text import to_json

TEXTS = 48  # of the train split
EVALUATED = 24  # texts of the validation split
STEPS = 6
LENGTH = 128
RUNS = {  # config, and the environment variable that names its data
    "own": ("own:classification,smoke", ""),
    "sst2": ("glue:sst2,smoke", "TFDS_DATA_DIR"),
    "msmarco": ("msmarco:smoke", "MSMARCO_DIR"),
}
PEER = "own, Trainer (peer)"
COLUMNS = (
    "arm",
    "to the first step",
    "whole process",
    "processors",
    "spread",
    "of the peer's time",
)
PROGRAM = (
    "import json, sys; from gemma_encoder.experiments.benchmarks import starts; "
    "starts.trainer(**json.loads(sys.argv[1]))"
)


def write_texts(file: pathlib.Path, count: int, seed: int) -> None:
    """Writes a CSV of texts of six to 41 words, whose last word is their class."""
    rng = random.Random(seed)
    words = ["wing", "flow", "plot", "actor", "song", "scene", "light", "fine"]
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["text", "label"])
        for index in range(count):
            text = rng.choices(words, k=rng.randint(5, 40))
            label = ("bad", "good")[index % 2]
            rows.writerow([" ".join([*text, label]), label])


def trainer(model: str, train: str, validation: str, workdir: str) -> None:
    """Runs the peer's script: reads, tokenizes, trains, evaluates and saves."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def read(file: str) -> list[dict]:
        with open(file, newline="") as opened:
            rows = list(csv.DictReader(opened))
        texts = [row["text"] for row in rows]
        encoded = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
        return [
            {"input_ids": ids, "labels": int(row["label"] == "good")}
            for ids, row in zip(encoded, rows, strict=True)
        ]

    arguments = transformers.TrainingArguments(
        output_dir=workdir,
        max_steps=STEPS,
        per_device_train_batch_size=TEXTS,
        per_device_eval_batch_size=EVALUATED,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=STEPS // 2,
        save_strategy="steps",
        save_steps=STEPS,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, dtype=torch.float32, attn_implementation=models.attention(pathlib.Path(model))
    )
    transformers.Trainer(
        classifier,
        arguments,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        train_dataset=read(train),
        eval_dataset=read(validation),
        processing_class=tokenizer,
    ).train()


def timed(command: Sequence[str], environment: Mapping[str, str], mark: str) -> dict[str, float]:
    """Runs a process and times it.

    Returns the seconds of the whole process, the seconds until it prints a line that contains
    `mark`, and its processor seconds.

    Raises:
        RuntimeError: the process failed or never printed the mark; with the end of its output.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = []
    marked = None
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        lines.append(line)
        if mark in line and marked is None:
            marked = time.perf_counter() - began
    code = process.wait()
    seconds = time.perf_counter() - began
    if code or marked is None:
        raise RuntimeError(f"{' '.join(command)} exited with {code}:\n{''.join(lines)[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "first_step": marked, "processors": processors}


def ours(folder: pathlib.Path, name: str) -> dict[str, float]:
    """Starts our program and times it; its caches are in `folder`/cache."""
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    flags = [f"--config={RUNS[name][0]}", f"--workdir={workdir}", "--config.log_every=1 steps"]
    if name == "own":
        flags += [f"--config.own.{split}={folder / split}.csv" for split in ("train", "validation")]
    environment = {**os.environ, "GEMMA_ENCODER_CACHE": str(folder / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    return timed([sys.executable, "-m", "gemma_encoder", "train", *flags], environment, "step 1/")


def theirs(folder: pathlib.Path, interpreter: str) -> dict[str, float]:
    """Starts the peer's script with a Python interpreter and times it."""
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    settings = {"model": folder / "peer", "workdir": workdir}
    settings |= {split: folder / f"{split}.csv" for split in ("train", "validation")}
    root = str(pathlib.Path(gemma_encoder.__file__).parents[1])
    command = [interpreter, "-c", PROGRAM, to_json(settings, default=str)]
    return timed(command, {**os.environ, "PYTHONPATH": root}, "'loss'")


def measure(
    folder: pathlib.Path, names: Sequence[str], interpreter: str, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """Returns the figures of each round after the first, which warms up, by arm.

    Args:
        folder: folder of the CSV files, the peer's model and the runs.
        names: keys of `RUNS`.
        interpreter: the peer's Python; empty to leave the peer out.
        repeats: counted rounds.
    """
    results: dict[str, list[dict[str, float]]] = {}
    for turn in range(repeats + 1):
        figures = {}
        if interpreter and "own" in names:
            figures[PEER] = theirs(folder, interpreter)
        for name in names:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            figures[f"{name}, ours, first start"] = ours(folder, name)
            figures[f"{name}, ours, second start"] = ours(folder, name)
        if turn:
            for arm, times in figures.items():
                results.setdefault(arm, []).append(times)
    return results


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Parses the command line.

    Returns the flags, the names of the runs whose data exist, and notes on those left out.
    """
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--peer", default="", help="Python of an environment that has the peer")
    parser.add_argument("--only", default=",".join(RUNS), help="names, separated by commas")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := set(names) - set(RUNS):
        parser.error(
            f"--only: unknown runs {', '.join(sorted(unknown))}; valid runs: {', '.join(RUNS)}"
        )
    missing = {}
    for name in names:
        variable = RUNS[name][1]
        if variable and not os.environ.get(variable):
            missing[name] = variable
    notes = [f"{name} is left out: {variable} is not set" for name, variable in missing.items()]
    return args, [name for name in names if name not in missing], notes


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    args, names, notes = parse_arguments(argv)
    runtime.quiet()
    interpreter = args.peer or sys.executable
    if not args.peer and (reason := harness.missing("torch", "transformers", "accelerate")):
        interpreter = ""
        notes.append(f"the peer is left out: {reason}, or name another Python by --peer")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_texts(folder / "train.csv", TEXTS, 0)
        write_texts(folder / "validation.csv", EVALUATED, 1)
        if interpreter:
            models.write(folder / "model", "gemma3_tiny", LENGTH, pooling="last_k")
            models.as_sequence_classifier(folder / "model", folder / "peer", 2)
        results = measure(folder, names, interpreter, args.repeats)
    rows = []
    for name, figures in harness.medians(results).items():
        times = [f"{figures[key]:.1f} s" for key in ("first_step", "seconds", "processors")]
        is_compared = PEER in results and name.startswith("own, ours")
        share = f"{1 / harness.ratio(results, name, PEER):.2f} x" if is_compared else ""
        rows.append([name, *times, f"{figures['spread']:.0%}", share])
    title = f"smoke runs of {STEPS} steps, a process a turn, {args.repeats} rounds"
    harness.publish(title, COLUMNS, rows, notes, args.json)


if __name__ == "__main__":
    main()
