"""Blocks of an index: safetensors files of some thousand documents each, written whole.

    INDEX/blocks/000000.safetensors    dense: vectors [N, W], of int8 also scales [N];
                                       sparse: the transposed matrix as starts [V + 1],
                                       documents and weights, see `retrieval.sparse`

A block holds the CRC-32C of its arrays, so that a start that continues knows which blocks are whole
without the digests of the folder, which are written at the end.
"""

import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from gemma_encoder.digests import extend_crc
from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.whole_files import write_whole

FOLDER = "blocks"
CHECK = "crc32c"

Arrays = Mapping[str, np.ndarray]


def block_path(folder: pathlib.Path, block: int) -> pathlib.Path:
    """Returns the file of a block."""
    return folder / FOLDER / f"{block:06d}.safetensors"


def write_block(folder: pathlib.Path, block: int, arrays: Arrays) -> None:
    """Writes a block atomically."""
    content = safetensors.numpy.save(dict(arrays), metadata={CHECK: _check(arrays)})
    write_whole(block_path(folder, block), content)


def load_block(folder: pathlib.Path, block: int) -> dict[str, np.ndarray]:
    """Reads the arrays of a block.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = block_path(folder, block)
    with in_one_line(f"{path} cannot be read", "copy the index again, or index anew"):
        return _read(path)[0]


def holds_block(folder: pathlib.Path, block: int) -> bool:
    """Returns True if a block is there and whole."""
    path = block_path(folder, block)
    if not path.is_file():
        return False
    try:
        arrays, check = _read(path)
    except Exception:  # damaged in any way: it is made anew
        return False
    return check == _check(arrays)


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    with safetensors.safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return arrays, (file.metadata() or {}).get(CHECK, "")


def _check(arrays: Arrays) -> str:
    crc = 0
    for name in sorted(arrays):
        crc = extend_crc(crc, f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        crc = extend_crc(crc, np.ascontiguousarray(arrays[name]).tobytes())
    return f"{crc:08x}"


def array_of(
    arrays: Arrays, name: str, shape: tuple[int, ...], dtype: type, path: pathlib.Path
) -> np.ndarray:
    """Returns an array of a block.

    Raises:
        InputError: it is missing, or has another shape or dtype: the file is of another index.
    """
    array = arrays.get(name)
    if array is None or array.shape != shape or array.dtype != dtype:
        actual = "none" if array is None else f"{array.dtype} of shape {list(array.shape)}"
        raise InputError(
            f"{path} should hold {name} as {np.dtype(dtype)} of shape {list(shape)}, and holds "
            f"{actual}; copy the index again, or index anew"
        )
    return array
