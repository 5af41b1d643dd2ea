"""The precision in which an encoder is loaded for inference, and int8 checkpoints.

A float32 parameter is converted as soon as it is restored, so that a float32 model is never in
memory beside the converted one.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import sharding
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.model.encoder import abstract_encoder, parameter_paths
from gemma_encoder.model.processor import resolve_compute_dtype
from gemma_encoder.model.quantization import converted, shared_axes
from gemma_encoder.weights import doors, native
from gemma_encoder.weights.checkpoint_folders import absolute, reading
from gemma_encoder.weights.native import InferenceSpec
from gemma_encoder.weights.new_folders import check_is_new, new_folder, save_arrays
from gemma_encoder.whole_files import write_whole


def with_precision(
    stored: EncoderConfig,
    mesh: Mesh,
    *,
    quantization: str | None = None,
    weights: str | None = None,
    compute_dtype: str | None = None,
) -> EncoderConfig:
    """Returns the config with which a stored encoder is loaded.

    Args:
        stored: the checkpoint's encoder.
        mesh: the mesh on which it computes.
        quantization: "int8" or "none"; by default as in training.
        weights: "float32", "bfloat16" or "int8"; by default int8 for int8 products, else as stored.
        compute_dtype: dtype of activations, "bfloat16", "float32" or "auto", the faster one on the
            mesh; by default as in training.

    Raises:
        InputError: they contradict each other or the checkpoint, or are unknown.
    """
    quantization = quantization or stored.quantization
    default = "int8" if quantization == "int8" else stored.weights
    if stored.weights == "int8" and (quantization, weights or default) != ("int8", "int8"):
        raise InputError(
            "the checkpoint holds int8 weights, which cannot be restored to float32 or bfloat16; "
            "load the checkpoint that it was made from, or use quantization='int8'"
        )
    platform = mesh.devices.flat[0].platform
    return dataclasses.replace(
        stored,
        quantization=quantization,
        weights=weights or default,
        compute_dtype=resolve_compute_dtype(compute_dtype or stored.compute_dtype, platform),
    )


def load_in_precision(
    checkpoint: epath.Path, stored: EncoderConfig, target: EncoderConfig, mesh: Mesh
) -> dict:
    """Restores the parameters of a checkpoint in the precision of `target`.

    Args:
        checkpoint: folder returned by `native.find`.
        stored: the checkpoint's encoder.
        target: as returned by `with_precision`.
        mesh: the mesh over which parameters are sharded.
    """
    shapes = abstract_encoder(stored).shapes
    shardings = sharding.parameter_shardings(shapes, mesh)
    if stored.weights == target.weights:
        parameters = native.load_parameters(checkpoint, stored, shardings)
        _check_dtypes(parameters, shapes, checkpoint)
        return parameters
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of)
        for (path, leaf), of in zip(
            parameter_paths(shapes).items(), jax.tree.leaves(shardings), strict=True
        )
    }
    loaded = {}
    with reading(checkpoint, native.PARAMETER_FILES, "share"):
        for group in _groups(abstract):
            restored = native.restore_part(checkpoint, group)
            loaded |= _converted(parameter_paths(restored), target)
    return _in_order(loaded, target, mesh)


def _groups(abstract: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[dict]:
    """Yields the parameters to restore together: each that is converted alone, largest first."""
    matrices = {path for path in abstract if shared_axes(path)}
    for path in sorted(matrices, key=lambda path: -np.prod(abstract[path].shape)):
        yield {path: abstract[path]}
    yield {path: leaf for path, leaf in abstract.items() if path not in matrices}


def convert_parameters(parameters: dict, target: EncoderConfig, mesh: Mesh) -> dict:
    """Converts float32 parameters, which are deleted; see `load_in_precision`."""
    return _in_order(_converted(parameter_paths(parameters), target), target, mesh)


def _converted(leaves: Mapping[str, jax.Array], target: EncoderConfig) -> dict[str, jax.Array]:
    result = {}
    for path, leaf in leaves.items():
        axes = shared_axes(path)
        if not axes:
            result[path] = leaf
            continue
        parts = jax.block_until_ready(_converter(axes, target.weights)(leaf))
        result |= {f"{path}{suffix}": part for suffix, part in parts.items()}
        leaf.delete()
    return result


@functools.cache
def _converter(axes: tuple[int, ...], weights: str):
    return jax.jit(functools.partial(converted, axes=axes, weights=weights))


def _in_order(leaves: Mapping[str, jax.Array], target: EncoderConfig, mesh: Mesh) -> dict:
    """Returns the parameters as a nested dict like the encoder's, sharded on the mesh."""
    shapes = abstract_encoder(target).shapes
    shardings: dict[str, NamedSharding] = parameter_paths(
        sharding.parameter_shardings(shapes, mesh)
    )
    ordered = [jax.device_put(leaves[path], of) for path, of in shardings.items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), ordered)


def _check_dtypes(parameters: dict, shapes: dict, where: epath.Path) -> None:
    """Raises InputError if int8 parameters are of another dtype than declared."""
    stored = parameter_paths(parameters)
    for path, leaf in parameter_paths(shapes).items():
        is_integer = np.issubdtype(leaf.dtype, np.integer)
        if is_integer and stored[path].dtype != leaf.dtype:
            raise InputError(
                f"{where}: the parameter {path} is {stored[path].dtype}, the description declares "
                f"{leaf.dtype}; it is damaged, {doors.ADVICE}"
            )


def save_for_inference(spec: InferenceSpec, parameters: dict, folder: epath.PathLike) -> epath.Path:
    """Writes a checkpoint without the state that only resuming needs, in its precision.

    Args:
        spec: the inference spec.
        parameters: nested dict of the encoder's parameters.
        folder: a new folder, local or `gs://`.

    Returns:
        The folder, from which `Predictor.load` and `gemma-encoder predict` load.

    Raises:
        InputError: the folder is not empty, or cannot be written.
    """
    folder = absolute(folder)
    check_is_new(folder, "the checkpoint", may_be_empty=True)
    with new_folder(folder) as unfinished:
        save_arrays(parameters, unfinished / "parameters", folder)
        (unfinished / "inference").mkdir()
        for name, content in spec.files().items():
            write_whole(unfinished / "inference" / name, content)
    return folder
