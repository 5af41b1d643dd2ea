"""Exports a fine-tuned encoder to a folder for transformers and sentence-transformers.

config.json, model*.safetensors       the transformer, with transformers' fields for the mask switch
tokenizer.model, tokenizer.json, …    the tokenizer, with bos and eos around every text
modules.json, 1_Pooling, 2_Dense, …   sentence-transformers' modules: pooling, projection, and the
                                      head, which outputs "scores", of a regression in the task's
                                      units; unscaled.safetensors has the layer before scaling; of a
                                      sparse retriever see `exported_sparse`
gemma_encoder.json                    the inference spec, as in our own checkpoints
README.md                             the model card
digests.json                          digests of these files, by which damage is noticed
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import EncoderConfig, LoraConfig, TransformerConfig
from gemma_encoder.model.lora import merge_backbone_lora
from gemma_encoder.weights import card, doors, exported_sparse, huggingface, tensors
from gemma_encoder.weights.exported_modules import json_bytes, modules_of, write_modules
from gemma_encoder.weights.huggingface import SPEC_FILE
from gemma_encoder.weights.huggingface_config import LAYER_TYPES
from gemma_encoder.weights.native import InferenceSpec, absolute
from gemma_encoder.weights.new_folders import check_is_new, new_folder
from gemma_encoder.weights.sentence_prompts import similarity_name, task_prompts
from gemma_encoder.weights.tokenizer_files import huggingface_files

MAX_FILE = 4 * 2**30  # bytes of tensors per file, unless a single tensor is larger
_LAYER_TYPES = {kind: layer_type for layer_type, kind in LAYER_TYPES.items()}


def export(
    spec: InferenceSpec, parameters: dict, folder: epath.PathLike, heads: bool = True
) -> epath.Path:
    """Writes the folder and returns its path; parameters are stored as float32, unchanged.

    Args:
        spec: the inference spec.
        parameters: nested dict of the encoder's parameters.
        folder: a folder that does not exist or is empty.
        heads: write the head too, as modules, so that
            `SentenceTransformer(folder)(features)["scores"]` is its output. False omits heads, so
            that an encoder with several can be exported for its embeddings.

    Raises:
        InputError: the folder is not empty, or the format cannot represent the model.
    """
    doors.check_float32(spec.encoder, "the predictor")
    folder = absolute(folder)
    check_is_new(folder, "the export", may_be_empty=True)
    prompts = {**spec.prompts, **task_prompts(spec.tasks)}
    if not heads:
        similarity = similarity_name(spec)
        spec = dataclasses.replace(_without_heads(spec), prompts=prompts, similarity=similarity)
    if spec.encoder.lora.rank:
        spec, parameters = _without_adapters(spec, parameters)
    encoder = spec.encoder
    # Everything that can fail runs before the first write.
    config = transformer_json(encoder)
    if exported_sparse.is_sparse(encoder):
        config = exported_sparse.sparse_config(config)
        modules = exported_sparse.sparse_modules(encoder)
    else:
        modules = list(modules_of(encoder, parameters, spec.tasks))
    files = huggingface_files(spec.tokenizer, spec.max_length, spec.padding)
    files |= _descriptions(spec, config, prompts)
    with new_folder(folder) as unfinished:
        _write_tensors(unfinished, parameters["backbone"], encoder)
        for file_name, content in files.items():
            (unfinished / file_name).write_bytes(content)
        write_modules(unfinished, modules)
    return folder


def _without_heads(spec: InferenceSpec) -> InferenceSpec:
    encoder = dataclasses.replace(spec.encoder, heads={})
    return dataclasses.replace(spec, encoder=encoder, tasks=())


def _without_adapters(spec: InferenceSpec, parameters: dict) -> tuple[InferenceSpec, dict]:
    """Merges the LoRA adapters, which other libraries do not read from this format."""
    backbone = merge_backbone_lora(parameters["backbone"], spec.encoder.lora)
    encoder = dataclasses.replace(spec.encoder, lora=LoraConfig())
    return dataclasses.replace(spec, encoder=encoder), {**parameters, "backbone": backbone}


def _descriptions(
    spec: InferenceSpec, config: dict[str, Any], prompts: dict[str, str]
) -> dict[str, bytes]:
    """Returns the files that describe the model, by name."""
    transformer = {"max_seq_length": spec.max_length, "do_lower_case": False}
    model = {
        "prompts": prompts,
        "default_prompt_name": spec.default_prompt or None,
        "similarity_fn_name": similarity_name(spec),
        "model_type": "SentenceTransformer",
    }
    if exported_sparse.is_sparse(spec.encoder):
        of_transformer, of_model = exported_sparse.sparse_settings(spec.encoder)
        transformer |= of_transformer
        model |= of_model
    return {
        "config.json": json_bytes(config),
        SPEC_FILE: json_bytes(spec.description()),
        "README.md": card.markdown(spec).encode(),
        "sentence_bert_config.json": json_bytes(transformer),
        "config_sentence_transformers.json": json_bytes(model),
    }


def transformer_json(encoder: EncoderConfig) -> dict[str, Any]:
    """Returns the `config.json` of a transformers model that computes the same hidden states.

    Raises:
        InputError: there is no such model.
    """
    config = encoder.transformer
    gemma3 = config.use_qk_norm
    _check_transformer(config)
    values: dict[str, Any] = {
        "architectures": ["Gemma3TextModel" if gemma3 else "Gemma2Model"],
        "model_type": "gemma3_text" if gemma3 else "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.final_soft_cap,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": "float32",
        "torch_dtype": "float32",  # the field's name before transformers 5
        "head_dim": config.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "layer_types": [_LAYER_TYPES[kind] for kind in config.layer_kinds],
        "max_position_embeddings": 131_072 if gemma3 else 8192,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "query_pre_attn_scalar": _round_if_close(config.query_scale**-2),
        "rms_norm_eps": 1e-6,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": True,
        "use_cache": encoder.attention == "causal",
        "vocab_size": config.vocab_size,
        "rope_parameters": _rope_parameters(config),
    }
    if encoder.attention == "bidirectional":
        values |= _bidirectional_fields(config)
    return values


def _check_transformer(config: TransformerConfig) -> None:
    """Raises InputError for dimensions and rotary bases that transformers does not support."""
    if config.embed_dim % config.num_heads:
        raise InputError(
            "cannot be exported: transformers needs a width that is a multiple of the number of "
            f"query heads, got width {config.embed_dim} and {config.num_heads} heads"
        )
    if not config.use_qk_norm and (
        config.global_rope_scale != 1 or config.global_rope_base != config.local_rope_base
    ):
        raise InputError(
            "cannot be exported: transformers' Gemma 2, which is the model without QK-norm, has "
            "one rotary base and no scaling of positions"
        )


def _rope_parameters(config: TransformerConfig) -> dict[str, Any]:
    """Returns rotary settings: one set for Gemma 2, one per type of layer for Gemma 3."""
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": config.global_rope_base}
    if config.global_rope_scale != 1:
        full |= {"rope_type": "linear", "factor": config.global_rope_scale}
    if not config.use_qk_norm:
        return full
    local = {"rope_type": "default", "rope_theta": config.local_rope_base}
    return {"sliding_attention": local, "full_attention": full}


def _round_if_close(value: float) -> float | int:
    """Returns an integer if the value differs from it by rounding errors only.

    The config stores query_pre_attn_scalar^-½, which loses the exact integer.
    """
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _bidirectional_fields(config: TransformerConfig) -> dict[str, Any]:
    """Returns the fields that make transformers bidirectional, with a window of the same reach.

    Gemma 3 with `use_bidirectional_attention` reaches window // 2 tokens to each side. Gemma 2 has
    that flag too but stays causal; with `is_causal` false it reaches the whole window to each side.
    """
    if "local" not in config.layer_kinds:
        return {"use_bidirectional_attention": True} if config.use_qk_norm else {"is_causal": False}
    left, right = config.reach("local", "bidirectional")
    if left != right:
        raise InputError(
            f"cannot be exported: local layers reach {left} tokens to the left and {right} to the "
            "right; transformers has one window for both sides"
        )
    if config.use_qk_norm:
        return {"use_bidirectional_attention": True, "sliding_window": max(2 * left, 1)}
    if not left:
        raise InputError(
            "cannot be exported: transformers' Gemma 2 has no local layer that attends to its own "
            "token only"
        )
    return {"is_causal": False, "sliding_window": left}


def _write_tensors(folder: epath.Path, backbone: dict, encoder: EncoderConfig) -> None:
    """Writes the transformer in files of at most `MAX_FILE`, with an index if there are several."""
    model_type = "gemma3_text" if encoder.transformer.use_qk_norm else "gemma2"
    if exported_sparse.is_sparse(encoder):
        named = exported_sparse.sparse_tensors(backbone, encoder, model_type)
    else:
        named = tensors.dump(backbone, encoder.transformer, huggingface.tensor_table(model_type))
    names: list[list[str]] = []  # by part
    total_bytes = 0
    for part in _split_by_size(named):
        # The final file names contain the number of files, which is not known yet.
        file = folder / f"part-{len(names)}"
        file.write_bytes(safetensors.numpy.save(part, {"format": "pt"}))
        names.append(list(part))
        total_bytes += sum(value.nbytes for value in part.values())
        del part  # free it before the next one is assembled
    if len(names) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, part_names in enumerate(names):
        file_name = f"model-{index + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"part-{index}").rename(folder / file_name)
        weight_map |= dict.fromkeys(part_names, file_name)
    (folder / "model.safetensors.index.json").write_bytes(
        json_bytes({"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    )


def _split_by_size(
    named_tensors: Iterator[tuple[str, np.ndarray]],
) -> Iterator[Mapping[str, np.ndarray]]:
    """Groups tensors, in order, into parts of at most `MAX_FILE` bytes or one larger tensor."""
    part: dict[str, np.ndarray] = {}
    size = 0
    for name, value in named_tensors:
        if part and size + value.nbytes > MAX_FILE:
            yield part
            part = {}
            size = 0
        part[name] = value
        size += value.nbytes
    yield part
