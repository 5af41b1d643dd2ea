"""Checkpoints of the gemma package: reads all Orbax layouts, one tensor at a time, and writes one.

Names are those of google-deepmind/gemma (`gemma.gm.ckpts`). Depending on the layout, the same
tensor is stored as

    layer_0/mlp/linear                                           nested
    transformer/layer_0/mlp/linear / w                           flat: two levels of keys, the first
                                                                 with slashes in it
    transformer/stacked_layers/attention_type_0/mlp/linear / w   stacked: layers 0, P, 2P, … of a
                                                                 pattern of period P, along axis 0
    params/layer_0/mlp/linear                                    kauldron: a whole training state
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from gemma_encoder.inputs.descriptions import described_at
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.model.config import TransformerConfig
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.weights import tensors
from gemma_encoder.weights.doors import (
    ADVICE,
    check_bytes,
    check_files,
    check_layers,
    check_sizes,
    explained,
    opened,
)
from gemma_encoder.weights.new_folders import check_is_new, new_folder, save_arrays
from gemma_encoder.weights.tensors import Checkpoint, Entry, Tensor
from gemma_encoder.whole_files import write_whole

CONFIG_FILE = "transformer.json"  # written by `save`, so that unpublished sizes load too
TOKENIZER_FILE = "tokenizer.model"
# Files that are read when a checkpoint is opened; the others are when its tensors are.
METADATA_FILES = (
    *(CONFIG_FILE, TOKENIZER_FILE),
    *("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "manifest.ocdbt", "array_metadatas"),
)
PUBLISHED_NAME = re.compile(r"GEMMA[23]_(270M|[0-9]+B)_(PT|IT)")  # in the package's CheckpointPath
# Tensors of the vision tower and its projection.
VISION = re.compile(r"vision_encoder/|SigLiPFromPatches_0/|embedder/mm_")


def _table(*gating: str) -> tensors.TensorTable:
    """Returns the names and axes of all tensors.

    Args:
        gating: possible axes of the gating tensor.
    """
    layer = "layer_{layer}/"
    return {
        "embedding": Entry(("embedder/input_embedding",), ("V D",)),
        "final_norm/scale": Entry(("final_norm/scale",), ("D",)),
        "query": Entry((layer + "attn/q_einsum/w",), ("N D H",)),
        "key_value": Entry((layer + "attn/kv_einsum/w",), ("C K D H",)),
        "attention_out": Entry((layer + "attn/attn_vec_einsum/w",), ("N H D",)),
        "query_norm/scale": Entry((layer + "attn/_query_norm/scale",), ("H",)),
        "key_norm/scale": Entry((layer + "attn/_key_norm/scale",), ("H",)),
        "gating": Entry((layer + "mlp/gating_einsum",), gating),
        "linear": Entry((layer + "mlp/linear",), ("F D",)),
        "pre_attention_norm/scale": Entry((layer + "pre_attention_norm/scale",), ("D",)),
        "post_attention_norm/scale": Entry((layer + "post_attention_norm/scale",), ("D",)),
        "pre_mlp_norm/scale": Entry((layer + "pre_ffw_norm/scale",), ("D",)),
        "post_mlp_norm/scale": Entry((layer + "post_ffw_norm/scale",), ("D",)),
    }


# The gating tensor of Gemma 2 2B is the only one that is published as (2, D, F).
TABLE = _table("C F D", "C D F")


class Stored(NamedTuple):
    """Location of a tensor in a checkpoint.

    Attributes:
        keys: path of the stored array.
        part: index of the tensor along axis 0 of that array; None if it is the whole array.
    """

    keys: tuple[str, ...]
    part: int | slice | None


class GemmaCheckpoint(Checkpoint):
    """A checkpoint of the gemma package.

    Args:
        path: folder of the checkpoint, local or `gs://`.

    Raises:
        InputError: the folder is not a readable Orbax checkpoint.
    """

    table = TABLE

    def __init__(self, path: epath.Path):
        self.folder = path
        self._root = path
        self._reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        self._last_location: Stored | None = None
        self._last_value: jax.Array | None = None
        self.tensors: dict[str, Tensor] = {}
        self._stored: dict[str, Stored] = {}
        with explained(self._root, [""]), opened(self._root, METADATA_FILES):
            check_files(self._root)
            self._read_metadata()

    def _read_metadata(self) -> None:
        """Reads names, shapes and locations of the tensors."""
        leaves = _flatten(self._metadata())
        layout = _layout(leaves)
        period = _pattern_period(leaves)
        self.description = f"the gemma package's checkpoint {self._root} ({layout} layout)"
        skipped = []
        for keys, leaf in leaves.items():
            name = "/".join(keys[1:] if layout == "kauldron" else keys).removeprefix("transformer/")
            if (layout == "kauldron" and keys[0] != "params") or VISION.match(name):
                skipped.append("/".join(keys))
                continue
            name = re.sub(r"(/mlp/\w+)/w$", r"\1", name)
            tensor = Tensor(tuple(leaf.shape), np.dtype(leaf.dtype))
            stacked = re.match(r"stacked_layers/attention_type_(\d+)/(.*)", name)
            if stacked is None:
                self._add(name, tensor, Stored(keys, None))
                continue
            layer_tensor = Tensor(tensor.shape[1:], tensor.dtype)
            check_layers(tensor.shape[0] * period, self.description)
            for repeat in range(tensor.shape[0]):
                layer = repeat * period + int(stacked[1])
                self._add(f"layer_{layer}/{stacked[2]}", layer_tensor, Stored(keys, repeat))
        self.skipped = tuple(sorted(skipped))
        check_bytes(self.folder, self.tensors.values(), self.description)

    def _metadata(self):
        """Reads the tree of array metadata; a folder with several items has it under `default`."""
        for folder in (self.folder, self.folder / "default"):
            try:
                metadata = self._reader.metadata(folder)
            except Exception:  # of a damaged _METADATA, Orbax raises many types
                continue
            if metadata is not None and metadata.item_metadata is not None:
                self.folder = folder
                return metadata.item_metadata.tree
        raise InputError(
            f"{self.folder} has no readable Orbax checkpoint: its _METADATA is missing or damaged; "
            f"{ADVICE}"
        )

    def _add(self, name: str, tensor: Tensor, stored: Stored) -> None:
        """Registers a tensor; queries, keys and values in one array become two tensors."""
        if not name.endswith("attn/qkv_einsum/w") or stored.part is not None:
            self.tensors[name] = tensor
            self._stored[name] = stored
            return
        # The gemma package fuses them if there are as many key-value heads as query heads.
        prefix = name.removesuffix("qkv_einsum/w")
        self._add(
            f"{prefix}q_einsum/w",
            Tensor(tensor.shape[1:], tensor.dtype),
            Stored(stored.keys, 0),
        )
        self._add(
            f"{prefix}kv_einsum/w",
            Tensor((2, *tensor.shape[1:]), tensor.dtype),
            Stored(stored.keys, slice(1, 3)),
        )

    def config(self, hint: TransformerConfig | None = None) -> TransformerConfig:
        """Returns the config stored beside the tensors, else the hint or published size that fits.

        Raises:
            InputError: the tensors' shapes fit neither.
        """
        config_file = self.folder / CONFIG_FILE
        if config_file.exists():
            with described_at(config_file):
                config = TransformerConfig.from_dict(read_object(config_file, ADVICE))
                shapes = [tensor.shape for tensor in self.tensors.values()]
                check_sizes(config, shapes, config_file)
            return config
        for config in (hint, *GEMMA_CONFIGS.values()):
            if config is not None and self._fits(config):
                return config
        if hint is not None:
            self.check(hint)
        layers = [
            int(match[1])
            for name in self.tensors
            if (match := re.match(r"layer_(\d+)/", name)) is not None
        ]
        embedding = self.tensors.get("embedder/input_embedding")
        shape = embedding.shape if embedding else None
        raise InputError(
            f"{self.description} matches no published Gemma (embedding {shape}, "
            f"{1 + max(layers, default=-1)} layers); pass its TransformerConfig as config"
        )

    def _fits(self, config: TransformerConfig) -> bool:
        """Returns True if the tensors have the names and shapes of `config`."""
        expected = self.expected(config)
        return expected.keys() == self.tensors.keys() and all(
            self.tensors[name].shape in shapes for name, shapes in expected.items()
        )

    def load(
        self, config: TransformerConfig, shapes: dict, shardings: dict, dtype: jnp.dtype
    ) -> dict:
        """Loads the backbone's parameters, and checks the files' digests meanwhile."""
        with opened(self._root, [""]):
            return super().load(config, shapes, shardings, dtype)

    def read(self, name: str, sharding: Sharding) -> jax.Array:
        """Restores one tensor; an array of several tensors is cached until another is read."""
        stored = self._stored[name]
        whole = Stored(stored.keys, None)
        if self._last_location == whole:
            return self._last_value[stored.part]
        # Free the cached array before the next one is allocated.
        self._last_location = None
        self._last_value = None
        if stored.part is not None and isinstance(sharding, NamedSharding):
            leading = () if isinstance(stored.part, slice) else (None,)
            sharding = NamedSharding(sharding.mesh, P(*leading, *sharding.spec))
        arguments = ocp.args.PyTreeRestore(
            item=_nest(stored.keys, 0),
            restore_args=_nest(stored.keys, ocp.ArrayRestoreArgs(sharding=sharding)),
            partial_restore=True,
        )
        value = _flatten(self._reader.restore(self.folder, args=arguments))[stored.keys]
        if stored.part is None:
            return value
        self._last_location = whole
        self._last_value = value
        return value[stored.part]


def _layout(leaves: Mapping[tuple[str, ...], object]) -> str:
    """Returns the name of a checkpoint's layout, as in this module's docstring."""
    roots = {keys[0] for keys in leaves}
    if roots >= {"params", "opt_state", "step"}:
        return "kauldron"
    if not any(root.startswith("transformer/") for root in roots):
        return "nested"
    return "stacked" if any("/stacked_layers/" in root for root in roots) else "flat"


def _pattern_period(leaves: Mapping[tuple[str, ...], object]) -> int:
    """Returns the number of attention types in a stacked layout, 1 in others."""
    matches = [re.search(r"/attention_type_(\d+)/", "/".join(keys)) for keys in leaves]
    return 1 + max((int(match[1]) for match in matches if match), default=0)


def _flatten(tree, keys: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Returns the leaves of a tree by their paths; keys may contain slashes."""
    if not hasattr(tree, "items"):
        return {keys: tree}
    return {
        path: leaf
        for key, child in tree.items()
        for path, leaf in _flatten(child, (*keys, str(key))).items()
    }


def _nest(keys: tuple[str, ...], leaf):
    """Returns a nested dict with one leaf."""
    for key in reversed(keys):
        leaf = {key: leaf}
    return leaf


def published_path(name: str) -> str | None:
    """Returns the address of a published checkpoint such as GEMMA2_2B_PT; None for other names."""
    if PUBLISHED_NAME.fullmatch(name) is None:
        return None
    return f"gs://gemma-data/checkpoints/{name.lower().replace('_', '-')}"


def save(
    backbone: dict, config: TransformerConfig, path: epath.Path, tokenizer: bytes | None = None
) -> None:
    """Writes a checkpoint that `gm.ckpts.load_params` reads (nested layout), and its config.

    Args:
        backbone: nested dict of our parameters.
        config: the transformer.
        path: a folder that does not exist yet.
        tokenizer: the serialized SentencePiece model to store beside the tensors.

    Raises:
        InputError: the folder exists, or cannot be written.
    """
    check_is_new(path, "the checkpoint", may_be_empty=False)
    is_gemma2_2b = (config.num_layers, config.embed_dim) == (26, 2304)
    table = _table("C D F" if is_gemma2_2b else "C F D")  # as the package's own model classes
    tree: dict = {}
    for name, value in tensors.dump(backbone, config, table):
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    if config.num_heads == config.num_kv_heads:
        for layer in range(config.num_layers):
            _fuse_query_key_value(tree[f"layer_{layer}"]["attn"])
    with new_folder(path) as unfinished:
        save_arrays(tree, unfinished, path)
        write_whole(unfinished / CONFIG_FILE, to_json(config.to_dict(), indent=1))
        if tokenizer is not None:
            write_whole(unfinished / TOKENIZER_FILE, tokenizer)


def _fuse_query_key_value(attention: dict) -> None:
    """Stores the query, key and value tensors of a layer as one array, in place."""
    query = attention.pop("q_einsum")["w"]
    key_value = attention.pop("kv_einsum")["w"]
    attention["qkv_einsum"] = {"w": np.concatenate([query[None], key_value])}
