"""The modules after the transformer that an export for sentence-transformers has."""

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.inputs.task import Task
from gemma_encoder.model.config import EncoderConfig, HeadConfig
from gemma_encoder.weights.sentence_modules import POOLING, UNSCALED, output_scale, scaled_layer

PACKAGE = "sentence_transformers.models"
VECTORS = "embedding"  # the kind of head whose scores are the pooled states: it needs no module


class Module(NamedTuple):
    """A module after the transformer.

    Attributes:
        kind: name of its class.
        settings: its config.
        weights: its tensors.
        unscaled: for a head's last layer whose scores are scaled, the tensors that are not.
        package: package of its class.
    """

    kind: str
    settings: dict[str, Any]
    weights: Mapping[str, np.ndarray] = types.MappingProxyType({})
    unscaled: Mapping[str, np.ndarray] = types.MappingProxyType({})
    package: str = PACKAGE


def modules_of(encoder: EncoderConfig, parameters: dict, tasks: Sequence[Task]) -> Iterator[Module]:
    """Yields the modules after the transformer: pooling, projection, normalization, head."""
    _check_modules(encoder)
    pooling = encoder.pooling
    width = encoder.transformer.embed_dim
    flags = {flag: name == pooling.name for name, (_, flag) in POOLING.items()}
    yield Module("Pooling", {"word_embedding_dimension": width, **flags, "include_prompt": True})
    for layer, out_width in enumerate(pooling.projection):
        kernel = parameters["pooler"]["projection"][str(layer)]
        settings = _dense_config(width, out_width, bias=False)
        yield Module("Dense", settings, {"linear.weight": _transposed(kernel)})
        width = out_width
    if pooling.normalize:
        yield Module("Normalize", {})
    for name, head in encoder.heads.items():
        if head.kind == VECTORS:
            continue
        scale = output_scale(name, [task for task in tasks if task.head == name])
        yield from _head_modules(parameters["heads"][name], width, head, scale)


def _check_modules(encoder: EncoderConfig) -> None:
    """Raises InputError for poolers and heads that sentence-transformers cannot represent."""
    pooling = encoder.pooling
    if pooling.name not in POOLING:
        raise InputError(
            f"cannot be exported: sentence-transformers has no pooler like {pooling.name!r}; "
            f"expected one of {', '.join(POOLING)}"
        )
    if pooling.name != "mean" and pooling.k != 1:
        raise InputError(
            f"cannot be exported: sentence-transformers' {pooling.name} pooling takes one state, "
            f"not {pooling.k}"
        )
    heads = {name: head for name, head in encoder.heads.items() if head.kind != VECTORS}
    if len(heads) > 1:
        raise InputError(
            f"cannot be exported: the format has one head, the encoder {len(heads)} "
            f"({', '.join(heads)}); heads=False leaves them out"
        )
    for name, head in heads.items():
        if head.kind != "mlp":
            raise InputError(
                f"cannot be exported: sentence-transformers has no module for the head {name!r} of "
                f"kind {head.kind}; heads=False leaves it out"
            )


def _head_modules(
    parameters: dict, width: int, head: HeadConfig, scale: tuple[float, float]
) -> Iterator[Module]:
    """Yields a Dense module for each layer of an MLP head; the last one outputs "scores".

    Args:
        parameters: parameters of the head.
        width: width of its input.
        head: config of the head.
        scale: (factor, offset) of the scores, folded into the last layer.
    """
    hidden = [parameters["hidden"][str(layer)] for layer in range(len(head.hidden_dims))]
    layers = [*hidden, parameters["out"]]
    source = "sentence_embedding"
    for index, layer in enumerate(layers):
        is_last = index == len(layers) - 1
        target = "scores" if is_last else f"head_{index}"
        activation = "linear.Identity" if is_last else "activation.GELU"
        out_width = layer["bias"].shape[0]
        settings = _dense_config(width, out_width, bias=True, activation=activation)
        settings |= {"module_input_name": source, "module_output_name": target}
        weights = {
            "linear.weight": _transposed(layer["kernel"]),
            "linear.bias": np.asarray(layer["bias"]),
        }
        unscaled = {}
        if is_last and scale != (1, 0):
            unscaled, weights = weights, scaled_layer(weights, *scale)
        yield Module("Dense", settings, weights, unscaled)
        source = target
        width = out_width


def _dense_config(
    in_width: int, out_width: int, *, bias: bool, activation: str = "linear.Identity"
) -> dict[str, Any]:
    return {
        "in_features": in_width,
        "out_features": out_width,
        "bias": bias,
        "activation_function": f"torch.nn.modules.{activation}",
    }


def _transposed(kernel) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(kernel, np.float32).T)


def write_modules(folder: epath.Path, modules: Sequence[Module]) -> None:
    """Writes a folder for each module after the transformer, and `modules.json`."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": f"{PACKAGE}.Transformer"}]
    for index, module in enumerate(modules, 1):
        path = f"{index}_{module.kind}"
        kind = f"{module.package}.{module.kind}"
        entries.append({"idx": index, "name": str(index), "path": path, "type": kind})
        (folder / path).mkdir()
        (folder / path / "config.json").write_bytes(json_bytes(module.settings))
        for name, weights in (("model.safetensors", module.weights), (UNSCALED, module.unscaled)):
            if weights:
                (folder / path / name).write_bytes(safetensors.numpy.save(dict(weights)))
    (folder / "modules.json").write_bytes(json_bytes(entries))


def json_bytes(value: Any) -> bytes:
    """Returns a value as the JSON of an export's files."""
    return to_json(value, indent=1).encode()
