"""The modules that a sentence-transformers folder puts after the transformer."""

from typing import NamedTuple

import numpy as np
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import PoolingConfig
from gemma_encoder.weights.safetensors_reader import Slot, read_block, read_header, read_json

# Names of our poolers: in sentence-transformers 6, and the flag of the versions before it.
POOLING = {
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "first_k": ("cls", "pooling_mode_cls_token"),
    "last_k": ("lasttoken", "pooling_mode_lasttoken"),
}


class Modules(NamedTuple):
    """What sentence-transformers' `modules.json` says follows the transformer.

    Attributes:
        pooling: pooler, widths of the projection, normalisation.
        projection: tensors of its linear layers, (out, in) each.
        head: folders of the layers that lead to "scores", as our exports have them.
    """

    pooling: PoolingConfig
    projection: tuple[Slot, ...]
    head: tuple[epath.Path, ...]

    def projection_kernels(self) -> dict[str, np.ndarray]:
        """The projection's layers, (in, out) each, by their number."""
        return {
            str(number): np.asarray(read_block(slot), np.float32).T
            for number, slot in enumerate(self.projection)
        }

    def head_parameters(self) -> dict:
        """A head's parameters, nested as in `gemma_encoder.model.heads.Head`."""
        layers = []
        for place in self.head:
            slots = read_header(place / "model.safetensors")
            layers.append(
                {
                    "kernel": read_block(slots["linear.weight"]).T,
                    "bias": read_block(slots["linear.bias"]),
                }
            )
        hidden = {str(number): layer for number, layer in enumerate(layers[:-1])}
        return {**({"hidden": hidden} if hidden else {}), "out": layers[-1]}


def read_modules(folder: epath.Path) -> Modules | None:
    """The modules of a sentence-transformers folder; None without a `modules.json`. Raises InputError for one without a counterpart here."""
    listed = folder / "modules.json"
    if not listed.exists():
        return None
    name, layers, head, normalize = "", [], [], False
    for module in sorted(read_json(listed), key=lambda module: module["idx"]):
        kind, place = module["type"].rpartition(".")[2], folder / module["path"]
        if kind == "Transformer":
            continue
        if kind == "Normalize":
            normalize = True
            continue
        if kind not in ("Pooling", "Dense"):
            raise InputError(
                f"{listed}: a module of type {module['type']} is not read; expected Transformer, Pooling, Dense and Normalize"
            )
        settings = read_json(place / "config.json")
        if kind == "Pooling":
            name = next(
                (
                    ours
                    for ours, (mode, flag) in POOLING.items()
                    if settings.get("pooling_mode") == mode or settings.get(flag)
                ),
                "",
            )
            if not name or settings.get("include_prompt") is False:
                raise InputError(
                    f"{place / 'config.json'}: pooling other than mean, cls or lasttoken over the whole text is not read"
                )
        elif settings.get("module_output_name", "sentence_embedding") != "sentence_embedding":
            head.append(place)
        else:
            slots = read_header(place / "model.safetensors")
            if (
                settings.get("bias")
                or not settings.get("activation_function", "").endswith("Identity")
                or set(slots) != {"linear.weight"}
                or normalize
            ):
                raise InputError(
                    f"{place}: a Dense module with a bias or an activation, or after Normalize, is not read"
                )
            layers.append(slots["linear.weight"])
    if not name:
        raise InputError(f"{listed} names no Pooling module")
    return Modules(
        PoolingConfig(
            name, projection=tuple(slot.tensor.shape[0] for slot in layers), normalize=normalize
        ),
        tuple(layers),
        tuple(head),
    )
