"""Pretrains a small causal decoder on unlabeled text, by the same transformer and the same loop that fine-tune encoders.

    TFDS_DATA_DIR=DATA/tfds gemma-encoder pretrain --workdir=runs/decoder --output=decoder \
        --config.text.train="('reviews.train.txt.gz','collection.tsv','tfds:glue/sst2')" --config.text.validation="('reviews.validation.txt.gz',)"
    gemma-encoder train --config=glue:sst2,size=gemma3_mini --config.model.pretrained=decoder --workdir=runs/sst2

The first command trains, or goes on where it stopped, and then writes the folder `decoder`: the weights as the `gemma` package stores them,
tokenizer.model beside them, and what it is and how good (README.md, record.json), next to a Kneser-Ney trigram on the same tokens. The second
switches its mask to bidirectional and fine-tunes it. `gemma-encoder train --config=pretrain_decoder` trains the same
without writing the folder.

Argument: `size=…` (gemma3_mini by default: 4 layers of width 128, the small tokenizer, two CPU cores) and `smoke` (a slice of the text, in
seconds). Text: `config.text`, see `TextOptions` in gemma_encoder/data/tasks/text.py; nothing is downloaded.
"""

import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma_encoder.training import recipe

if TYPE_CHECKING:
    from gemma_encoder.training.loop import TrainingResult


def get_config(arg: str = ""):
    """The config; `arg` may be "size=…" and "smoke"."""
    _, options, smoke = recipe.parse_arg(arg)
    config = recipe.default_config()
    recipe.set_size(config, options.get("size", "gemma3_mini"))
    config.tasks = ("text",)
    config.model.attention = "causal"
    config.model.feed_forward_dropout, config.model.remat = (
        0.0,
        "dots",
    )  # on a CPU, what is not kept need not be written
    config.max_length = config.batch.row_length = 256
    # Small batches, high rate: after 0.4 M tokens, 8 rows at 3e-3 or 6e-3 had a validation perplexity of 459 or 377, 16 rows at 2e-3 one of 750.
    config.batch.rows, config.batch.segments = 8, 16
    config.optimizer.learning_rate, config.optimizer.b2, config.optimizer.schedule = (
        5e-3,
        0.98,
        "cosine",
    )
    config.train_for, config.warmup = "3 epochs", "3 percent"
    config.evaluate_every = config.checkpoint_every = "10 percent"
    return recipe.smoke(config) if smoke else config


def write_decoder(
    config: Any, workdir: str, outcome: "TrainingResult", output: str, command: str
) -> dict[str, Any]:
    """Writes the decoder of a run that has ended, and returns what its record.json holds.

    Args:
        config: the run's.
        workdir: of the run.
        outcome: what the loop said.
        output: a folder that does not exist yet.
        command: how the run was started.
    """
    import jax
    import numpy as np

    import gemma_encoder as ge
    from gemma_encoder.experiments.pretraining.ngram import Trigram
    from gemma_encoder.inputs.template import encode
    from gemma_encoder.training.build import build
    from gemma_encoder.training.metrics_log import read_metrics

    built = build(config)
    source, tokenizer, tokens = built.sources[0], built.tokenizer, {}
    for split in ("train", "validation"):
        pieces = [{"text": piece} for piece in source.pieces(split)]
        tokens[split] = [
            text.tokens
            for text in encode(tokenizer, source.task.template, pieces, config.max_length)
        ]
    backbone, folder = ge.load_backbone(outcome.checkpoint), pathlib.Path(output)
    ge.save_gemma(backbone, folder)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    batch_tokens, log = config.batch.rows * config.batch.row_length, read_metrics(workdir)
    record = {
        "size": config.model.size,
        "parameters": backbone.config.num_parameters,
        "tokenizer": tokenizer.name,
        "train": _names(source.text.train),
        "validation": _names(source.text.validation)
        or f"a share of {source.text.held_out:g} of train, held out",
        "train_pieces": len(tokens["train"]),
        "train_tokens": sum(map(len, tokens["train"])),
        "seed": config.seed,
        "steps": outcome.step,
        "batch_tokens": batch_tokens,
        "training_seconds": round(_seconds(log, batch_tokens), 1),
        "machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}, JAX {jax.__version__}",
        "validation_perplexity_by_step": {
            line["step"]: round(line["perplexity"], 2)
            for line in log
            if line["split"] == "validation"
        },
        "validation_perplexity": outcome.metrics["text"]["perplexity"],
        "validation_tokens_predicted": int(np.sum(outcome.predictions["text"][0].outputs[:, 1])),
        "trigram_perplexity": Trigram(
            tokens["train"], tokenizer.vocab_size, tokenizer.bos_id
        ).perplexity(tokens["validation"]),
        "command": command,
    }
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(_card(record))
    return record


def _names(sources: Sequence[str]) -> list[str]:
    """Sources without the folders they lay in, which say nothing to whoever gets the decoder."""
    return [
        source if source.startswith("tfds:") else pathlib.Path(source).name for source in sources
    ]


def _seconds(lines: Sequence[Mapping[str, Any]], batch_tokens: int) -> float:
    """The time that training took, all starts of the run together: of every line of the log its steps, at its rate."""
    train = [line for line in lines if line["split"] == "train"]
    before = [0, *(line["step"] for line in train)]
    return sum(
        (line["step"] - last) * batch_tokens / line["tokens_per_second"]
        for line, last in zip(train, before, strict=False)
    )


def _card(record: Mapping[str, Any]) -> str:
    """The folder's README: what the decoder is, and how good."""
    validation = (
        record["validation"]
        if isinstance(record["validation"], str)
        else ", ".join(record["validation"])
    )
    rows = {
        "size": f"`{record['size']}`, {record['parameters']:,} parameters, tokenizer {record['tokenizer']}",
        "trained on": f"{', '.join(record['train'])}: {record['train_tokens']:,} tokens in {record['train_pieces']:,} pieces",
        "trained for": f"{record['steps']:,} steps of at most {record['batch_tokens']:,} tokens, seed {record['seed']}, {record['training_seconds']:,.0f} s",
        "machine": record["machine"],
        "validation": f"{validation}: {record['validation_tokens_predicted']:,} predicted tokens",
        "validation perplexity, a token": f"{record['validation_perplexity']:.2f}",
        "on the way there, by step": ", ".join(
            f"{step}: {value:.1f}"
            for step, value in record["validation_perplexity_by_step"].items()
        ),
        "of an interpolated Kneser-Ney trigram on the same tokens": f"{record['trigram_perplexity']:.2f}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "# A small causal decoder\n\nPretrained from random weights by gemma_encoder, stored as the `gemma` package stores Gemma. It knows its training "
        f"text, not language at large, and derives from no published weights.\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"Fine-tune it as an encoder, its mask switched to bidirectional, with `size={record['size']}` and `--config.model.pretrained=` this folder; "
        f"or `gemma_encoder.load_backbone(FOLDER)`. Made by:\n\n```\n{record['command']}\n```\n"
    )
