"""The modules after the transformer in a sentence-transformers folder."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import read_json, read_object
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.untrusted import inside
from gemma_encoder.model.config import PoolingConfig
from gemma_encoder.weights.safetensors_reader import ADVICE, Slot, read_block, read_header

# Our poolers: the name in sentence-transformers 6, and the flag of earlier versions.
POOLING = {
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "first_k": ("cls", "pooling_mode_cls_token"),
    "last_k": ("lasttoken", "pooling_mode_lasttoken"),
}


# Modules of our exports of sparse retrievers.
SPARSE_MODULES = {"WordWeights", "SpladePooling"}

# Our exports: the last layer of a head before it was scaled to a task's units.
UNSCALED = "unscaled.safetensors"


class HeadLayer(NamedTuple):
    """Tensors of a layer of a head, as in `torch.nn.Linear`: (out, in) and (out,)."""

    weight: Slot
    bias: Slot


class Modules(NamedTuple):
    """The modules that `modules.json` lists after the transformer.

    Attributes:
        pooling: pooler, widths of the projection, normalization.
        projection: tensors of its linear layers, (out, in) each.
        head: the layers that compute "scores", as in our exports.
        is_sparse: weights of words instead of pooled states, as in our exports.
    """

    pooling: PoolingConfig
    projection: tuple[Slot, ...]
    head: tuple[HeadLayer, ...]
    is_sparse: bool = False

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All tensors."""
        return (*self.projection, *(slot for layer in self.head for slot in layer))

    def projection_kernels(self) -> dict[str, np.ndarray]:
        """Reads the projection's kernels, (in, out) each, by layer index."""
        return {
            str(layer): np.asarray(read_block(slot), np.float32).T
            for layer, slot in enumerate(self.projection)
        }

    def head_parameters(self) -> dict:
        """Reads a head's parameters, nested as in `gemma_encoder.model.heads.Head`."""
        layers = [
            {"kernel": read_block(layer.weight).T, "bias": read_block(layer.bias)}
            for layer in self.head
        ]
        hidden = {str(index): layer for index, layer in enumerate(layers[:-1])}
        return {**({"hidden": hidden} if hidden else {}), "out": layers[-1]}


def module_folders(folder: epath.Path) -> list[tuple[dict[str, Any], epath.Path]]:
    """Returns the entries of `modules.json`, in order, with their folders; none without the file.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / "modules.json"
    if not file.exists():
        return []
    entries = read_json(file, ADVICE)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{file} holds no list of modules; {ADVICE}")
    for entry in entries:
        for name, kind in (("idx", int), ("type", str), ("path", str)):
            if not isinstance(entry.get(name), kind):
                raise InputError(f"{file}: a module has no valid {name!r}; {ADVICE}")
    entries.sort(key=lambda entry: entry["idx"])
    return [(entry, inside(folder, entry["path"], file)) for entry in entries]


def read_modules(folder: epath.Path) -> Modules | None:
    """Reads the modules of a sentence-transformers folder; None without a `modules.json`.

    Raises:
        InputError: a module has no counterpart in this library, or a file is damaged.
    """
    modules_file = folder / "modules.json"
    if not modules_file.exists():
        return None
    pooler = ""
    projection: list[Slot] = []
    head: list[HeadLayer] = []
    normalize = False
    sparse: set[str] = set()
    for module, module_folder in module_folders(folder):
        kind = module["type"].rpartition(".")[2]
        if kind == "Transformer":
            continue
        if kind == "Normalize":
            normalize = True
        elif kind in SPARSE_MODULES:
            sparse.add(kind)
        elif kind == "Pooling":
            pooler = _read_pooler(module_folder / "config.json")
        elif kind == "Dense":
            settings = read_object(module_folder / "config.json", ADVICE)
            output = settings.get("module_output_name", "sentence_embedding")
            if output != "sentence_embedding":
                head.append(_read_head_layer(module_folder))
            else:
                projection.append(_read_projection(module_folder, settings, normalize))
        else:
            raise InputError(
                f"{modules_file}: unsupported module type {module['type']}; expected Transformer, "
                "Pooling, Dense and Normalize"
            )
    is_sparse = sparse == SPARSE_MODULES and not (pooler or projection or head or normalize)
    if sparse and not is_sparse:
        raise InputError(
            f"{modules_file}: unsupported sparse modules; expected WordWeights and SpladePooling "
            "after the transformer, as in our exports"
        )
    if not pooler and not is_sparse:
        raise InputError(f"{modules_file} has no Pooling module")
    widths = tuple(slot.tensor.shape[0] for slot in projection)
    pooling = PoolingConfig(pooler or "mean", projection=widths, normalize=normalize)
    return Modules(pooling, tuple(projection), tuple(head), is_sparse)


def _read_head_layer(folder: epath.Path) -> HeadLayer:
    """Returns the tensors of a layer of a head, those before scaling if they are stored."""
    unscaled = folder / UNSCALED
    file = unscaled if unscaled.exists() else folder / "model.safetensors"
    slots = _read_slots(file, {"linear.weight": 2, "linear.bias": 1})
    return HeadLayer(slots["linear.weight"], slots["linear.bias"])


def _read_slots(file: epath.Path, ranks: Mapping[str, int]) -> dict[str, Slot]:
    """Reads the header of a module's tensors; raises InputError unless it has exactly these.

    Args:
        file: the safetensors file.
        ranks: the tensors' numbers of dimensions, by name.
    """
    slots = read_header(file)
    actual = {name: len(slot.tensor.shape) for name, slot in slots.items()}
    if actual != dict(ranks) or any(slot.tensor.dtype == object for slot in slots.values()):
        raise InputError(
            f"{file}: unsupported tensors; expected {' and '.join(ranks)}, a matrix and a vector, "
            "in float32, float16 or bfloat16"
        )
    return slots


def _read_pooler(config: epath.Path) -> str:
    """Returns our name of the pooler that a Pooling module's config describes."""
    settings = read_object(config, ADVICE)
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
    if (
        settings.get("bias")
        or not str(settings.get("activation_function", "")).endswith("Identity")
        or normalized
    ):
        raise InputError(
            f"{folder}: unsupported Dense module; expected no bias, no activation and no Normalize "
            "before it"
        )
    return _read_slots(folder / "model.safetensors", {"linear.weight": 2})["linear.weight"]


class Prompts(NamedTuple):
    """Prompts of config_sentence_transformers.json.

    Attributes:
        by_name: texts to put before others.
        default: name of the prompt for texts without another; "" for none.
        similarity: how vectors are to be compared; "" if the folder does not say.
    """

    by_name: Mapping[str, str]
    default: str
    similarity: str = ""


def read_prompts(folder: epath.Path) -> Prompts:
    """Reads the prompts of a folder and the similarity of its vectors.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / "config_sentence_transformers.json"
    if not file.exists():
        return Prompts({}, "")
    values = read_object(file, ADVICE)
    prompts = values.get("prompts") or {}
    default = values.get("default_prompt_name") or ""
    are_texts = isinstance(prompts, dict) and all(
        isinstance(text, str) for pair in prompts.items() for text in pair
    )
    if not are_texts or (default and default not in prompts):
        raise InputError(
            f"{file}: prompts must be texts by name, the default one of them; {ADVICE}"
        )
    similarity = values.get("similarity_fn_name") or ""
    if not isinstance(similarity, str):
        raise InputError(f"{file}: similarity_fn_name must be a text; {ADVICE}")
    return Prompts(prompts, default, similarity)


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
