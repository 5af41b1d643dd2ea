"""Reader of Hugging Face folders of Gemma 2, Gemma 3, EmbeddingGemma and T5Gemma's encoder.

Tensors of a layer in safetensors; PyTorch's linear layers are (out, in). D embed, F hidden, N query
heads, K kv heads, H head dim.

    self_attn.q_proj.weight               (N H, D)
    self_attn.{k,v}_proj.weight           (K H, D)
    self_attn.o_proj.weight               (D, N H)
    self_attn.{q,k}_norm.weight           (H,)
    mlp.{gate,up}_proj.weight             (F, D)
    mlp.down_proj.weight                  (D, F)
    and four norms                        (D,)
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
from gemma_encoder.weights.tensors import Checkpoint, Entry, TensorTable

# The file that our exports add: encoder, tasks and lengths, as in our own checkpoints.
SPEC_FILE = "gemma_encoder.json"

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
# Prefixes of tensors that a text encoder does not use.
UNUSED = (
    "model.vision_tower.",
    "vision_tower.",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
    "lm_head.",
    "language_model.lm_head.",
)
UNUSED_T5 = ("model.decoder.", "decoder.")
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
# Files and fields with the maximum length of a text; recent versions write only the second.
LENGTH_FIELDS = (
    ("sentence_bert_config.json", "max_seq_length"),
    ("tokenizer_config.json", "model_max_length"),
)
MAX_LENGTH = 2048  # EmbeddingGemma's; some files write "no limit" as a number of thirty digits
LAYER_TYPES = {"sliding_attention": "local", "full_attention": "global"}


def tensor_table(model_type: str, prefix: str = "") -> TensorTable:
    """Returns names and axes of the tensors.

    Args:
        model_type: `model_type` of config.json; T5Gemma's norms have names of their own.
        prefix: prefix of every name.
    """
    layer = prefix + "layers.{layer}."
    if model_type == "t5gemma":
        pre_attention_norm = "pre_self_attn_layernorm"
        post_attention_norm = "post_self_attn_layernorm"
    else:
        pre_attention_norm = "input_layernorm"
        post_attention_norm = "post_attention_layernorm"

    def linear(*names: str, axes: str) -> Entry:
        return Entry(tuple(f"{layer}{name}_proj.weight" for name in names), (axes,))

    def norm(name: str, axis: str = "D") -> Entry:
        return Entry((f"{layer}{name}.weight",), (axis,))

    return {
        "embedding": Entry((prefix + "embed_tokens.weight",), ("V D",)),
        "final_norm/scale": Entry((prefix + "norm.weight",), ("D",)),
        "query": linear("self_attn.q", axes="(N H) D"),
        "key_value": linear("self_attn.k", "self_attn.v", axes="(K H) D"),
        "attention_out": linear("self_attn.o", axes="D (N H)"),
        "query_norm/scale": norm("self_attn.q_norm", "H"),
        "key_norm/scale": norm("self_attn.k_norm", "H"),
        "gating": linear("mlp.gate", "mlp.up", axes="F D"),
        "linear": linear("mlp.down", axes="D F"),
        "pre_attention_norm/scale": norm(pre_attention_norm),
        "post_attention_norm/scale": norm(post_attention_norm),
        "pre_mlp_norm/scale": norm("pre_feedforward_layernorm"),
        "post_mlp_norm/scale": norm("post_feedforward_layernorm"),
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


def _text_fields(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Returns the fields of the text transformer, with defaults for those that are omitted."""
    section = FAMILIES[model_type][0]
    text = values[section] if section else values
    defaults = DEFAULTS["gemma3" if model_type.startswith("gemma3") else "gemma2"]
    # A null field is an omitted one, except that a null soft cap means no soft cap.
    given = {name: value for name, value in text.items() if value is not None or "softcap" in name}
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
    if parameters is None:
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


class HuggingFaceCheckpoint(Checkpoint):
    """A folder with `config.json` and safetensors.

    Args:
        folder: local or `gs://`.

    Attributes:
        model_type: `model_type` of config.json.
        modules: modules of sentence-transformers after the transformer; None in other folders.

    Raises:
        InputError: a file is missing or damaged, or the model is of another family.
    """

    def __init__(self, folder: epath.Path):
        self.folder = folder
        values = read_json(folder / "config.json")
        self._config = transformer_config(values, str(folder / "config.json"))
        self.model_type = values["model_type"]
        self.description = f"the Hugging Face folder {folder} ({self.model_type})"
        slots = read_folder(folder)
        prefixes = FAMILIES[self.model_type][1]
        matching = [prefix for prefix in prefixes if f"{prefix}embed_tokens.weight" in slots]
        self.table = tensor_table(self.model_type, (matching or prefixes)[0])
        unused = UNUSED + (UNUSED_T5 if self.model_type == "t5gemma" else ())
        self.skipped = tuple(sorted(name for name in slots if name.startswith(unused)))
        self._slots = {name: slot for name, slot in slots.items() if not name.startswith(unused)}
        quantized = [name for name, slot in self._slots.items() if slot.tensor.dtype == object]
        if quantized:
            raise InputError(
                f"{self.description}: unsupported dtype of {', '.join(quantized)}; expected "
                "float32, float16 or bfloat16, use weights that are not quantized"
            )
        self.tensors = {name: slot.tensor for name, slot in self._slots.items()}
        self.modules = read_modules(folder)

    def config(self, hint: TransformerConfig | None = None) -> TransformerConfig:
        """Returns the exact config of our own exports, else the one that config.json describes."""
        del hint
        spec_file = self.folder / SPEC_FILE
        if spec_file.exists():
            return TransformerConfig.from_dict(read_json(spec_file)["encoder"]["transformer"])
        return self._config

    def inference_spec(self) -> InferenceSpec:
        """Returns the spec of a sentence-transformers folder; only our own exports have tasks.

        Raises:
            InputError: there is no tokenizer.model, or a file is damaged.
        """
        spec_file = self.folder / SPEC_FILE
        tokenizer_file = self.folder / "tokenizer.model"
        if not tokenizer_file.exists():
            raise InputError(
                f"{self.description} has no tokenizer.model; put the SentencePiece model there"
            )
        model = tokenizer_file.read_bytes()
        if spec_file.exists():
            return InferenceSpec.from_description(read_json(spec_file), model, self.folder)
        max_length = self._max_length()
        return InferenceSpec(
            encoder=EncoderConfig(
                self._config, pooling=self.modules.pooling, compute_dtype="float32"
            ),
            tasks=(),
            tokenizer=Tokenizer(model, str(tokenizer_file)),
            max_length=max_length,
            row_length=-(-max_length // 128) * 128,
            padding="right",
            step=0,
        )

    def _max_length(self) -> int:
        """Returns the smallest maximum length, in tokens, that the folder's files state."""
        lengths = [
            read_json(self.folder / name).get(field)
            for name, field in LENGTH_FIELDS
            if (self.folder / name).exists()
        ]
        return int(min([length for length in lengths if length] + [MAX_LENGTH]))

    def read(self, name: str, sharding: Sharding) -> jax.Array:
        """Reads one tensor; each process reads only the rows of its own devices."""
        slot = self._slots[name]
        return jax.make_array_from_callback(
            slot.tensor.shape, sharding, lambda index: read_block(slot, index)
        )
