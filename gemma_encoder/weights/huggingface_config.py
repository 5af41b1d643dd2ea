"""Reads the transformer that a Hugging Face `config.json` describes."""

from collections.abc import Mapping
from typing import Any

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.options import convert
from gemma_encoder.model.config import TransformerConfig
from gemma_encoder.weights.doors import check_layers

# For each model type, the section of config.json that describes the text transformer, and the
# possible prefixes of its tensors.
FAMILIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "gemma2": ("", ("model.", "")),
    "gemma3_text": ("", ("model.", "")),
    "gemma3": (
        "text_config",
        ("model.language_model.", "language_model.model.", "language_model."),
    ),
    "t5gemma": ("encoder", ("model.encoder.", "encoder.")),
}
# Defaults of transformers' Gemma3TextConfig and Gemma2Config for omitted fields.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma2": {
        "sliding_window_pattern": 2,
        "rope_theta": 10_000.0,
        "rope_local_base_freq": 10_000.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}
LAYER_TYPES = {"sliding_attention": "local", "full_attention": "global"}
FIELD_TYPES: Mapping[str, Any] = {
    "num_hidden_layers": int,
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "sliding_window": int,
    "sliding_window_pattern": int,
    "query_pre_attn_scalar": float,
    "attn_logit_softcapping": float | None,
    "final_logit_softcapping": float | None,
    "rope_theta": float,
    "rope_local_base_freq": float,
    "layer_types": tuple[str, ...],
    "rope_parameters": Mapping[str, Any],
    "rope_scaling": Mapping[str, Any],
}


def transformer_config(values: Mapping[str, Any], where: str) -> TransformerConfig:
    """Returns the transformer that a `config.json` describes; its reach is as in transformers.

    Args:
        values: the file's content, from any version of transformers since Gemma 2.
        where: the file's name for messages.

    Raises:
        InputError: the model is of another family, or needs something that Gemma's text transformer
            does not have.
    """
    model_type = values.get("model_type", "")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unknown(f"model_type in {where}:", model_type, FAMILIES)
    gemma3 = model_type.startswith("gemma3")
    field = _text_fields(values, model_type, where)
    _check_is_gemma(field, where)
    check_layers(field.get("num_hidden_layers", 0), where)
    check_layers(len(field.get("layer_types", ())), where)
    try:
        window, reach = _window(field, model_type)
        return TransformerConfig(
            num_layers=field["num_hidden_layers"],
            vocab_size=field["vocab_size"],
            embed_dim=field["hidden_size"],
            hidden_dim=field["intermediate_size"],
            num_heads=field["num_attention_heads"],
            num_kv_heads=field["num_key_value_heads"],
            head_dim=field["head_dim"],
            pattern=_pattern([LAYER_TYPES[kind] for kind in _layer_types(field)]),
            sliding_window=window,
            query_scale=float(field["query_pre_attn_scalar"]) ** -0.5,
            attention_soft_cap=field["attn_logit_softcapping"],
            use_qk_norm=gemma3,
            bidirectional_reach=reach,
            final_soft_cap=field["final_logit_softcapping"],
            **_rotary(field, gemma3, where),
        )
    except KeyError as error:
        raise InputError(
            f"{where}: the field {error} is missing or has an unknown value"
        ) from error


def _text_fields(values: Mapping[str, Any], model_type: str, where: str) -> dict[str, Any]:
    """Returns the fields of the text transformer, with defaults for those that are omitted."""
    section = FAMILIES[model_type][0]
    text = values.get(section) if section else values
    if not isinstance(text, Mapping):
        raise InputError(f"{where} has no section {section!r}, which describes the transformer")
    defaults = DEFAULTS["gemma3" if model_type.startswith("gemma3") else "gemma2"]
    # A null field is an omitted one, except that a null soft cap means no soft cap.
    given = {name: value for name, value in text.items() if value is not None or "softcap" in name}
    for name in FIELD_TYPES.keys() & given.keys():
        given[name] = convert(FIELD_TYPES[name], given[name], f"{where}: {name}")
    for name in ("sliding_window_pattern", "query_pre_attn_scalar"):
        if name in given and not given[name] > 0:
            raise InputError(f"{where}: {name} must be positive, got {given[name]}")
    return {**defaults, **given}


def _check_is_gemma(field: Mapping[str, Any], where: str) -> None:
    """Raises InputError if a field has a value that no Gemma has."""
    gemma = {
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
    }
    for name, expected in gemma.items():
        if field.get(name, expected) != expected:
            raise InputError(
                f"{where}: {name} is {field[name]!r}, expected Gemma's {expected!r}; this is "
                "another model"
            )


def _window(field: Mapping[str, Any], model_type: str) -> tuple[int, tuple[int, int] | None]:
    """Returns the causal window of local layers, and their bidirectional reach if it differs."""
    window = field["sliding_window"]
    if model_type == "t5gemma" or (model_type == "gemma2" and field.get("is_causal") is False):
        return window, (window, window)
    if model_type.startswith("gemma3") and field.get("use_bidirectional_attention"):
        half = window // 2
        return half + 1, (half, half)  # transformers halves the window when it reads the file
    return window, None


def _layer_types(field: Mapping[str, Any]) -> list[str]:
    """Returns the type of every layer; older files have only the pattern's period."""
    if field.get("layer_types"):
        return field["layer_types"]
    period = field["sliding_window_pattern"]
    return [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
        for layer in range(field["num_hidden_layers"])
    ]


def _pattern(kinds: list[str]) -> tuple[str, ...]:
    """Returns the shortest pattern that gives these kinds when repeated and truncated."""
    return next(
        tuple(kinds[:period])
        for period in range(1, len(kinds) + 1)
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds))
    )


def _rotary(field: Mapping[str, Any], gemma3: bool, where: str) -> dict[str, float]:
    """Returns bases and position scaling, as fields of TransformerConfig.

    They are in `rope_parameters` (transformers 5), or in several fields of earlier versions.
    """
    parameters = field.get("rope_parameters")
    if not parameters:
        scaling = field.get("rope_scaling") or {"rope_type": "default"}
        local = {
            "rope_type": "default",
            "rope_theta": field["rope_local_base_freq"] if gemma3 else field["rope_theta"],
        }
        full = {**scaling, "rope_theta": field["rope_theta"]}
    else:
        # Gemma 2 has one set of parameters for all layers.
        local = parameters.get("sliding_attention", parameters)
        full = parameters.get("full_attention", parameters)
    if not isinstance(local, Mapping) or not isinstance(full, Mapping):
        raise InputError(f"{where}: rope_parameters must be mappings from field to value")
    kind = full.get("rope_type", full.get("type", "default"))
    if local.get("rope_type", "default") != "default" or kind not in ("default", "linear"):
        raise InputError(
            f"{where}: rope_type is {kind!r}, expected Gemma's 'default' or 'linear'; this is "
            "another model"
        )
    return {
        "local_rope_base": float(local.get("rope_theta", field["rope_local_base_freq"])),
        "global_rope_base": float(full.get("rope_theta", field["rope_theta"])),
        "global_rope_scale": float(full.get("factor", 1.0)) if kind == "linear" else 1.0,
    }
