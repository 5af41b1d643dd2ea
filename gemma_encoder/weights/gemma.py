"""The gemma package's checkpoints: Orbax folders in any of its layouts, read one tensor at a time, and written.

Names are those of google-deepmind/gemma (`gemma.gm.ckpts`). The same tensor may lie under

    layer_0/mlp/linear                                               nested
    transformer/layer_0/mlp/linear / w                               flat: two levels, the first with slashes in it
    transformer/stacked_layers/attention_type_0/mlp/linear / w       stacked: layers 0, P, 2P, … of a pattern of P kinds, on axis 0
    params/layer_0/mlp/linear                                        kauldron: a whole training state
"""

import json
import re
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import TransformerConfig
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.weights import tensors
from gemma_encoder.weights.tensors import Checkpoint, Entry, Tensor

SIDECAR = "transformer.json"  # what `save` adds, so that a transformer of any size is recognised
PUBLISHED = re.compile(
    r"GEMMA[23]_(270M|[0-9]+B)_(PT|IT)"
)  # names in the gemma package's CheckpointPath


def _table(*gating: str) -> tensors.Table:
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


TABLE = _table("C F D", "C D F")  # only Gemma 2 2B is published with the features first


class Stored(NamedTuple):
    """Where a tensor really lies: the keys to it, and the part of what is found there."""

    keys: tuple[str, ...]
    part: int | slice | None


class GemmaCheckpoint(Checkpoint):
    """A checkpoint of the gemma package.

    Args:
        path: its folder, local or `gs://`.

    Raises:
        InputError: there is no Orbax checkpoint.
    """

    table = TABLE

    def __init__(self, path: epath.Path):
        self.folder = path
        self._reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        self._last: tuple[Stored | None, jax.Array | None] = (None, None)
        leaves = _flatten(self._metadata())
        layout = "nested"
        if {keys[0] for keys in leaves} >= {"params", "opt_state", "step"}:
            layout = "kauldron"
        elif any(keys[0].startswith("transformer/") for keys in leaves):
            layout = "stacked" if any("/stacked_layers/" in keys[0] for keys in leaves) else "flat"
        self.description = f"the gemma package's checkpoint {path} ({layout} layout)"
        self.tensors: dict[str, Tensor] = {}
        self._stored: dict[str, Stored] = {}
        skipped = []
        period = 1 + max(
            (
                int(match[1])
                for keys in leaves
                if (match := re.search(r"/attention_type_(\d+)/", "/".join(keys)))
            ),
            default=0,
        )
        for keys, leaf in leaves.items():
            name = "/".join(keys[1:] if layout == "kauldron" else keys).removeprefix("transformer/")
            if (layout == "kauldron" and keys[0] != "params") or re.match(
                r"vision_encoder/|SigLiPFromPatches_0/|embedder/mm_", name
            ):
                skipped.append("/".join(keys))
                continue
            name = re.sub(r"(/mlp/\w+)/w$", r"\1", name)
            tensor = Tensor(tuple(leaf.shape), np.dtype(leaf.dtype))
            stacked = re.match(r"stacked_layers/attention_type_(\d+)/(.*)", name)
            if stacked is None:
                self._add(name, tensor, keys, None)
                continue
            for place in range(tensor.shape[0]):
                self._add(
                    f"layer_{place * period + int(stacked[1])}/{stacked[2]}",
                    Tensor(tensor.shape[1:], tensor.dtype),
                    keys,
                    place,
                )
        self.skipped = tuple(sorted(skipped))

    def _metadata(self):
        """The tree of the checkpoint's arrays; a folder with items keeps it under `default`."""
        for folder in (self.folder, self.folder / "default"):
            try:
                metadata = self._reader.metadata(folder)
            except (FileNotFoundError, ValueError, KeyError):
                continue
            if metadata is not None and metadata.item_metadata is not None:
                self.folder = folder
                return metadata.item_metadata.tree
        raise InputError(
            f"{self.folder} holds no Orbax checkpoint that can be read; its _METADATA is missing or damaged"
        )

    def _add(self, name: str, tensor: Tensor, keys: tuple[str, ...], part: int | None) -> None:
        if (
            name.endswith("attn/qkv_einsum/w") and part is None
        ):  # as many key-value heads as queries: three in one
            layer = name.removesuffix("qkv_einsum/w")
            parts = {
                "q_einsum/w": (0, tensor.shape[1:]),
                "kv_einsum/w": (slice(1, 3), (2, *tensor.shape[1:])),
            }
            for suffix, (which, shape) in parts.items():
                self.tensors[layer + suffix], self._stored[layer + suffix] = (
                    Tensor(shape, tensor.dtype),
                    Stored(keys, which),
                )
            return
        self.tensors[name], self._stored[name] = tensor, Stored(keys, part)

    def config(self, hint: TransformerConfig | None = None) -> TransformerConfig:
        """The transformer that its tensors' shapes fit: that of the file beside them, the hint, or a published size."""
        sidecar = self.folder / SIDECAR
        if sidecar.exists():
            return TransformerConfig.from_dict(json.loads(sidecar.read_text()))
        found = {name: tensor.shape for name, tensor in self.tensors.items()}
        for config in (hint, *GEMMA_CONFIGS.values()):
            if config is not None:
                expected = self.expected(config)
                if expected.keys() == found.keys() and all(
                    found[name] in shapes for name, shapes in expected.items()
                ):
                    return config
        if hint is not None:
            self.check(hint)
        layers = 1 + max(
            (int(match[1]) for name in found if (match := re.match(r"layer_(\d+)/", name))),
            default=-1,
        )
        raise InputError(
            f"{self.description} has the shapes of no published Gemma (embedding {found.get('embedder/input_embedding')}, {layers} layers); "
            "give its TransformerConfig as config"
        )

    def read(self, name: str, sharding: Sharding) -> jax.Array:
        """One tensor, restored by itself. What lies stacked is read once and kept until another tensor is asked for."""
        stored = self._stored[name]
        whole = Stored(stored.keys, None)
        if self._last[0] != whole:
            self._last = (None, None)
            if stored.part is not None and isinstance(sharding, NamedSharding):
                lead = () if isinstance(stored.part, slice) else (None,)
                sharding = NamedSharding(sharding.mesh, P(*lead, *sharding.spec))
            item, arguments = (
                _nest(stored.keys, leaf) for leaf in (0, ocp.ArrayRestoreArgs(sharding=sharding))
            )
            tree = self._reader.restore(
                self.folder,
                args=ocp.args.PyTreeRestore(
                    item=item, restore_args=arguments, partial_restore=True
                ),
            )
            value = _flatten(tree)[stored.keys]
            if stored.part is None:
                return value
            self._last = (whole, value)
        return self._last[1][stored.part]


def _flatten(tree, keys: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Leaves by their keys; keys may hold slashes."""
    if not hasattr(tree, "items"):
        return {keys: tree}
    return {
        path: leaf
        for key, child in tree.items()
        for path, leaf in _flatten(child, (*keys, str(key))).items()
    }


def _nest(keys: tuple[str, ...], leaf):
    for key in reversed(keys):
        leaf = {key: leaf}
    return leaf


def published_path(name: str) -> str | None:
    """The address of a name in the gemma package's CheckpointPath, such as GEMMA2_2B_PT; None for anything else."""
    return (
        f"gs://gemma-data/checkpoints/{name.lower().replace('_', '-')}"
        if PUBLISHED.fullmatch(name)
        else None
    )


def save(backbone: dict, config: TransformerConfig, path: epath.Path) -> None:
    """Writes a checkpoint that `gm.ckpts.load_params` reads (nested layout), with the config beside it.

    Args:
        backbone: nested dict of our parameters.
        config: the transformer.
        path: a folder that does not exist yet.
    """
    if path.exists():
        raise InputError(f"{path} exists; name a new folder for the checkpoint")
    first = (
        "C D F" if (config.num_layers, config.embed_dim) == (26, 2304) else "C F D"
    )  # as the gemma package's Gemma2_2B wants it
    tree: dict = {}
    for name, value in tensors.dump(backbone, config, _table(first)):
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    if config.num_heads == config.num_kv_heads:
        for layer in range(config.num_layers):
            attention = tree[f"layer_{layer}"]["attn"]
            query, key_value = attention.pop("q_einsum")["w"], attention.pop("kv_einsum")["w"]
            attention["qkv_einsum"] = {"w": np.concatenate([query[None], key_value])}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    (path / SIDECAR).write_text(json.dumps(config.to_dict(), indent=1))
