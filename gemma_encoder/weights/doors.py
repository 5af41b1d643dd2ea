"""Doors: where folders that strangers may have written or damaged are opened."""

import contextlib
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from gemma_encoder import digests
from gemma_encoder.digests import DamagedFileError
from gemma_encoder.inputs.errors import InputError, file_of, in_one_line
from gemma_encoder.inputs.untrusted import MAX_BYTES, check_is_regular
from gemma_encoder.model.config import MAX_TOKENS, EncoderConfig, TransformerConfig
from gemma_encoder.weights.tensors import Tensor
from gemma_encoder.whole_files import is_remote

ADVICE = "copy, download or export it again"
MAX_LAYERS = 1024  # the largest Gemma has 62
MAX_PATTERN = 128  # layers before the pattern repeats; Gemma 3 has 6
TENSORS_PER_LAYER = 9  # at least, in every format
MAX_COMPRESSION = 100  # of Orbax's arrays, which may be compressed; that of weights is below 3
ALWAYS_READ = 64 << 20  # bytes that are read even if the files are smaller by more than that
# Metadata of Orbax, and of the formats in which it stores arrays.
READ_WHOLE = {
    *("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "manifest.ocdbt"),
    *("zarr.json", ".zarray", ".zattrs"),
}


@contextlib.contextmanager
def opened(folder: epath.Path, parts: Iterable[str]) -> Iterator[None]:
    """Guards the reading of a folder: checks digests, and words any error in one line.

    Args:
        folder: the folder, which may have no digests.
        parts: the files and subfolders that are read; "" for all.

    Raises:
        InputError: a file is damaged or missing, or the context failed.
    """
    try:
        with digests.verified(folder, list(parts)):
            yield
    except DamagedFileError as error:
        advice = f"{ADVICE}; if you changed it on purpose, delete {digests.NAME}"
        raise InputError(f"{error}; {advice}") from error
    except InputError:
        raise
    except Exception as error:
        with in_one_line(f"{file_of(error, folder)} cannot be read", ADVICE):
            raise


@contextlib.contextmanager
def explained(folder: epath.Path, parts: Iterable[str]) -> Iterator[None]:
    """Replaces an error of the context by the one that names a damaged file, if there is one.

    Large files are read for it, unlike in `opened`, only after an error.
    """
    try:
        yield
    except Exception:
        with opened(folder, parts):
            pass
        raise


def check_files(folder: epath.Path) -> None:
    """Raises InputError if a local folder holds files that Orbax would read without an end.

    These are pipes and devices, and metadata that are too large: it reads metadata as a whole.
    """
    if is_remote(folder):
        return
    for path in pathlib.Path(folder).rglob("*"):
        is_metadata = path.name in READ_WHOLE or path.parent.name == "array_metadatas"
        with in_one_line(f"{path} cannot be read", ADVICE):
            check_is_regular(path)
            if is_metadata and path.is_file() and path.stat().st_size > MAX_BYTES:
                raise InputError(f"{path} has more than {MAX_BYTES >> 20} MB; {ADVICE}")


def check_layers(layers: int, where: object) -> None:
    """Raises InputError for a number of layers that no Gemma has."""
    if layers > MAX_LAYERS:
        raise InputError(
            f"{where}: it declares more than {MAX_LAYERS} layers; it is damaged, {ADVICE}"
        )


def check_sizes(
    config: TransformerConfig | EncoderConfig, shapes: Iterable[tuple[int, ...]], where: object
) -> None:
    """Checks declared sizes before anything of these sizes is computed or allocated.

    No axis may be larger than the largest stored tensor, and there may be no more layers than
    tensors.

    Args:
        config: the declared transformer or encoder.
        shapes: shapes of the stored tensors.
        where: names the checkpoint in the message.

    Raises:
        InputError: the files cannot hold such a model.
    """
    sizes = [math.prod(shape) for shape in shapes]
    largest = max(sizes, default=0)
    transformer = config.transformer if isinstance(config, EncoderConfig) else config
    check_layers(transformer.num_layers, where)
    period = len(transformer.pattern)
    distinct = min(period, transformer.num_layers) + transformer.num_layers % period
    limits = {
        "the length of pattern": (period, MAX_PATTERN),
        "the number of distinct layers": (distinct, len(sizes) // TENSORS_PER_LAYER),
    }
    for name in ("vocab_size", "embed_dim", "hidden_dim", "num_heads", "num_kv_heads", "head_dim"):
        limits[name] = (getattr(transformer, name), largest)
    if isinstance(config, EncoderConfig):
        limits |= _encoder_limits(config, largest, len(sizes))
    for name, (size, limit) in limits.items():
        if size > limit:
            # Of integers with thousands of digits, Python refuses to print the decimal digits.
            declared = size if size < 10**18 else "more than 10^18"
            raise InputError(
                f"{where}: {name} is {declared}, but its files can hold at most {limit}; it is "
                f"damaged, {ADVICE}"
            )


def check_bytes(folder: epath.Path, tensors: Iterable[Tensor], where: object) -> None:
    """Checks that a local folder's files can hold the tensors that their metadata declare.

    Arrays without data, or of zeros that are compressed, could fill the memory otherwise.
    """
    if is_remote(folder):
        return
    declared = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
    files = pathlib.Path(folder).rglob("*")
    held = sum(path.stat().st_size for path in files if path.is_file())
    if declared > max(MAX_COMPRESSION * held, ALWAYS_READ):
        raise InputError(
            f"{where}: its tensors have {declared:.3g} bytes, but its files only {held:.3g}; it is "
            f"damaged, {ADVICE}"
        )


def check_stored(expected: Mapping[str, Any], stored: Mapping[str, Any], where: object) -> None:
    """Checks that a checkpoint holds parameters of the declared shapes before they are read.

    Args:
        expected: objects with a shape, by path.
        stored: the same of the checkpoint, which may hold more.
        where: names the checkpoint in the message.

    Raises:
        InputError: a parameter is missing or has another shape.
    """
    for path, leaf in expected.items():
        actual = tuple(stored[path].shape) if path in stored else None
        if actual != tuple(leaf.shape):
            problem = "is missing" if actual is None else f"has shape {actual}"
            raise InputError(
                f"{where}: the parameter {path} {problem}, the description declares "
                f"{tuple(leaf.shape)}; it is damaged, {ADVICE}"
            )


def check_float32(encoder: EncoderConfig, where: object) -> None:
    """Raises InputError if an encoder has weights for inference only.

    Args:
        encoder: config of the encoder.
        where: names the checkpoint or the model in the message.
    """
    if encoder.weights != "float32":
        raise InputError(
            f"{where} holds {encoder.weights} weights, with which a model can only predict and "
            "embed; load the float32 checkpoint that they were made from"
        )


def check_lengths(max_length: int, row_length: int) -> None:
    """Raises InputError for lengths of texts and rows, in tokens, that cannot be meant."""
    if not 3 <= max_length <= row_length <= MAX_TOKENS:
        raise InputError(
            f"max_length and row_length are {max_length:.6g} and {row_length:.6g}; expected texts "
            f"of at least 3 tokens in rows that hold them, of at most {MAX_TOKENS}; it is damaged"
        )


def _encoder_limits(
    config: EncoderConfig, largest: int, num_tensors: int
) -> dict[str, tuple[int, int]]:
    """Returns the declared sizes outside the transformer with their limits, by name."""
    pooling = config.pooling
    layers = list(pooling.projection)
    for head in config.heads.values():
        layers += [*head.hidden_dims, head.outputs]
    return {
        "the number of heads": (len(config.heads), num_tensors),
        "the number of layers in heads and projection": (len(layers), num_tensors),
        "a width of a head or projection": (max(layers, default=1), largest),
        "pooling.probes": (pooling.probes, largest),
        "pooling.k": (pooling.k, MAX_TOKENS),
        "pooling.heads": (pooling.heads, largest),
        "lora.rank": (config.lora.rank, largest),
    }
