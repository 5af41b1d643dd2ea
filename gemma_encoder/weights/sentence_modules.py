"""The modules after the transformer in a sentence-transformers folder."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.model.config import PoolingConfig
from gemma_encoder.weights.safetensors_reader import Slot, read_block, read_header, read_json

# Our poolers: the name in sentence-transformers 6, and the flag of earlier versions.
POOLING = {
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "first_k": ("cls", "pooling_mode_cls_token"),
    "last_k": ("lasttoken", "pooling_mode_lasttoken"),
}


# Our exports: the last layer of a head before it was scaled to a task's units.
UNSCALED = "unscaled.safetensors"


class Modules(NamedTuple):
    """The modules that `modules.json` lists after the transformer.

    Attributes:
        pooling: pooler, widths of the projection, normalization.
        projection: tensors of its linear layers, (out, in) each.
        head: folders of the layers that compute "scores", as in our exports.
    """

    pooling: PoolingConfig
    projection: tuple[Slot, ...]
    head: tuple[epath.Path, ...]

    def projection_kernels(self) -> dict[str, np.ndarray]:
        """Reads the projection's kernels, (in, out) each, by layer index."""
        return {
            str(layer): np.asarray(read_block(slot), np.float32).T
            for layer, slot in enumerate(self.projection)
        }

    def head_parameters(self) -> dict:
        """Reads a head's parameters, nested as in `gemma_encoder.model.heads.Head`."""
        layers = []
        for folder in self.head:
            unscaled = folder / UNSCALED
            file = unscaled if unscaled.exists() else folder / "model.safetensors"
            slots = read_header(file)
            layers.append(
                {
                    "kernel": read_block(slots["linear.weight"]).T,
                    "bias": read_block(slots["linear.bias"]),
                }
            )
        hidden = {str(index): layer for index, layer in enumerate(layers[:-1])}
        return {**({"hidden": hidden} if hidden else {}), "out": layers[-1]}


def read_modules(folder: epath.Path) -> Modules | None:
    """Reads the modules of a sentence-transformers folder; None without a `modules.json`.

    Raises:
        InputError: a module has no counterpart in this library.
    """
    modules_file = folder / "modules.json"
    if not modules_file.exists():
        return None
    pooler = ""
    projection: list[Slot] = []
    head: list[epath.Path] = []
    normalize = False
    for module in sorted(read_json(modules_file), key=lambda module: module["idx"]):
        kind = module["type"].rpartition(".")[2]
        module_folder = folder / module["path"]
        if kind == "Transformer":
            continue
        if kind == "Normalize":
            normalize = True
        elif kind == "Pooling":
            pooler = _read_pooler(module_folder / "config.json")
        elif kind == "Dense":
            settings = read_json(module_folder / "config.json")
            output = settings.get("module_output_name", "sentence_embedding")
            if output != "sentence_embedding":
                head.append(module_folder)
            else:
                projection.append(_read_projection(module_folder, settings, normalize))
        else:
            raise InputError(
                f"{modules_file}: unsupported module type {module['type']}; expected Transformer, "
                "Pooling, Dense and Normalize"
            )
    if not pooler:
        raise InputError(f"{modules_file} has no Pooling module")
    widths = tuple(slot.tensor.shape[0] for slot in projection)
    pooling = PoolingConfig(pooler, projection=widths, normalize=normalize)
    return Modules(pooling, tuple(projection), tuple(head))


def _read_pooler(config: epath.Path) -> str:
    """Returns our name of the pooler that a Pooling module's config describes."""
    settings = read_json(config)
    matching = [
        name
        for name, (mode, flag) in POOLING.items()
        if settings.get("pooling_mode") == mode or settings.get(flag)
    ]
    if not matching or settings.get("include_prompt") is False:
        raise InputError(
            f"{config}: unsupported pooling; expected mean, cls or lasttoken over the whole text, "
            "prompt included"
        )
    return matching[0]


def _read_projection(folder: epath.Path, settings: dict[str, Any], normalized: bool) -> Slot:
    """Returns the weight of a Dense module that projects the embedding.

    Args:
        folder: folder of the module.
        settings: config of the module.
        normalized: whether a Normalize module came before it.
    """
    slots = read_header(folder / "model.safetensors")
    if (
        settings.get("bias")
        or not settings.get("activation_function", "").endswith("Identity")
        or set(slots) != {"linear.weight"}
        or normalized
    ):
        raise InputError(
            f"{folder}: unsupported Dense module; expected no bias, no activation and no Normalize "
            "before it"
        )
    return slots["linear.weight"]


def output_scale(head: str, tasks: Sequence[Task]) -> tuple[float, float]:
    """Returns the (factor, offset) of a head's scores; raises InputError if its tasks differ.

    Tasks without a calibration share the temperature of those that have one.
    """
    decisive = [
        task for task in tasks if task.calibration.is_fitted or not task.kind.has_temperature
    ]
    tasks = decisive or tasks
    scales = {task.kind.output_scale(task): task.name for task in tasks}
    if len(scales) > 1:
        raise InputError(
            f"cannot be exported: the tasks {' and '.join(scales.values())} share the head {head!r}"
            ", but their predictions have different scales; heads=False leaves it out"
        )
    return next(iter(scales), (1.0, 0.0))


def scaled_layer(
    weights: Mapping[str, np.ndarray], factor: float, offset: float
) -> dict[str, np.ndarray]:
    """Returns a linear layer whose outputs are `factor` times those of `weights` plus `offset`."""
    weight, bias = (weights[f"linear.{name}"].astype(np.float64) for name in ("weight", "bias"))
    return {
        "linear.weight": (factor * weight).astype(np.float32),
        "linear.bias": (factor * bias + offset).astype(np.float32),
    }
