"""The gemma package's checkpoints: its parameter tree, read into ours.

Their names are those of google-deepmind/gemma (`gemma.gm.ckpts`); shapes per layer:

    attn/q_einsum/w (N, D, H), attn/kv_einsum/w (2, K, D, H) or attn/qkv_einsum/w (3, N, D, H), attn/attn_vec_einsum/w (N, H, D),
    attn/_query_norm/scale, attn/_key_norm/scale (H,), mlp/gating_einsum (2, D, F) or (2, F, D), mlp/linear (F, D),
    {pre_attention,post_attention,pre_ffw,post_ffw}_norm/scale (D,)
"""

from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import TransformerConfig
from gemma_encoder.model.transformer import layer_index

_NORMS = {
    "pre_attention_norm": "pre_attention_norm",
    "post_attention_norm": "post_attention_norm",
    "pre_mlp_norm": "pre_ffw_norm",
    "post_mlp_norm": "post_ffw_norm",
}


def load(path: epath.PathLike, config: TransformerConfig, shardings: dict) -> dict:
    """The backbone of a checkpoint of the gemma package, in float32, placed as `shardings` says.

    Args:
        path: the checkpoint's folder, local or `gs://`.
        config: the transformer that it should hold.
        shardings: nested dict, one for each of our parameters.

    Raises:
        InputError: there is no such checkpoint, or its tensors are not those of `config`; every difference is listed.
    """
    from gemma import gm

    if not epath.Path(path).exists():
        raise InputError(f"model.pretrained={str(path)!r} does not exist; give the folder of a checkpoint of the gemma package")
    return jax.tree.map(jax.device_put, from_gemma(gm.ckpts.load_params(path, text_only=True), config), shardings)


def from_gemma(tree: Mapping, config: TransformerConfig) -> dict:
    """Our nested dict of the backbone's parameters (numpy, float32), from the nested tree of the gemma package."""
    _check(tree, config)

    def layer(index: int) -> dict[str, np.ndarray]:
        theirs = tree[f"layer_{index}"]
        attention, mlp = theirs["attn"], theirs["mlp"]
        if "qkv_einsum" in attention:
            query, key_value = attention["qkv_einsum"]["w"][0], attention["qkv_einsum"]["w"][1:]
        else:
            query, key_value = attention["q_einsum"]["w"], attention["kv_einsum"]["w"]
        gating = np.asarray(_weight(mlp["gating_einsum"]), np.float32)
        features_first = gating.shape[1] == config.embed_dim and gating.shape[2] == config.hidden_dim
        ours = {
            "query": np.asarray(query, np.float32).transpose(1, 0, 2),
            "key_value": np.asarray(key_value, np.float32).transpose(2, 0, 1, 3),
            "attention_out": attention["attn_vec_einsum"]["w"],
            "gating": gating.transpose(1, 0, 2) if features_first else gating.transpose(2, 0, 1),
            "linear": _weight(mlp["linear"]),
        }
        norms = {name: theirs[their]["scale"] for name, their in _NORMS.items()}
        if config.use_qk_norm:
            norms |= {"query_norm": attention["_query_norm"]["scale"], "key_norm": attention["_key_norm"]["scale"]}
        ours |= {name: {"scale": scale} for name, scale in norms.items()}
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), ours)

    def group(name: str, count: int) -> dict[str, dict]:
        result = {}
        for position in range(count):
            layers = [layer(index) for index in layer_index(config, name, position)]
            result[str(position)] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers) if name == "blocks" else layers[0]
        return result

    backbone = {
        "embedding": np.asarray(tree["embedder"]["input_embedding"], np.float32),
        "final_norm": {"scale": np.asarray(tree["final_norm"]["scale"], np.float32)},
    }
    if config.num_repeats:
        backbone["blocks"] = group("blocks", len(config.pattern))
    rest = config.num_layers - config.num_repeats * len(config.pattern)
    if rest:
        backbone["rest"] = group("rest", rest)
    return backbone


def _weight(leaf):
    """A feed-forward weight: some layouts keep it under `w`."""
    return leaf["w"] if isinstance(leaf, Mapping) else leaf


def _check(tree: Mapping, config: TransformerConfig) -> None:
    """Raises InputError listing every tensor that is missing, surplus or of another shape."""
    D, F, N, K, H = config.embed_dim, config.hidden_dim, config.num_heads, config.num_kv_heads, config.head_dim
    wanted = {"embedder/input_embedding": [(config.vocab_size, D)], "final_norm/scale": [(D,)]}
    for index in range(config.num_layers):
        layer = {"attn/attn_vec_einsum/w": [(N, H, D)], "mlp/gating_einsum": [(2, D, F), (2, F, D)], "mlp/linear": [(F, D)]}
        layer |= {"attn/qkv_einsum/w": [(3, N, D, H)]} if N == K else {"attn/q_einsum/w": [(N, D, H)], "attn/kv_einsum/w": [(2, K, D, H)]}
        layer |= {f"{norm}/scale": [(D,)] for norm in _NORMS.values()}
        if config.use_qk_norm:
            layer |= {"attn/_query_norm/scale": [(H,)], "attn/_key_norm/scale": [(H,)]}
        wanted |= {f"layer_{index}/{name}": shapes for name, shapes in layer.items()}
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    found = {"/".join(str(entry.key) for entry in path): tuple(leaf.shape) for path, leaf in leaves}
    found = {name.removesuffix("/w") if "/mlp/" in name else name: shape for name, shape in found.items()}
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is surplus" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {found[name]}, expected {' or '.join(map(str, shapes))}"
        for name, shapes in wanted.items()
        if name in found and found[name] not in shapes
    ]
    if problems:
        raise InputError(f"the checkpoint does not hold this model: {'; '.join(problems)}")
