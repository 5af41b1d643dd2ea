"""From whatever holds a Gemma to a transformer in memory: `load_backbone`, and the tokenizer that goes with it."""

import os

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from gemma_encoder.inputs.errors import InputError
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
from gemma_encoder.weights import gemma, native
from gemma_encoder.weights.gemma import GemmaCheckpoint
from gemma_encoder.weights.huggingface import SIDECAR, HuggingFaceCheckpoint
from gemma_encoder.weights.native import InferenceSpec
from gemma_encoder.weights.tensors import Checkpoint

# What a folder of each format holds, in the order in which formats are looked for.
FORMATS: dict[type[Checkpoint], tuple[str, ...]] = {
    native.NativeCheckpoint: ("inference/inference.json", "checkpoints"),
    HuggingFaceCheckpoint: ("config.json",),
    GemmaCheckpoint: ("_METADATA", "_CHECKPOINT_METADATA", "default"),
}


def open_checkpoint(path: epath.PathLike) -> Checkpoint:
    """The checkpoint at `path`, whatever it is; only what describes it is read.

    Args:
        path: a folder, local or `gs://`, of the gemma package (Orbax), of Hugging Face (`config.json` and safetensors) or of
            this project (a workdir or one of its checkpoints); or a name in the gemma package's CheckpointPath, such as
            "GEMMA2_2B_PT".

    Raises:
        InputError: there is nothing, or nothing that is recognised.
    """
    folder = native.absolute(gemma.published_path(os.fspath(path)) or path)
    if not folder.exists():
        raise InputError(
            f"{path} does not exist; give a checkpoint's folder, a workdir, or a published name such as GEMMA2_2B_PT or GEMMA3_270M_IT"
        )
    for kind, marks in FORMATS.items():
        if any((folder / mark).exists() for mark in marks):
            return kind(folder)
    raise InputError(
        f"{folder} is no checkpoint: expected the gemma package's (_METADATA), Hugging Face's (config.json, *.safetensors) or a workdir of this project"
    )


def load_backbone(
    path: epath.PathLike,
    config: TransformerConfig | None = None,
    mesh: Mesh | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Transformer:
    """A pretrained transformer, to be called as `backbone(tokens, segment_ids, positions, attention=…) -> hidden [B, L, D]`.

    Tensors go from their file to their place one at a time, so what is needed beside the parameters is the memory of one tensor.

    Args:
        path: as `open_checkpoint` takes it.
        config: what it must be; by default what the checkpoint says, or what its shapes say.
        mesh: parameters are spread over it by `gemma_encoder.model.sharding.RULES`; by default they go to the first device.
        dtype: of the parameters.

    Raises:
        InputError: nothing that can be read, or another model; every tensor that is missing, surplus or misshapen is listed.
    """
    checkpoint = open_checkpoint(path)
    config = config or checkpoint.config()
    if checkpoint.skipped:
        logging.info("%s: not read: %s", checkpoint.description, ", ".join(checkpoint.skipped))
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    shapes = parameter_dict(state)
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: place, shapes)
    else:
        places = sharding.parameter_shardings({"backbone": shapes}, mesh)["backbone"]
    return nnx.merge(graph, parameter_state(checkpoint.load(config, shapes, places, dtype)))


def save_gemma(backbone: Transformer, path: epath.PathLike) -> None:
    """Writes a checkpoint that the gemma package's `gm.ckpts.load_params` reads, and that `load_backbone` reads too.

    Args:
        backbone: as `load_backbone` gives it; or `encoder.backbone` of a fine-tuned encoder.
        path: a new folder, local or `gs://`.
    """
    parameters = parameter_dict(nnx.state(backbone))
    parameters = (
        merge_backbone_lora(parameters, backbone.lora) if backbone.lora.rank else parameters
    )
    gemma.save(parameters, backbone.config, native.absolute(path))


def load_pretrained(checkpoint: Checkpoint, encoder: EncoderConfig, abstract: dict) -> dict:
    """The part of an encoder's parameters that a checkpoint holds, in float32.

    That is the backbone, and the projection of a sentence-transformers folder where
    `encoder.pooling.projection` has its widths.

    Args:
        checkpoint: as `open_checkpoint` gives it.
        encoder: the encoder.
        abstract: nested dict of its parameters' shapes and shardings.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    own = [
        select(tree["backbone"], lambda path: not is_adapter(path))
        for tree in (abstract, shardings)
    ]
    loaded = {"backbone": checkpoint.load(encoder.transformer, *own, jnp.float32)}
    if (
        isinstance(checkpoint, HuggingFaceCheckpoint)
        and (modules := checkpoint.modules)
        and encoder.pooling.projection == modules.pooling.projection != ()
    ):
        loaded["pooler"] = {
            "projection": jax.tree.map(
                jax.device_put, modules.projection_kernels(), shardings["pooler"]["projection"]
            )
        }
    logging.info("%s initialised from %s", " and ".join(loaded), checkpoint.description)
    return loaded


def load_warm(checkpoint: Checkpoint, encoder: EncoderConfig, abstract: dict) -> dict:
    """The part of a fine-tuned encoder that another one can start from.

    That is the backbone, the pooler and the heads of the same name, where shapes agree.

    Args:
        checkpoint: one of this project's own, as `open_checkpoint` gives it.
        encoder: the encoder to fill.
        abstract: shapes and shardings of its parameters.

    Returns:
        A part of the nested dict of parameters, on the mesh; the rest is for random initial values.

    Raises:
        InputError: the checkpoint is not one of ours, or its transformer is another.
    """
    if not isinstance(checkpoint, native.NativeCheckpoint):
        raise InputError(
            f"model.warm_start names {checkpoint.description}; it takes a workdir of this project. "
            "For others there is model.pretrained"
        )
    checkpoint.check(encoder.transformer)
    stored = parameter_paths(abstract_encoder(checkpoint.spec.encoder).shapes)
    wanted = parameter_paths(abstract)
    common = [
        name for name, leaf in wanted.items() if name in stored and stored[name].shape == leaf.shape
    ]
    fresh = sorted({"/".join(name.split("/")[:2]) for name in wanted if name not in common})
    logging.warning(
        "%s starts from %s; new are %s",
        "the encoder",
        checkpoint.description,
        ", ".join(fresh) or "no parameters",
    )
    return native.load_part(checkpoint.folder, {name: wanted[name] for name in common})


def load_encoder(path: epath.PathLike, mesh: Mesh) -> tuple[InferenceSpec, dict]:
    """A whole encoder: one of our checkpoints, an export of ours, or a sentence-transformers folder such as EmbeddingGemma.

    Args:
        path: as `open_checkpoint` takes it; a transformer without a pooler is refused.
        mesh: what the parameters are spread over.

    Returns:
        Everything but the parameters, and the parameters as a nested dict.
    """
    checkpoint = open_checkpoint(path)
    if isinstance(checkpoint, native.NativeCheckpoint):
        places = sharding.parameter_shardings(
            abstract_encoder(checkpoint.spec.encoder).shapes, mesh
        )
        return checkpoint.spec, native.load_parameters(
            checkpoint.folder, checkpoint.spec.encoder, places
        )
    if not isinstance(checkpoint, HuggingFaceCheckpoint) or checkpoint.modules is None:
        raise InputError(
            f"{checkpoint.description} holds a transformer without pooler or head; fine-tune it first, or use load_backbone"
        )
    spec = checkpoint.inference_spec()
    shapes = abstract_encoder(spec.encoder).shapes
    places = sharding.parameter_shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
    parameters = load_pretrained(checkpoint, spec.encoder, abstract)
    parameters["heads"] = {
        name: jax.device_put(checkpoint.modules.head_parameters(), sharding.replicated(mesh))
        for name in spec.encoder.heads
    }
    found, wanted = parameter_paths(parameters), parameter_paths(shapes)
    if {name: leaf.shape for name, leaf in found.items()} != {
        name: leaf.shape for name, leaf in wanted.items()
    }:
        raise InputError(
            f"{checkpoint.description}: the modules after the transformer are not those that its {SIDECAR} describes"
        )
    return spec, jax.tree.unflatten(jax.tree.structure(shapes), [found[name] for name in wanted])


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """The tokenizer that goes with the checkpoint at `path`, which `open_checkpoint` describes.

    Raises:
        InputError: it cannot be read, or it has more pieces than the transformer has embeddings.
    """
    checkpoint = open_checkpoint(path)
    return checkpoint_tokenizer(checkpoint, checkpoint.config())


def checkpoint_tokenizer(checkpoint: Checkpoint, config: TransformerConfig) -> Tokenizer:
    """The tokenizer that goes with an opened checkpoint.

    That is the `tokenizer.model` in its folder, else the one published for its family.

    Args:
        checkpoint: as `open_checkpoint` gives it.
        config: its transformer.

    Raises:
        InputError: it cannot be read, or it has more pieces than the transformer has embeddings.
    """
    if isinstance(checkpoint, native.NativeCheckpoint):
        tokenizer = checkpoint.spec.tokenizer
    else:
        beside = checkpoint.folder / "tokenizer.model"
        tokenizer = Tokenizer.load(os.fspath(beside) if beside.exists() else family(config))
    check_vocabulary(tokenizer, config)
    return tokenizer


def family(config: TransformerConfig) -> str:
    """The published tokenizer of a transformer: "gemma3" where queries and keys are normed, else "gemma2"."""
    return "gemma3" if config.use_qk_norm else "gemma2"


def size_name(config: TransformerConfig) -> str | None:
    """The published size that a transformer is, whatever its vocabulary's padding and its reach; None for any other."""
    return next(
        (
            name
            for name, known in GEMMA_CONFIGS.items()
            if not transformer_differences(config, known)
        ),
        None,
    )


def transformer_differences(config: TransformerConfig, known: TransformerConfig) -> list[str]:
    """The fields in which two transformers differ, except the number of embeddings, the reach of the switched mask and the cap of a language head."""
    ours, theirs = config.to_dict(), known.to_dict()
    return [
        f"{name} is {value}, expected {theirs[name]}"
        for name, value in ours.items()
        if name not in ("vocab_size", "bidirectional_reach", "final_soft_cap")
        and value != theirs[name]
    ]


def check_vocabulary(tokenizer: Tokenizer, config: TransformerConfig) -> None:
    """Raises InputError where the tokenizer has more pieces than there are embeddings; says so where it has fewer."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} pieces, more than the model's {config.vocab_size} embeddings"
        )
    if tokenizer.vocab_size < config.vocab_size:
        logging.info(
            "tokenizer %r has %d pieces; the model's other %d embeddings stay unused",
            tokenizer.name,
            tokenizer.vocab_size,
            config.vocab_size - tokenizer.vocab_size,
        )
