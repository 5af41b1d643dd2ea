"""Fine-tuning on SST-2 as a user runs it: a whole program from its start to its end, ours beside a script around transformers' Trainer.

    TFDS_DATA_DIR=… python -m gemma_encoder.experiments.benchmarks.program_sst2 [--size=gemma3_270m] [--texts=512] [--rows=8] [--device=cpu]

Both start from the same exported weights and train one epoch over the same first texts of SST-2 with AdamW at a constant rate, no dropout, score
by a linear head on the last token, evaluate 24 texts and leave a checkpoint. Imports, reading, tokenising, compiling and writing are in the time. Ours is
`gemma-encoder train --config=glue:sst2`, reading TensorFlow Datasets' records, packed rows of 128. The peer
does what transformers' run_glue.py does, from JSON lines that hold the same texts (so that it need not import TensorFlow): tokenise,
then Trainer with dynamic padding, its batches in random order and grouped by length. An update of each arm sees as many texts as a batch of
ours holds on average. Every turn is a run anew; the last arm is ours on its second start, with a folder of compiled programs. Needs the extra `bench`
(without it, ours runs alone).
"""

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

EVALUATED = 24  # texts


def write_texts(file: pathlib.Path, split: str, count: int) -> None:
    """SST-2's first texts and labels as JSON lines, the fields rendered as our recipe does."""
    from gemma_encoder.data import registry
    from gemma_encoder.data.source import DataOptions

    source = registry.get(
        models.TASK, DataOptions(max_train_examples=count, max_eval_examples=count)
    )
    lines = []
    for index in range(source.size(split)):
        for example in source.examples(split, index):
            lines.append(
                json.dumps(
                    {
                        "text": source.task.template.render(example.fields)[0],
                        "label": int(example.label),
                    }
                )
            )
    file.write_text("\n".join(lines))


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
    """The peer's script: tokenise, train an epoch, evaluate, save."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def read(file: str) -> list[dict]:
        lines = [json.loads(line) for line in pathlib.Path(file).read_text().splitlines()]
        encoded = tokenizer(
            [line["text"] for line in lines], truncation=True, max_length=finetune_sst2.ROW
        )["input_ids"]
        return [
            {"input_ids": ids, "labels": line["label"]}
            for ids, line in zip(encoded, lines, strict=True)
        ]

    train = read(texts)
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
    collate = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(
        classifier,
        arguments,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=read(evaluated),
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
    """The arm of Trainer: a process for each turn."""
    place = pathlib.Path(folder)

    def run(turn: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=place) as workdir:
            settings = {
                "model": str(place / "peer"),
                "texts": str(place / "train.jsonl"),
                "evaluated": str(place / "validation.jsonl"),
                "workdir": workdir,
            }
            return fresh.run(
                f"{__spec__.name}:run_glue",
                {**settings, "batch": batch, "grouped": grouped, "dtype": dtype, "device": device},
            )

    return run


def ours(folder: str, texts: int, rows: int, dtype: str, kept: bool) -> harness.Turn:
    """Our arm: the program itself, in a process for each turn; `kept` programs come from the turn before."""
    place = pathlib.Path(folder)
    cache = place / "programs"

    def run(turn: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=place) as workdir:
            if not kept:
                shutil.rmtree(cache, ignore_errors=True)
            fields = {
                "model.size": "pretrained",
                "model.pretrained": str(place / "model"),
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
                "compilation_cache": str(cache),
            }
            flags = [f"--config.{name}={value}" for name, value in fields.items()]
            command = [
                sys.executable,
                "-m",
                "gemma_encoder",
                "train",
                "--config=glue:sst2",
                f"--workdir={workdir}/run",
                *flags,
            ]
            began = time.time()
            done = subprocess.run(command, capture_output=True, text=True)
            seconds = time.time() - began
            if done.returncode:
                raise RuntimeError(
                    f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
                )
            lines = [
                json.loads(line)
                for line in (pathlib.Path(workdir) / "run" / "metrics.jsonl")
                .read_text()
                .splitlines()
            ]
            trained = [line for line in lines if line["split"] == "train"]
        return {
            "seconds": seconds,
            "texts": texts,
            "loss": float(np.mean([line["loss"] for line in trained])),
            "gib": float("nan"),
        }

    return run


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--size", default="gemma3_270m")
    parser.add_argument("--texts", type=int, default=512, help="of SST-2, each seen once")
    parser.add_argument("--rows", type=int, default=8, help="of ours, of 128 tokens each")
    harness.add_device(parser)
    args = parser.parse_args(argv)
    if not os.environ.get("TFDS_DATA_DIR"):
        raise SystemExit("TFDS_DATA_DIR must name a folder with prepared glue/sst2; it is not set")
    notes, arms = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        models.write(folder / "model", args.size, finetune_sst2.ROW, models.TASK, "last_k")
        if reason := harness.missing("torch", "transformers", "accelerate"):
            notes.append(f"the peer is left out: {reason}")
        else:
            write_texts(folder / "train.jsonl", "train", args.texts)
            write_texts(folder / "validation.jsonl", "validation", EVALUATED)
            finetune_sst2.write_tokens(folder / "tokens.npz", args.texts)
            stream = finetune_sst2.packed_batches(folder / "tokens.npz", args.rows)
            batch = round(float(np.mean([(next(stream).weight > 0).sum() for _ in range(20)])))
            notes.append(f"{batch} texts an update")
            models.as_sequence_classifier(folder / "model", folder / "peer", 2)
            theirs = {
                "folder": str(folder),
                "batch": batch,
                "dtype": args.dtype,
                "device": args.device,
            }
            arms.append(
                harness.Arm(
                    "Trainer, dynamic padding (peer)",
                    f"{__spec__.name}:peer",
                    {**theirs, "grouped": False},
                )
            )
            arms.append(
                harness.Arm(
                    "Trainer, grouped by length (peer)",
                    f"{__spec__.name}:peer",
                    {**theirs, "grouped": True},
                )
            )
        mine = {"folder": str(folder), "texts": args.texts, "rows": args.rows, "dtype": args.dtype}
        arms.append(harness.Arm("ours", f"{__spec__.name}:ours", {**mine, "kept": False}))
        arms.append(
            harness.Arm("ours, second start", f"{__spec__.name}:ours", {**mine, "kept": True})
        )
        seen = harness.take_turns(arms, args.repeats)
    peers, rows = [arm.name for arm in arms if arm.name.endswith("(peer)")], []
    for name, found in harness.medians(seen).items():
        against = (
            ""
            if name in peers
            else ", ".join(f"{harness.ratio(seen, name, other):.2f} x" for other in peers)
        )
        parts = [
            f"{found['seconds']:.1f} s",
            f"{found['texts'] / found['seconds']:.1f}",
            f"{found['loss']:.3f}",
            f"{found['spread']:.0%}",
        ]
        rows.append([name, *parts, against])
    title = f"SST-2, {args.size}, {args.dtype}, {args.texts} texts from start to end, {args.repeats} rounds"
    harness.publish(
        title,
        ["arm", "whole process", "texts/s", "mean loss", "spread", "against the peers"],
        rows,
        notes,
        args.json,
    )


if __name__ == "__main__":
    main()
