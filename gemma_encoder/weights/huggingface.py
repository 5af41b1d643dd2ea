"""Hugging Face folders: `config.json` and safetensors of Gemma 2, Gemma 3, EmbeddingGemma and T5Gemma's encoder, read.

Tensors of a layer, D embed, F hidden, N query heads, K kv heads, H head dim (PyTorch's linear layers are (out, in)):

    self_attn.{q,k,v}_proj.weight (N H, D) and (K H, D), self_attn.o_proj.weight (D, N H), self_attn.{q,k}_norm.weight (H,),
    mlp.{gate,up}_proj.weight (F, D), mlp.down_proj.weight (D, F), and four norms (D,)
"""

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Sharding

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model.config import EncoderConfig, TransformerConfig
from gemma_encoder.weights.native import InferenceSpec
from gemma_encoder.weights.safetensors_reader import read_block, read_folder, read_json
from gemma_encoder.weights.sentence_modules import read_modules
from gemma_encoder.weights.tensors import Checkpoint, Entry, Table

SIDECAR = "gemma_encoder.json"  # what an export of ours adds: encoder, tasks and lengths, as in our own checkpoints

# For each model type, the part of config.json that describes the text transformer, and where its tensors may begin.
FAMILIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "gemma2": ("", ("model.", "")),
    "gemma3_text": ("", ("model.", "")),
    "gemma3": (
        "text_config",
        ("model.language_model.", "language_model.model.", "language_model."),
    ),
    "t5gemma": ("encoder", ("model.encoder.", "encoder.")),
}
# Parts of those models that an encoder of text has no use for.
UNUSED = (
    "model.vision_tower.",
    "vision_tower.",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
    "lm_head.",
    "language_model.lm_head.",
)
UNUSED_T5 = ("model.decoder.", "decoder.")
# What transformers assumes where a published config.json is silent (its Gemma3TextConfig and Gemma2Config).
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
LENGTHS = (
    ("sentence_bert_config.json", "max_seq_length"),
    ("tokenizer_config.json", "model_max_length"),
)  # the newest has only the second
MAX_LENGTH = 2048  # EmbeddingGemma's; some files say "no limit" with a number of thirty digits
KINDS = {"sliding_attention": "local", "full_attention": "global"}


def tensor_table(model_type: str, prefix: str = "") -> Table:
    """Names and axes under a prefix; the norms of T5Gemma have names of their own."""
    layer, t5 = prefix + "layers.{layer}.", model_type == "t5gemma"

    def linear(*names: str, axes: str) -> Entry:
        return Entry(tuple(f"{layer}{name}_proj.weight" for name in names), (axes,))

    def norm(name: str) -> Entry:
        return Entry((f"{layer}{name}.weight",), ("D",))

    return {
        "embedding": Entry((prefix + "embed_tokens.weight",), ("V D",)),
        "final_norm/scale": Entry((prefix + "norm.weight",), ("D",)),
        "query": linear("self_attn.q", axes="(N H) D"),
        "key_value": linear("self_attn.k", "self_attn.v", axes="(K H) D"),
        "attention_out": linear("self_attn.o", axes="D (N H)"),
        "query_norm/scale": Entry((f"{layer}self_attn.q_norm.weight",), ("H",)),
        "key_norm/scale": Entry((f"{layer}self_attn.k_norm.weight",), ("H",)),
        "gating": linear("mlp.gate", "mlp.up", axes="F D"),
        "linear": linear("mlp.down", axes="D F"),
        "pre_attention_norm/scale": norm("pre_self_attn_layernorm" if t5 else "input_layernorm"),
        "post_attention_norm/scale": norm(
            "post_self_attn_layernorm" if t5 else "post_attention_layernorm"
        ),
        "pre_mlp_norm/scale": norm("pre_feedforward_layernorm"),
        "post_mlp_norm/scale": norm("post_feedforward_layernorm"),
    }


def transformer_config(values: Mapping[str, Any], where: str) -> TransformerConfig:
    """The transformer that a `config.json` describes; local layers reach as in transformers.

    Args:
        values: the file's content, as any version of transformers since Gemma 2 writes it.
        where: names the file in messages.

    Raises:
        InputError: it is of another family of models, or asks for something that Gemma's text
            transformer does not have.
    """
    model_type = values.get("model_type", "")
    if model_type not in FAMILIES:
        raise unknown(f"model_type in {where}:", model_type, FAMILIES)
    gemma3 = model_type.startswith("gemma3")
    field = _text_fields(values, model_type)
    _check_is_gemma(field, where)
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
            pattern=_pattern([KINDS[kind] for kind in _layer_types(field)]),
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


def _text_fields(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The fields of the text transformer, with transformers' defaults where the file is silent."""
    section = FAMILIES[model_type][0]
    text = values[section] if section else values
    return {
        **DEFAULTS["gemma3" if model_type.startswith("gemma3") else "gemma2"],
        **{name: value for name, value in text.items() if value is not None or "softcap" in name},
    }


def _check_is_gemma(field: Mapping[str, Any], where: str) -> None:
    for name, expected in {
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
    }.items():
        if field.get(name, expected) != expected:
            raise InputError(
                f"{where}: {name} is {field[name]!r}, Gemma's is {expected!r}; this is another model"
            )


def _window(field: Mapping[str, Any], model_type: str) -> tuple[int, tuple[int, int] | None]:
    """The causal window of local layers, and their reach to both sides where it differs from it."""
    window = field["sliding_window"]
    if model_type == "t5gemma" or (model_type == "gemma2" and field.get("is_causal") is False):
        return window, (window, window)
    if model_type.startswith("gemma3") and field.get("use_bidirectional_attention"):
        half = window // 2
        return half + 1, (half, half)  # transformers halves it when it reads the file
    return window, None


def _layer_types(field: Mapping[str, Any]) -> list[str]:
    return field.get("layer_types") or [
        "full_attention" if (i + 1) % field["sliding_window_pattern"] == 0 else "sliding_attention"
        for i in range(field["num_hidden_layers"])
    ]


def _pattern(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern whose repetition, the last one cut short, gives these kinds."""
    return next(
        tuple(kinds[:period])
        for period in range(1, len(kinds) + 1)
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds))
    )


def _rotary(field: Mapping[str, Any], gemma3: bool, where: str) -> dict[str, float]:
    """Bases and position scaling, from `rope_parameters` (transformers 5) or the fields before it."""
    parameters = field.get("rope_parameters")
    if parameters is None:
        scaling = field.get("rope_scaling") or {"rope_type": "default"}
        local = {
            "rope_type": "default",
            "rope_theta": field["rope_local_base_freq"] if gemma3 else field["rope_theta"],
        }
        full = {**scaling, "rope_theta": field["rope_theta"]}
    else:
        local, full = (
            parameters.get(kind, parameters) for kind in ("sliding_attention", "full_attention")
        )
    kind = full.get("rope_type", full.get("type", "default"))
    if local.get("rope_type", "default") != "default" or kind not in ("default", "linear"):
        raise InputError(
            f"{where}: rotary positions of type {kind!r} are not Gemma's; expected 'default' or 'linear'"
        )
    return {
        "local_rope_base": float(local.get("rope_theta", field["rope_local_base_freq"])),
        "global_rope_base": float(full.get("rope_theta", field["rope_theta"])),
        "global_rope_scale": float(full.get("factor", 1.0)) if kind == "linear" else 1.0,
    }


class HuggingFaceCheckpoint(Checkpoint):
    """A folder with `config.json` and safetensors; `modules` is what sentence-transformers adds, if anything.

    Args:
        folder: local or `gs://`.

    Raises:
        InputError: what is missing, damaged or of another family.
    """

    def __init__(self, folder: epath.Path):
        self.folder = folder
        values = read_json(folder / "config.json")
        self._config = transformer_config(values, str(folder / "config.json"))
        self.model_type = values["model_type"]
        slots = read_folder(folder)
        prefix = next(
            (
                prefix
                for prefix in FAMILIES[self.model_type][1]
                if f"{prefix}embed_tokens.weight" in slots
            ),
            FAMILIES[self.model_type][1][0],
        )
        self.description = f"the Hugging Face folder {folder} ({self.model_type})"
        self.table = tensor_table(self.model_type, prefix)
        unused = UNUSED + (UNUSED_T5 if self.model_type == "t5gemma" else ())
        self.skipped = tuple(sorted(name for name in slots if name.startswith(unused)))
        self._slots = {name: slot for name, slot in slots.items() if not name.startswith(unused)}
        strange = [name for name, slot in self._slots.items() if slot.tensor.dtype == object]
        if strange:
            raise InputError(
                f"{self.description}: only float32, float16 and bfloat16 tensors are read; quantised: {', '.join(strange)}"
            )
        self.tensors = {name: slot.tensor for name, slot in self._slots.items()}
        self.modules = read_modules(folder)

    def config(self, hint: TransformerConfig | None = None) -> TransformerConfig:
        """The transformer that `config.json` describes, or, in a folder that this project wrote, what it was exported from."""
        del hint
        own = self.folder / SIDECAR
        return (
            TransformerConfig.from_dict(read_json(own)["encoder"]["transformer"])
            if own.exists()
            else self._config
        )

    def inference_spec(self) -> InferenceSpec:
        """Everything but the parameters of the encoder in a sentence-transformers folder: ours as we wrote it, others without a task."""
        own, model = self.folder / SIDECAR, self.folder / "tokenizer.model"
        if not model.exists():
            raise InputError(
                f"{self.description} has no tokenizer.model; put the SentencePiece model there"
            )
        if own.exists():
            return InferenceSpec.from_description(read_json(own), model.read_bytes(), self.folder)
        lengths = [
            read_json(self.folder / name).get(field)
            for name, field in LENGTHS
            if (self.folder / name).exists()
        ]
        length = int(min([length for length in lengths if length] + [MAX_LENGTH]))
        encoder = EncoderConfig(self._config, pooling=self.modules.pooling, compute_dtype="float32")
        return InferenceSpec(
            encoder,
            (),
            Tokenizer(model.read_bytes(), str(model)),
            length,
            -(-length // 128) * 128,
            "right",
            0,
        )

    def read(self, name: str, sharding: Sharding) -> jax.Array:
        """One tensor; every process reads the rows of its own devices."""
        slot = self._slots[name]
        return jax.make_array_from_callback(
            slot.tensor.shape, sharding, lambda index: read_block(slot, index)
        )
