"""Fine-tuning on SST-2 as a user runs it: the whole program, beside a script around Trainer.

    TFDS_DATA_DIR=… python -m gemma_encoder.experiments.benchmarks.program_sst2
        [--size=gemma3_270m] [--texts=512] [--rows=8] [--device=cpu]

Both start from the same exported weights, train one epoch on SST-2's first texts (AdamW at a
constant rate, no dropout), score with a linear head on the last token, evaluate 24 texts, and write
a checkpoint. The time includes imports, reading, tokenizing, compiling and writing. An update of
each arm sees as many texts as a batch of ours holds on average.

Ours is `gemma-encoder train --config=glue:sst2`, which reads TensorFlow Datasets' records and packs
rows of 128 tokens. The peer does what transformers' run_glue.py does, from JSON lines with the same
texts, so that it need not import TensorFlow: it tokenizes, then runs Trainer with dynamic padding,
with batches in random order and grouped by length.

Every turn is a new run. The last arm is ours on its second start, with the compilation cache of the
first. Needs the extra `bench`; without it, only ours runs.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from gemma_encoder.experiments.benchmarks import finetune_sst2, fresh, harness, models
from gemma_encoder.inputs.json_text import to_json

EVALUATED = 24  # texts
COLUMNS = ("arm", "whole process", "texts/s", "mean loss", "spread", "against the peers")


def write_texts(file: pathlib.Path, split: str, count: int) -> None:
    """Writes SST-2's first texts and labels as JSON lines, rendered by our recipe's template."""
    from gemma_encoder.data import registry
    from gemma_encoder.data.source import DataOptions

    source = registry.get(
        models.TASK, DataOptions(max_train_examples=count, max_eval_examples=count)
    )
    lines = []
    for index in range(source.size(split)):
        for example in source.examples(split, index):
            text = source.task.template.render(example.fields)[0]
            lines.append(to_json({"text": text, "label": int(example.label)}))
    file.write_text("\n".join(lines))


def read_examples(file: pathlib.Path, tokenizer) -> list[dict]:
    """Reads JSON lines and tokenizes them with a transformers tokenizer."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [line["text"] for line in lines]
    encoded = tokenizer(texts, truncation=True, max_length=finetune_sst2.ROW)["input_ids"]
    return [
        {"input_ids": ids, "labels": line["label"]}
        for ids, line in zip(encoded, lines, strict=True)
    ]


def run_glue(
    model: str,
    texts: str,
    evaluated: str,
    workdir: str,
    batch: int,
    grouped: bool,
    dtype: str,
    device: str,
) -> dict[str, float]:
    """Runs the peer's script: tokenizes, trains an epoch, evaluates and saves."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    train = read_examples(pathlib.Path(texts), tokenizer)
    arguments = transformers.TrainingArguments(
        output_dir=workdir,
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length" if grouped else "random",
        bf16=dtype == "bfloat16",
        use_cpu=device == "cpu",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, dtype=torch.float32, attn_implementation=models.attention(pathlib.Path(model))
    )
    trainer = transformers.Trainer(
        classifier,
        arguments,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=read_examples(pathlib.Path(evaluated), tokenizer),
        processing_class=tokenizer,
    )
    began = time.perf_counter()
    outcome = trainer.train()
    training = time.perf_counter() - began
    evaluation = trainer.evaluate()["eval_loss"]
    trainer.save_model(workdir)
    torch.save(trainer.optimizer.state_dict(), pathlib.Path(workdir) / "optimizer.pt")
    return {
        "texts": len(train),
        "training": training,
        "loss": outcome.training_loss,
        "evaluation": evaluation,
    }


def peer(folder: str, batch: int, grouped: bool, dtype: str, device: str) -> harness.Turn:
    """Sets up the arm of Trainer: a process for each turn."""

    def run(turn: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=folder) as workdir:
            settings = {
                "model": f"{folder}/peer",
                "texts": f"{folder}/train.jsonl",
                "evaluated": f"{folder}/validation.jsonl",
                "workdir": workdir,
                "batch": batch,
                "grouped": grouped,
                "dtype": dtype,
                "device": device,
            }
            return fresh.run(f"{__spec__.name}:run_glue", settings)

    return run


def training_command(folder: pathlib.Path, workdir: str, texts: int, rows: int, dtype: str) -> list:
    """Returns the command line of our program."""
    fields = {
        "model.size": "pretrained",
        "model.pretrained": str(folder / "model"),
        "model.pooling.name": "last_k",
        "model.feed_forward_dropout": 0.0,
        "model.compute_dtype": dtype,
        "tokenizer": "auto",
        "max_train_examples": texts,
        "max_eval_examples": EVALUATED,
        "batch.rows": rows,
        "batch.segments": finetune_sst2.SEGMENTS,
        "train_for": "1 epochs",
        "warmup": "0 steps",
        "evaluate_every": "100 percent",
        "optimizer.schedule": "constant",
        "optimizer.learning_rate": 1e-5,
        "optimizer.weight_decay": 0.0,
        "compilation_cache": str(folder / "programs"),
    }
    return [
        sys.executable,
        "-m",
        "gemma_encoder",
        "train",
        "--config=glue:sst2",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def ours(folder: str, texts: int, rows: int, dtype: str, use_cache: bool) -> harness.Turn:
    """Sets up our arm: the program itself, in a process for each turn.

    With `use_cache` it uses the compilation cache of an earlier turn; otherwise it empties it.
    """
    root = pathlib.Path(folder)

    def run(turn: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            if not use_cache:
                shutil.rmtree(root / "programs", ignore_errors=True)
            workdir = f"{temporary}/run"
            command = training_command(root, workdir, texts, rows, dtype)
            began = time.time()
            done = subprocess.run(command, capture_output=True, text=True)
            seconds = time.time() - began
            if done.returncode:
                output = f"{done.stdout[-1000:]}{done.stderr[-3000:]}"
                raise RuntimeError(f"{' '.join(command)}\n{output}")
            log = pathlib.Path(workdir, "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in log.splitlines()]
        losses = [line["loss"] for line in lines if line["split"] == "train"]
        return {
            "seconds": seconds,
            "texts": texts,
            "loss": float(np.mean(losses)),
            "gib": float("nan"),
        }

    return run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--texts", type=int, default=512, help="texts of SST-2, each used once")
    parser.add_argument("--rows", type=int, default=8, help="ours: rows of 128 tokens per batch")
    harness.add_device(parser)
    return parser.parse_args(argv)


def make_peers(args: argparse.Namespace, folder: pathlib.Path) -> tuple[list[harness.Arm], str]:
    """Writes the peer's data and model; returns its two arms and a note on the size of updates."""
    write_texts(folder / "train.jsonl", "train", args.texts)
    write_texts(folder / "validation.jsonl", "validation", EVALUATED)
    finetune_sst2.write_tokens(folder / "tokens.npz", args.texts)
    batch = finetune_sst2.texts_per_batch(folder / "tokens.npz", args.rows, batches=20)
    models.as_sequence_classifier(folder / "model", folder / "peer", 2)
    settings = {"folder": str(folder), "batch": batch, "dtype": args.dtype, "device": args.device}
    arms = [
        harness.Arm(name, f"{__spec__.name}:peer", {**settings, "grouped": grouped})
        for name, grouped in (
            ("Trainer, dynamic padding (peer)", False),
            ("Trainer, grouped by length (peer)", True),
        )
    ]
    return arms, f"{batch} texts an update"


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    args = parse_arguments(argv)
    if not os.environ.get("TFDS_DATA_DIR"):
        raise SystemExit("TFDS_DATA_DIR must name a folder with prepared glue/sst2; it is not set")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        models.write(folder / "model", args.size, finetune_sst2.ROW, models.TASK, "last_k")
        peers = []
        if reason := harness.missing("torch", "transformers", "accelerate"):
            note = f"the peer is left out: {reason}"
        else:
            peers, note = make_peers(args, folder)
        shared = {"folder": temporary, "texts": args.texts, "rows": args.rows, "dtype": args.dtype}
        function = f"{__spec__.name}:ours"
        our_arms = [
            harness.Arm("ours", function, {**shared, "use_cache": False}),
            harness.Arm("ours, second start", function, {**shared, "use_cache": True}),
        ]
        results = harness.take_turns(peers + our_arms, args.repeats)
    peer_names = [arm.name for arm in peers]
    rows = []
    for name, figures in harness.medians(results).items():
        speedups = []
        if name not in peer_names:
            speedups = [harness.ratio(results, name, peer_name) for peer_name in peer_names]
        row = [
            name,
            f"{figures['seconds']:.1f} s",
            f"{figures['texts'] / figures['seconds']:.1f}",
            f"{figures['loss']:.3f}",
            f"{figures['spread']:.0%}",
            ", ".join(f"{speedup:.2f} x" for speedup in speedups),
        ]
        rows.append(row)
    title = (
        f"SST-2, {args.size}, {args.dtype}, {args.texts} texts from start to end, "
        f"{args.repeats} rounds"
    )
    harness.publish(title, COLUMNS, rows, [note], args.json)


if __name__ == "__main__":
    main()
