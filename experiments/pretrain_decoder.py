"""Pretrains a small causal decoder on unlabeled text.

    TFDS_DATA_DIR=DATA/tfds gemma-encoder pretrain --workdir=runs/decoder --output=decoder \
      --config.text.train="('reviews.train.txt.gz','collection.tsv','tfds:glue/sst2')" \
      --config.text.validation="('reviews.validation.txt.gz',)"
    gemma-encoder train --config=glue:sst2,size=gemma3_mini --config.model.pretrained=decoder \
      --workdir=runs/sst2

Uses the transformer and the training loop of encoders. The first command trains, or resumes, and
writes the folder `decoder`: the weights in the format of the `gemma` package, tokenizer.model, and
the decoder's description and perplexity (README.md, record.json) beside that of a Kneser-Ney
trigram model of the same tokens. The second command switches the mask to bidirectional and
fine-tunes the decoder. `gemma-encoder train --config=pretrain_decoder` trains the same decoder
without writing the folder.

Argument: `size=…` (by default gemma3_mini: 4 layers of width 128, the small tokenizer, two CPU
cores) and `smoke` (a slice of the text, in seconds). Text: `config.text`, see `TextOptions` in
gemma_encoder/data/tasks/text.py; nothing is downloaded.
"""

import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.training import recipe
from gemma_encoder.whole_files import write_whole

if TYPE_CHECKING:
    import numpy as np

    from gemma_encoder.data.tasks.text import TextSource
    from gemma_encoder.inputs.tokenizer import Tokenizer
    from gemma_encoder.training.loop import TrainingResult


def get_config(arg: str = ""):
    """Returns the config; `arg` may have "size=…" and "smoke"."""
    _, options, smoke = recipe.parse_arg(arg)
    config = recipe.default_config()
    recipe.set_size(config, options.get("size", "gemma3_mini"))
    config.tasks = ("text",)
    config.model.attention = "causal"
    config.model.feed_forward_dropout = 0.0
    config.model.remat = "dots"  # on a CPU, recomputing activations is cheaper than storing them
    config.max_length = config.batch.row_length = 256
    # Small batches and a high learning rate: after 0.4 M tokens, 8 rows at 3e-3 or 6e-3 had a
    # validation perplexity of 459 or 377, 16 rows at 2e-3 one of 750.
    config.batch.rows = 8
    config.batch.segments = 16
    config.optimizer.learning_rate = 5e-3
    config.optimizer.b2 = 0.98
    config.optimizer.schedule = "cosine"
    config.train_for = "3 epochs"
    config.warmup = "3 percent"
    config.evaluate_every = config.checkpoint_every = "10 percent"
    return recipe.smoke(config) if smoke else config


def write_decoder(
    config: Any, workdir: str, outcome: "TrainingResult", output: str, command: str
) -> dict[str, Any]:
    """Writes the decoder of a finished run to a folder, and returns its record.json.

    Args:
        config: config of the run.
        workdir: workdir of the run.
        outcome: result of the training loop.
        output: a folder that does not exist yet.
        command: command that started the run.
    """
    import numpy as np

    import gemma_encoder as ge
    from gemma_encoder.experiments.pretraining.ngram import Trigram
    from gemma_encoder.training.build import build
    from gemma_encoder.training.metrics_log import read_metrics

    built = build(config)
    source = built.sources[0]
    tokenizer = built.tokenizer
    train = _tokenize(tokenizer, source, "train", config.max_length)
    validation = _tokenize(tokenizer, source, "validation", config.max_length)
    trigram = Trigram(train, tokenizer.vocab_size, tokenizer.bos_id)
    backbone = ge.load_backbone(outcome.checkpoint)
    folder = pathlib.Path(output)
    ge.save_gemma(backbone, folder)
    write_whole(folder / "tokenizer.model", tokenizer.model)
    batch_tokens = config.batch.rows * config.batch.row_length
    log = read_metrics(workdir)
    held_out = f"a share of {source.text.held_out:g} of train, held out"
    record = {
        "size": config.model.size,
        "parameters": backbone.config.num_parameters,
        "tokenizer": tokenizer.name,
        "train": _names(source.text.train),
        "validation": _names(source.text.validation) or held_out,
        "train_pieces": len(train),
        "train_tokens": sum(map(len, train)),
        "seed": config.seed,
        "steps": outcome.step,
        "batch_tokens": batch_tokens,
        "training_seconds": round(_seconds(log, batch_tokens), 1),
        "machine": _machine(),
        "validation_perplexity_by_step": {
            line["step"]: round(line["perplexity"], 2)
            for line in log
            if line["split"] == "validation"
        },
        "validation_perplexity": outcome.metrics["text"]["perplexity"],
        "validation_tokens_predicted": int(np.sum(outcome.predictions["text"][0].outputs[:, 1])),
        "trigram_perplexity": trigram.perplexity(validation),
        "command": command,
    }
    write_whole(folder / "record.json", to_json(record, indent=1) + "\n")
    write_whole(folder / "README.md", _card(record))
    return record


def _tokenize(
    tokenizer: "Tokenizer", source: "TextSource", split: str, max_length: int
) -> "list[np.ndarray]":
    from gemma_encoder.inputs.template import encode

    pieces = [{"text": piece} for piece in source.pieces(split)]
    encoded = encode(tokenizer, source.task.template, pieces, max_length)
    return [text.tokens for text in encoded]


def _machine() -> str:
    import jax

    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    cores = f"{os.cpu_count()} CPU cores"
    return f"{devices}, {cores}, {platform.machine()}, JAX {jax.__version__}"


def _names(sources: Sequence[str]) -> list[str]:
    """Returns file names without their folders, which mean nothing to users of the decoder."""
    return [
        source if source.startswith("tfds:") else pathlib.Path(source).name for source in sources
    ]


def _seconds(lines: Sequence[Mapping[str, Any]], batch_tokens: int) -> float:
    """Returns the training time of all starts of the run, from the steps and rates in the log."""
    train = [line for line in lines if line["split"] == "train"]
    before = [0, *(line["step"] for line in train)]
    return sum(
        (line["step"] - last) * batch_tokens / line["tokens_per_second"]
        for line, last in zip(train, before, strict=False)
    )


def _card(record: Mapping[str, Any]) -> str:
    """Returns the folder's README, a model card."""
    validation = record["validation"]
    if not isinstance(validation, str):
        validation = ", ".join(validation)
    perplexities = record["validation_perplexity_by_step"]
    trigram_row = "of an interpolated Kneser-Ney trigram on the same tokens"
    rows = {
        "size": f"`{record['size']}`, {record['parameters']:,} parameters, "
        f"tokenizer {record['tokenizer']}",
        "trained on": f"{', '.join(record['train'])}: {record['train_tokens']:,} tokens "
        f"in {record['train_pieces']:,} pieces",
        "trained for": f"{record['steps']:,} steps of at most {record['batch_tokens']:,} tokens, "
        f"seed {record['seed']}, {record['training_seconds']:,.0f} s",
        "machine": record["machine"],
        "validation": f"{validation}: {record['validation_tokens_predicted']:,} predicted tokens",
        "validation perplexity, a token": f"{record['validation_perplexity']:.2f}",
        "on the way there, by step": ", ".join(
            f"{step}: {value:.1f}" for step, value in perplexities.items()
        ),
        trigram_row: f"{record['trigram_perplexity']:.2f}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""\
# A small causal decoder

Pretrained from random weights by gemma_encoder, stored as the `gemma` package stores Gemma. It \
knows its training text, not language at large, and derives from no published weights.

| | |
| --- | --- |
{table}

Fine-tune it as an encoder, its mask switched to bidirectional, with `size={record["size"]}` and \
`--config.model.pretrained=` this folder; or `gemma_encoder.load_backbone(FOLDER)`. Made by:

```
{record["command"]}
```
"""
