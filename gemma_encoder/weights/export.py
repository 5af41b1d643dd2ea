"""Out again: a fine-tuned encoder as a folder that Hugging Face transformers and sentence-transformers load.

config.json, model*.safetensors               the transformer, with the mask switch as transformers spells it
tokenizer.model, tokenizer.json, …            bos and eos around every text, as here
modules.json, 1_Pooling, 2_Dense, …           sentence-transformers: pooling, projection, and the head, which writes "scores"
gemma_encoder.json                            what our own checkpoints say of themselves
README.md                                     the model card
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.model.config import EncoderConfig, HeadConfig, LoraConfig, TransformerConfig
from gemma_encoder.model.lora import merge_backbone_lora
from gemma_encoder.weights import card, huggingface, tensors
from gemma_encoder.weights.native import InferenceSpec, absolute
from gemma_encoder.weights.sentence_modules import POOLING
from gemma_encoder.weights.tokenizer_files import huggingface_files

MAX_FILE = 4 * 2**30  # bytes of tensors in one file, unless a single one is larger
KINDS = {ours: theirs for theirs, ours in huggingface.KINDS.items()}
_MODULES = "sentence_transformers.models"

Module = tuple[str, dict[str, Any], dict[str, np.ndarray]]  # kind, config and tensors


def export(
    spec: InferenceSpec, parameters: dict, folder: epath.PathLike, heads: bool = True
) -> epath.Path:
    """Writes the folder; parameters keep their bits (float32).

    Args:
        bundle: everything but the parameters.
        parameters: nested dict of the encoder's.
        folder: that does not exist yet, or is empty.
        heads: write the head too, as modules whose result is
            `SentenceTransformer(folder)(features)["scores"]`; False leaves heads out, so that an
            encoder with several can be exported for its embeddings.

    Raises:
        InputError: the format cannot express the model, and what of it.
    """
    folder = absolute(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} exists and is not empty; name a new folder for the export")
    prompts = _prompts(spec.tasks)
    if not heads:
        spec = _without_heads(spec)
    if spec.encoder.lora.rank:
        spec, parameters = _without_adapters(spec, parameters)
    encoder = spec.encoder
    # All that can be refused comes before the first write.
    config = transformer_json(encoder)
    modules = list(_modules(encoder, parameters))
    files = huggingface_files(spec.tokenizer, spec.max_length, spec.padding)
    files |= _descriptions(spec, config, prompts)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder, parameters["backbone"], encoder.transformer)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    _write_modules(folder, modules)
    return folder


def _without_heads(spec: InferenceSpec) -> InferenceSpec:
    encoder = dataclasses.replace(spec.encoder, heads={})
    return dataclasses.replace(spec, encoder=encoder, tasks=())


def _without_adapters(spec: InferenceSpec, parameters: dict) -> tuple[InferenceSpec, dict]:
    """The encoder with its LoRA adapters merged: other libraries get plain matrices."""
    backbone = merge_backbone_lora(parameters["backbone"], spec.encoder.lora)
    encoder = dataclasses.replace(spec.encoder, lora=LoraConfig())
    return dataclasses.replace(spec, encoder=encoder), {**parameters, "backbone": backbone}


def _descriptions(
    spec: InferenceSpec, config: dict[str, Any], prompts: dict[str, str]
) -> dict[str, bytes]:
    """The files that describe the model, by name."""
    sentence = {"max_seq_length": spec.max_length, "do_lower_case": False}
    sentence_transformers = {
        "prompts": prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
        "model_type": "SentenceTransformer",
    }
    return {
        "config.json": _json(config),
        huggingface.SIDECAR: _json(spec.description()),
        "README.md": card.markdown(spec).encode(),
        "sentence_bert_config.json": _json(sentence),
        "config_sentence_transformers.json": _json(sentence_transformers),
    }


def _write_modules(folder: epath.Path, modules: Sequence[Module]) -> None:
    """The modules after the transformer, a folder each, and the list of all modules."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": f"{_MODULES}.Transformer"}]
    for index, (kind, settings, weights) in enumerate(modules, 1):
        name = f"{index}_{kind}"
        listed.append(
            {"idx": index, "name": str(index), "path": name, "type": f"{_MODULES}.{kind}"}
        )
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes(_json(settings))
        if weights:
            (folder / name / "model.safetensors").write_bytes(safetensors.numpy.save(weights))
    (folder / "modules.json").write_bytes(_json(listed))


def _prompts(tasks: Sequence[Task]) -> dict[str, str]:
    """What stands before the text in the templates of tasks of one text, by task, as sentence-transformers puts it there."""
    return {
        task.name: prefix
        for task in tasks
        for prefix, rest in [task.template.text.split("{", 1)]
        if prefix and rest == f"{task.template.fields[0]}}}"
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def transformer_json(encoder: EncoderConfig) -> dict[str, Any]:
    """The `config.json` under which transformers computes what this encoder's transformer computes.

    Raises:
        InputError: no model of transformers does.
    """
    config, gemma3 = encoder.transformer, encoder.transformer.use_qk_norm
    if config.embed_dim % config.num_heads:
        raise InputError(
            f"cannot be exported: transformers wants the width {config.embed_dim} to be a multiple of the {config.num_heads} query heads"
        )
    if not gemma3 and (
        config.global_rope_scale != 1 or config.global_rope_base != config.local_rope_base
    ):
        raise InputError(
            "cannot be exported: without QK-norm, transformers' Gemma 2 has one rotary base and no scaling of positions"
        )
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
        "torch_dtype": "float32",  # the name before transformers 5
        "head_dim": config.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "layer_types": [KINDS[kind] for kind in config.layer_kinds],
        "max_position_embeddings": 131_072 if gemma3 else 8192,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "query_pre_attn_scalar": _whole(config.query_scale**-2),
        "rms_norm_eps": 1e-6,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": True,
        "use_cache": encoder.attention == "causal",
        "vocab_size": config.vocab_size,
    }
    local, full = (
        {"rope_type": "default", "rope_theta": base}
        for base in (config.local_rope_base, config.global_rope_base)
    )
    if config.global_rope_scale != 1:
        full |= {"rope_type": "linear", "factor": config.global_rope_scale}
    values["rope_parameters"] = (
        {"sliding_attention": local, "full_attention": full} if gemma3 else full
    )
    if encoder.attention == "bidirectional":
        values |= _switched(config)
    return values


def _whole(value: float) -> float | int:
    """The scalar whose −½th power is the query scale: a whole number where float arithmetic missed it by a hair."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _switched(config: TransformerConfig) -> dict[str, Any]:
    """The fields that make transformers bidirectional, with the window that gives the same reach there.

    Gemma 3 with `use_bidirectional_attention` reaches window // 2 to each side; Gemma 2 knows that flag but stays causal under it:
    with `is_causal` false it reaches the whole window to each side.
    """
    if "local" not in config.layer_kinds:
        return {"use_bidirectional_attention": True} if config.use_qk_norm else {"is_causal": False}
    left, right = config.reach("local", "bidirectional")
    if left != right:
        raise InputError(
            f"cannot be exported: local layers reach {left} tokens to the left and {right} to the right; transformers knows one window for both"
        )
    if config.use_qk_norm:
        return {"use_bidirectional_attention": True, "sliding_window": max(2 * left, 1)}
    if not left:
        raise InputError(
            "cannot be exported: transformers' Gemma 2 has no local layer that sees its own token only"
        )
    return {"is_causal": False, "sliding_window": left}


def _modules(encoder: EncoderConfig, parameters: dict) -> Iterator[Module]:
    """The modules after the transformer: pooling, projection, normalization, head."""
    pooling, width = encoder.pooling, encoder.transformer.embed_dim
    if pooling.name not in POOLING:
        raise InputError(
            f"cannot be exported: sentence-transformers has no pooler like {pooling.name!r}; it has {', '.join(POOLING)}"
        )
    if pooling.name != "mean" and pooling.k != 1:
        raise InputError(
            f"cannot be exported: sentence-transformers' {pooling.name} pooling takes one state, not {pooling.k}"
        )
    if len(encoder.heads) > 1:
        raise InputError(
            f"cannot be exported: the folder has room for one head, there are {len(encoder.heads)} ({', '.join(encoder.heads)}); heads=False leaves them out"
        )
    for name, head in encoder.heads.items():
        if head.kind != "mlp":
            raise InputError(
                f"cannot be exported: an embedding model has no place for the head {name!r} of "
                f"kind {head.kind}; heads=False leaves it out"
            )
    flags = {flag: ours == pooling.name for ours, (_, flag) in POOLING.items()}
    yield "Pooling", {"word_embedding_dimension": width, **flags, "include_prompt": True}, {}
    for number, wide in enumerate(pooling.projection):
        yield (
            "Dense",
            _dense(width, wide, bias=False),
            {"linear.weight": _transposed(parameters["pooler"]["projection"][str(number)])},
        )
        width = wide
    if pooling.normalize:
        yield "Normalize", {}, {}
    for name, head in encoder.heads.items():
        yield from _head(parameters["heads"][name], width, head)


def _head(parameters: dict, width: int, head: HeadConfig) -> Iterator[Module]:
    hidden = [parameters["hidden"][str(layer)] for layer in range(len(head.hidden_dims))]
    layers = [*hidden, parameters["out"]]
    source = "sentence_embedding"
    for number, layer in enumerate(layers):
        last = number == len(layers) - 1
        target = "scores" if last else f"head_{number}"
        settings = _dense(
            width,
            layer["bias"].shape[0],
            bias=True,
            activation="linear.Identity" if last else "activation.GELU",
        )
        settings |= {"module_input_name": source, "module_output_name": target}
        yield (
            "Dense",
            settings,
            {
                "linear.weight": _transposed(layer["kernel"]),
                "linear.bias": np.asarray(layer["bias"]),
            },
        )
        source, width = target, layer["bias"].shape[0]


def _dense(
    width: int, wide: int, *, bias: bool, activation: str = "linear.Identity"
) -> dict[str, Any]:
    return {
        "in_features": width,
        "out_features": wide,
        "bias": bias,
        "activation_function": f"torch.nn.modules.{activation}",
    }


def _transposed(kernel) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(kernel, np.float32).T)


def _write_tensors(folder: epath.Path, backbone: dict, config: TransformerConfig) -> None:
    """The transformer in files of at most `MAX_FILE`, with an index where there are several."""
    table = huggingface.tensor_table("gemma3_text" if config.use_qk_norm else "gemma2")
    files: list[dict[str, np.ndarray]] = []
    written: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        (folder / f"part-{len(written)}").write_bytes(
            safetensors.numpy.save(files[-1], {"format": "pt"})
        )
        written.append(list(files.pop()))

    for name, value in tensors.dump(backbone, config, table):
        if files and size + value.nbytes > MAX_FILE:
            flush()
        if not files:
            files.append({})
            size = 0
        files[-1][name] = value
        size, total = size + value.nbytes, total + value.nbytes
    flush()
    if len(written) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    index = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_bytes(
        _json({"metadata": {"total_size": total}, "weight_map": index})
    )
