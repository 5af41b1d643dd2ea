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

import os

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Sharding

from gemma_encoder.inputs.descriptions import described_at
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import read_object
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.inputs.untrusted import read_bounded
from gemma_encoder.model.config import EncoderConfig, TransformerConfig
from gemma_encoder.weights.doors import (
    ADVICE,
    check_lengths,
    check_sizes,
    explained,
    opened,
)
from gemma_encoder.weights.huggingface_config import FAMILIES, transformer_config
from gemma_encoder.weights.native import InferenceSpec
from gemma_encoder.weights.safetensors_reader import read_block, read_folder
from gemma_encoder.weights.sentence_modules import module_folders, read_modules, read_prompts
from gemma_encoder.weights.tensors import Checkpoint, Entry, TensorTable

# The file that our exports add: encoder, tasks and lengths, as in our own checkpoints.
SPEC_FILE = "gemma_encoder.json"
# Files that are read when a folder is opened. Their digests are checked then, those of the tensors
# when they are read; files for other libraries may be edited.
CHECKED_FILES = (
    *("config.json", SPEC_FILE, "tokenizer.model", "modules.json"),
    "model.safetensors.index.json",
)

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
# Files and fields with the maximum length of a text; recent versions write only the second.
LENGTH_FIELDS = (
    ("sentence_bert_config.json", "max_seq_length"),
    ("tokenizer_config.json", "model_max_length"),
)
MAX_LENGTH = 2048  # EmbeddingGemma's; some files write "no limit" as a number of thirty digits


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
        with opened(folder, CHECKED_FILES):
            # The path of the transformer itself is "", which stands for the whole folder.
            paths = [entry["path"] for entry, _ in module_folders(folder) if entry["path"]]
            with opened(folder, paths):
                self.modules = read_modules(folder)
            values = read_object(folder / "config.json", ADVICE)
            self._config = transformer_config(values, str(folder / "config.json"))
            self.model_type = values["model_type"]
            self.description = f"the Hugging Face folder {folder} ({self.model_type})"
            self._read_slots()

    def _read_slots(self) -> None:
        """Reads the locations of the tensors."""
        slots = read_folder(self.folder)
        prefixes = FAMILIES[self.model_type][1]
        matching = [prefix for prefix in prefixes if f"{prefix}embed_tokens.weight" in slots]
        self.table = tensor_table(self.model_type, (matching or prefixes)[0])
        unused = UNUSED + (UNUSED_T5 if self.model_type == "t5gemma" else ())
        self.skipped = tuple(sorted(name for name in slots if name.startswith(unused)))
        self._slots = {name: slot for name, slot in slots.items() if not name.startswith(unused)}
        self._files = sorted({_relative(slot.file, self.folder) for slot in self._slots.values()})
        self.tensors = {name: slot.tensor for name, slot in self._slots.items()}
        quantized = [name for name, tensor in self.tensors.items() if tensor.dtype == object]
        with explained(self.folder, self._files):
            if quantized:
                raise InputError(
                    f"{self.description}: unsupported dtype of {', '.join(quantized)}; expected "
                    "float32, float16 or bfloat16, use weights that are not quantized"
                )
            self._check_sizes(self._config)

    def _check_sizes(self, config: TransformerConfig | EncoderConfig) -> None:
        slots = (*self._slots.values(), *(self.modules.slots if self.modules else ()))
        check_sizes(config, [slot.tensor.shape for slot in slots], self.description)

    def config(self, hint: TransformerConfig | None = None) -> TransformerConfig:
        """Returns the exact config of our own exports, else the one that config.json describes."""
        del hint
        spec_file = self.folder / SPEC_FILE
        if not spec_file.exists():
            return self._config
        values = read_object(spec_file, ADVICE)
        with described_at(spec_file):
            config = TransformerConfig.from_dict(values["encoder"]["transformer"])
        self._check_sizes(config)
        return config

    def inference_spec(self) -> InferenceSpec:
        """Returns the spec of a sentence-transformers folder; only our own exports have tasks.

        Raises:
            InputError: there is no tokenizer.model, or a file is damaged.
        """
        tokenizer_file = self.folder / "tokenizer.model"
        if not tokenizer_file.exists():
            raise InputError(
                f"{self.description} has no tokenizer.model; put the SentencePiece model there"
            )
        with opened(self.folder, [SPEC_FILE]):
            spec = self._inference_spec(tokenizer_file)
            self._check_sizes(spec.encoder)
        with explained(self.folder, self._files):
            self.check(spec.encoder.transformer)
        return spec

    def _inference_spec(self, tokenizer_file: epath.Path) -> InferenceSpec:
        spec_file = self.folder / SPEC_FILE
        model = read_bounded(tokenizer_file)
        if spec_file.exists():
            values = read_object(spec_file, ADVICE)
            return InferenceSpec.from_description(values, model, spec_file)
        if self.modules.is_sparse:
            raise InputError(
                f"{self.folder} has a SparseEncoder's modules but no {SPEC_FILE}, which names its "
                "tasks and its head; export the checkpoint again"
            )
        max_length = self._max_length()
        row_length = -(-max_length // 128) * 128
        check_lengths(max_length, row_length)
        prompts = read_prompts(self.folder)
        return InferenceSpec(
            encoder=EncoderConfig(
                self._config, pooling=self.modules.pooling, compute_dtype="float32"
            ),
            tasks=(),
            tokenizer=Tokenizer(model, str(tokenizer_file)),
            max_length=max_length,
            row_length=row_length,
            padding="right",
            step=0,
            prompts=prompts.by_name,
            default_prompt=prompts.default,
            similarity=prompts.similarity,
        )

    def _max_length(self) -> int:
        """Returns the smallest maximum length, in tokens, that the folder's files state."""
        lengths = [
            read_object(self.folder / name, ADVICE).get(field)
            for name, field in LENGTH_FIELDS
            if (self.folder / name).exists()
        ]
        return int(min([length for length in lengths if length] + [MAX_LENGTH]))

    def load(
        self, config: TransformerConfig, shapes: dict, shardings: dict, dtype: jnp.dtype
    ) -> dict:
        """Loads the backbone's parameters, and checks the files' digests meanwhile."""
        with opened(self.folder, self._files):
            return super().load(config, shapes, shardings, dtype)

    def read(self, name: str, sharding: Sharding) -> jax.Array:
        """Reads one tensor; each process reads only the rows of its own devices."""
        slot = self._slots[name]
        return jax.make_array_from_callback(
            slot.tensor.shape, sharding, lambda index: read_block(slot, index)
        )


def _relative(file: epath.Path, folder: epath.Path) -> str:
    """Returns a file's path from a folder that contains it."""
    return os.fspath(file).removeprefix(os.fspath(folder)).lstrip("/")
