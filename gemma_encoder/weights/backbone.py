"""Loads Gemma transformers, encoders and tokenizers from any supported checkpoint format."""

import dataclasses
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model import sharding
from gemma_encoder.model.config import EncoderConfig, TransformerConfig
from gemma_encoder.model.encoder import (
    abstract_encoder,
    parameter_dict,
    parameter_paths,
    parameter_state,
    select,
)
from gemma_encoder.model.lora import is_adapter, merge_backbone_lora
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.model.transformer import Transformer
from gemma_encoder.weights import checkpoint_folders, gemma, native, precision
from gemma_encoder.weights.gemma import GemmaCheckpoint
from gemma_encoder.weights.huggingface import SPEC_FILE, HuggingFaceCheckpoint
from gemma_encoder.weights.native import InferenceSpec
from gemma_encoder.weights.tensors import Checkpoint

# Files that identify each format, in the order in which the formats are tried. One of ours that
# lacks its description is still ours, and damaged.
CHECKPOINT_FORMATS: tuple[tuple[type[Checkpoint], tuple[str, ...]], ...] = (
    (native.NativeCheckpoint, (checkpoint_folders.DESCRIPTION, "checkpoints", "metrics.jsonl")),
    (HuggingFaceCheckpoint, ("config.json", SPEC_FILE)),
    (native.NativeCheckpoint, checkpoint_folders.PARTS),
    (GemmaCheckpoint, ("_METADATA", "_CHECKPOINT_METADATA", "default")),
)

ADVICE = "it is damaged or was only partly copied"


def open_checkpoint(path: epath.PathLike) -> Checkpoint:
    """Opens a checkpoint of any supported format; reads its metadata, but no tensors.

    Args:
        path: a folder, local or `gs://`, of the gemma package (Orbax), of Hugging Face
            (`config.json` and safetensors) or of this project (a workdir or one of its
            checkpoints); or a name in the gemma package's CheckpointPath, such as "GEMMA2_2B_PT".

    Raises:
        InputError: the path does not exist, or its format is not recognized.
    """
    folder = native.absolute(gemma.published_path(os.fspath(path)) or path)
    if not folder.exists():
        raise InputError(
            f"{path} does not exist; give a checkpoint's folder, a workdir, or a published name "
            "such as GEMMA2_2B_PT or GEMMA3_270M_IT"
        )
    for checkpoint_class, files in CHECKPOINT_FORMATS:
        if any((folder / file).exists() for file in files):
            with in_one_line(f"{folder} cannot be opened", ADVICE):
                return checkpoint_class(folder)
    raise InputError(
        f"{folder} is not a checkpoint: expected the gemma package's (_METADATA), Hugging Face's "
        "(config.json, *.safetensors) or a workdir of this project"
    )


def load_backbone(
    path: epath.PathLike,
    config: TransformerConfig | None = None,
    mesh: Mesh | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Transformer:
    """Loads a pretrained transformer.

    It is called as `backbone(tokens, segment_ids, positions, attention=…)` and returns hidden
    states [B, L, D]. Tensors are loaded one at a time, straight to their devices, so that peak
    memory exceeds the parameters by about one tensor.

    Args:
        path: see `open_checkpoint`.
        config: the expected transformer; by default the one that the checkpoint describes or that
            its shapes match.
        mesh: shards parameters by `gemma_encoder.model.sharding.RULES`; by default they are on the
            first device.
        dtype: dtype of the parameters.

    Raises:
        InputError: the checkpoint cannot be read or is of another model; every missing, unexpected
            or misshapen tensor is listed.
    """
    checkpoint = open_checkpoint(path)
    with in_one_line(f"{checkpoint.description} cannot be read", ADVICE):
        config = config or checkpoint.config()
    if checkpoint.skipped:
        logging.info("%s: skipped %s", checkpoint.description, ", ".join(checkpoint.skipped))
    checkpoint.check(config)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    shapes = parameter_dict(state)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    else:
        shardings = sharding.parameter_shardings({"backbone": shapes}, mesh)["backbone"]
    with in_one_line(f"{checkpoint.description} cannot be read", ADVICE):
        parameters = checkpoint.load(config, shapes, shardings, dtype)
    return nnx.merge(graph, parameter_state(parameters))


def save_gemma(
    backbone: Transformer, path: epath.PathLike, tokenizer: Tokenizer | None = None
) -> None:
    """Writes a checkpoint for the gemma package's `gm.ckpts.load_params` and for `load_backbone`.

    Args:
        backbone: transformer from `load_backbone`, or `encoder.backbone` of a fine-tuned encoder;
            LoRA adapters are merged.
        path: a new folder, local or `gs://`.
        tokenizer: tokenizer to store in the folder.

    Raises:
        InputError: the folder exists, or cannot be written.
    """
    parameters = parameter_dict(nnx.state(backbone))
    if backbone.lora.rank:
        parameters = merge_backbone_lora(parameters, backbone.lora)
    model = tokenizer.model if tokenizer else None
    gemma.save(parameters, backbone.config, native.absolute(path), model)


def load_pretrained(checkpoint: Checkpoint, encoder: EncoderConfig, abstract: dict) -> dict:
    """Loads the pretrained part of an encoder's parameters, in float32.

    These are the backbone, and the projection of a sentence-transformers folder if
    `encoder.pooling.projection` has its widths.

    Args:
        checkpoint: checkpoint returned by `open_checkpoint`.
        encoder: the encoder to initialize.
        abstract: nested dict of its parameters' shapes and shardings.

    Returns:
        A nested dict with these parameters only.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    backbone_shapes, backbone_shardings = (
        select(tree["backbone"], lambda path: not is_adapter(path))
        for tree in (abstract, shardings)
    )
    with in_one_line(f"{checkpoint.description} cannot be read", ADVICE):
        backbone = checkpoint.load(
            encoder.transformer, backbone_shapes, backbone_shardings, jnp.float32
        )
    loaded = {"backbone": backbone}
    modules = checkpoint.modules if isinstance(checkpoint, HuggingFaceCheckpoint) else None
    projection = encoder.pooling.projection
    if modules and projection and projection == modules.pooling.projection:
        kernels = jax.tree.map(
            jax.device_put, modules.projection_kernels(), shardings["pooler"]["projection"]
        )
        loaded["pooler"] = {"projection": kernels}
    logging.info("initialized %s from %s", " and ".join(loaded), checkpoint.description)
    return loaded


def load_warm(
    checkpoint: Checkpoint, encoder: EncoderConfig, abstract: dict, tasks: Sequence[Task] = ()
) -> dict:
    """Loads the parameters of a fine-tuned encoder that a new encoder can start from.

    These are the backbone, the pooler and the heads of the same name, where shapes agree and the
    outputs of a head have the same meaning.

    Args:
        checkpoint: one of our own, as returned by `open_checkpoint`.
        encoder: the encoder to initialize.
        abstract: nested dict of its parameters' shapes and shardings.
        tasks: the tasks that the encoder is trained on.

    Returns:
        A nested dict with the parameters that both encoders share, on the mesh; the caller
        initializes the others at random.

    Raises:
        InputError: the checkpoint is not one of ours, or its transformer differs.
    """
    if not isinstance(checkpoint, native.NativeCheckpoint):
        raise InputError(
            f"model.warm_start names {checkpoint.description}; it takes a workdir of this project. "
            "For others there is model.pretrained"
        )
    checkpoint.check(encoder.transformer)
    stored = parameter_paths(abstract_encoder(checkpoint.spec.encoder).shapes)
    parameters = parameter_paths(abstract)
    other_heads = _heads_of_other_meaning(checkpoint, tasks)
    common = {
        path: leaf
        for path, leaf in parameters.items()
        if path in stored
        and stored[path].shape == leaf.shape
        and "/".join(path.split("/")[:2]) not in other_heads
    }
    new = sorted({"/".join(path.split("/")[:2]) for path in parameters if path not in common})
    logging.warning(
        "the encoder starts from %s; initialized at random: %s",
        checkpoint.description,
        ", ".join(new) or "nothing",
    )
    return native.load_part(checkpoint.folder, common)


def _heads_of_other_meaning(checkpoint: native.NativeCheckpoint, tasks: Sequence[Task]) -> set[str]:
    """Returns the paths of the heads whose outputs mean something else to the tasks; logs them."""
    heads = set()
    for task in tasks:
        for stored in checkpoint.spec.tasks:
            differences = task.output_differences(stored) if stored.head == task.head else ()
            for field in differences:
                logging.warning(
                    "the head %s of %s is not used: its %s is %s, for task %r it is %s",
                    task.head,
                    checkpoint.description,
                    field,
                    getattr(stored, field),
                    task.name,
                    getattr(task, field),
                )
                heads.add(f"heads/{task.head}")
    return heads


def load_encoder(
    path: epath.PathLike,
    mesh: Mesh,
    **options: str | None,
) -> tuple[InferenceSpec, dict]:
    """Loads a whole encoder for inference.

    Args:
        path: one of our checkpoints, one of our exports, or a sentence-transformers folder such as
            EmbeddingGemma.
        mesh: the mesh over which parameters are sharded.
        options: quantization, weights and compute_dtype, see `precision.with_precision`.

    Returns:
        The inference spec, with the precision of the parameters, and these as a nested dict.

    Raises:
        InputError: the checkpoint cannot be read, is a transformer without pooler and head, or does
            not have the precision.
    """
    checkpoint = open_checkpoint(path)
    if isinstance(checkpoint, native.NativeCheckpoint):
        spec = checkpoint.spec
        target = precision.with_precision(spec.encoder, mesh, **options)
        parameters = precision.load_in_precision(checkpoint.folder, spec.encoder, target, mesh)
        return dataclasses.replace(spec, encoder=target), parameters
    if isinstance(checkpoint, HuggingFaceCheckpoint) and checkpoint.modules is not None:
        spec = checkpoint.inference_spec()
        target = precision.with_precision(spec.encoder, mesh, **options)
        parameters = _load_sentence_encoder(checkpoint, spec, mesh)
        if target.weights != spec.encoder.weights:
            parameters = precision.convert_parameters(parameters, target, mesh)
        return dataclasses.replace(spec, encoder=target), parameters
    raise InputError(
        f"{checkpoint.description} is a transformer without pooler or head; fine-tune it first, or "
        "use load_backbone"
    )


def _load_sentence_encoder(
    checkpoint: HuggingFaceCheckpoint, spec: InferenceSpec, mesh: Mesh
) -> dict:
    """Loads the encoder of a sentence-transformers folder, in float32."""
    shapes = abstract_encoder(spec.encoder).shapes
    shardings = sharding.parameter_shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda leaf, leaf_sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf_sharding
        ),
        shapes,
        shardings,
    )
    parameters = load_pretrained(checkpoint, spec.encoder, abstract)
    parameters["heads"] = {
        name: jax.device_put(checkpoint.modules.head_parameters(), sharding.replicated(mesh))
        for name in shapes.get("heads", {})
    }
    loaded = parameter_paths(parameters)
    expected = parameter_paths(shapes)
    if loaded.keys() != expected.keys() or any(
        loaded[path].shape != leaf.shape for path, leaf in expected.items()
    ):
        raise InputError(
            f"{checkpoint.description}: the modules after the transformer are not those that its "
            f"{SPEC_FILE} describes; export it again"
        )
    leaves = [loaded[path] for path in expected]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """Loads the tokenizer of the checkpoint at `path`, which is as in `open_checkpoint`.

    Raises:
        InputError: it cannot be read, or has more pieces than the transformer has embeddings.
    """
    checkpoint = open_checkpoint(path)
    with in_one_line(f"{checkpoint.description} cannot be read", ADVICE):
        config = checkpoint.config()
    return checkpoint_tokenizer(checkpoint, config)


def checkpoint_tokenizer(checkpoint: Checkpoint, config: TransformerConfig) -> Tokenizer:
    """Loads the tokenizer of an opened checkpoint.

    It is the `tokenizer.model` in its folder, else the one published for its family.

    Args:
        checkpoint: checkpoint returned by `open_checkpoint`.
        config: config of the checkpoint's transformer.

    Raises:
        InputError: it cannot be read, or has more pieces than the transformer has embeddings.
    """
    if isinstance(checkpoint, native.NativeCheckpoint):
        tokenizer = checkpoint.spec.tokenizer
    else:
        stored = checkpoint.folder / "tokenizer.model"
        tokenizer = Tokenizer.load(os.fspath(stored) if stored.exists() else family(config))
    check_vocabulary(tokenizer, config)
    return tokenizer


def family(config: TransformerConfig) -> str:
    """Returns the name of a transformer's published tokenizer.

    It is "gemma3" for transformers that normalize queries and keys, else "gemma2".
    """
    return "gemma3" if config.use_qk_norm else "gemma2"


def size_name(config: TransformerConfig) -> str | None:
    """Returns the name of the published size, None for other sizes; see transformer_differences."""
    for name, published in GEMMA_CONFIGS.items():
        if not transformer_differences(config, published):
            return name
    return None


def transformer_differences(config: TransformerConfig, expected: TransformerConfig) -> list[str]:
    """Returns a message for every field in which two transformers differ.

    Fields that the checkpoint formats treat differently are not compared: the number of embeddings,
    which may be padded, the bidirectional reach, and the soft cap of a language model head.
    """
    actual_values = config.to_dict()
    expected_values = expected.to_dict()
    return [
        f"{name} is {value}, expected {expected_values[name]}"
        for name, value in actual_values.items()
        if name not in ("vocab_size", "bidirectional_reach", "final_soft_cap")
        and value != expected_values[name]
    ]


def check_vocabulary(tokenizer: Tokenizer, config: TransformerConfig) -> None:
    """Checks that every piece of the tokenizer has an embedding; logs unused embeddings.

    Raises:
        InputError: the tokenizer has more pieces than the transformer has embeddings.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} pieces, more than the "
            f"model's {config.vocab_size} embeddings; use the model's own tokenizer"
        )
    if tokenizer.vocab_size < config.vocab_size:
        logging.info(
            "tokenizer %r has %d pieces; %d embeddings of the model are unused",
            tokenizer.name,
            tokenizer.vocab_size,
            config.vocab_size - tokenizer.vocab_size,
        )
