"""The model of a config: its transformer, the tokenizer that fits, the heads, what is trained."""

import dataclasses
from collections.abc import Sequence

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model import lora
from gemma_encoder.model.config import EncoderConfig, HeadConfig, TransformerConfig
from gemma_encoder.model.heads import check_heads
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.training.config import ModelConfig
from gemma_encoder.training.optimizer_config import OptimizerConfig
from gemma_encoder.training.recipe import SIZES
from gemma_encoder.weights import backbone
from gemma_encoder.weights.tensors import Checkpoint


def open_start(model: ModelConfig) -> Checkpoint | None:
    """Opens the checkpoint whose weights training starts from, None where they are random.

    Where both are named, `warm_start` comes before `pretrained`.
    """
    path = model.warm_start or model.pretrained
    return backbone.open_checkpoint(path) if path else None


def make_transformer(model: ModelConfig, checkpoint: Checkpoint | None) -> TransformerConfig:
    """The transformer of the size, changed as `model.transformer` says.

    With weights it is exactly theirs, and must be of that size.
    """
    named = GEMMA_CONFIGS.get(SIZES[model.size])
    if named is None and checkpoint is None:
        raise InputError(
            "model.size=pretrained needs model.pretrained, the checkpoint that says what the "
            "model is; else name a size"
        )
    expected = named and dataclasses.replace(named, **model.transformer)
    if checkpoint is None:
        return expected
    stored = checkpoint.config(expected)
    transformer = dataclasses.replace(stored, **model.transformer)
    if unequal := backbone.differences(stored, expected or transformer):
        path = model.warm_start or model.pretrained
        size = model.size if named else "what model.transformer says"
        raise InputError(
            f"the checkpoint {path} is not {size}: {'; '.join(unequal)}; "
            "choose model.size=pretrained without model.transformer, or another checkpoint"
        )
    return transformer


def make_tokenizer(
    name: str, transformer: TransformerConfig, checkpoint: Checkpoint | None
) -> Tokenizer:
    """The tokenizer by name; "auto" is the one that comes with the weights, or their family's."""
    if name == "auto" and checkpoint is not None:
        return backbone.checkpoint_tokenizer(checkpoint, transformer)
    tokenizer = Tokenizer.load(backbone.family(transformer) if name == "auto" else name)
    backbone.check_vocabulary(tokenizer, transformer)
    return tokenizer


def make_encoder(
    model: ModelConfig, tasks: Sequence[Task], transformer: TransformerConfig
) -> EncoderConfig:
    """The encoder with a head for each task, or for several that share one."""
    owners: dict[str, Task] = {}
    for task in tasks:
        owner = owners.setdefault(task.head, task)
        if (task.kind, task.classes) != (owner.kind, owner.classes):
            raise InputError(
                f"tasks {owner.name!r} and {task.name!r} cannot share the head {task.head!r}: "
                f"{owner.kind} {owner.classes or ''} is not {task.kind} {task.classes or ''}"
            )
    heads = {
        head: HeadConfig(owner.num_outputs, owner.kind.head, model.head_hidden)
        for head, owner in owners.items()
    }
    encoder = EncoderConfig(
        transformer=transformer,
        heads=heads,
        pooling=model.pooling,
        attention=model.attention,
        attention_dropout=model.attention_dropout,
        feed_forward_dropout=model.feed_forward_dropout,
        compute_dtype=model.compute_dtype,
        remat=model.remat,
        attention_implementation=model.attention_implementation,
        lora=model.lora,
    )
    check_heads(encoder)
    return encoder


def make_optimizer_config(config: OptimizerConfig, encoder: EncoderConfig) -> OptimizerConfig:
    """The options of the optimizer; with adapters, the backbone's own parameters are frozen."""
    if not encoder.lora.rank:
        return config
    frozen = rf"backbone/.*(?<!{lora.A}|{lora.B})"
    return dataclasses.replace(
        config, freeze=f"{config.freeze}|{frozen}" if config.freeze else frozen
    )
