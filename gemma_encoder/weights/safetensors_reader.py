"""Reader of safetensors files and folders.

The format: eight bytes with the header's length, a JSON header, then the tensors one after the
other. Tensors are read by byte offset instead of mapped into memory, so that files larger than
memory and files in a bucket can be read too.
"""

import json
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.weights.tensors import Tensor

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
MAX_HEADER = 1 << 30  # bytes; a larger length means that this is another kind of file
ALIGNMENT = 64  # bytes; a CPU device adopts aligned memory without a copy


class Slot(NamedTuple):
    """Location of a tensor: the file, the byte offset in it, and the tensor's shape and dtype.

    The dtype is `object` for a dtype that is not supported.
    """

    file: epath.Path
    offset: int
    tensor: Tensor


def read_header(file: epath.Path) -> dict[str, Slot]:
    """Reads the locations of all tensors in a safetensors file, by name.

    Raises:
        InputError: the file is damaged or truncated.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if 0 < length < MAX_HEADER else None
            file_size = stream.seek(0, 2)
        return {
            name: _slot(file, name, entry, 8 + length, file_size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is not a safetensors file, or it is damaged ({type(error).__name__})"
        ) from error


def _slot(
    file: epath.Path, name: str, entry: dict[str, Any], data_start: int, file_size: int
) -> Slot:
    """Checks one entry of a header and returns the tensor's location."""
    first, last = entry["data_offsets"]
    tensor = Tensor(tuple(entry["shape"]), DTYPES.get(entry["dtype"], np.dtype(object)))
    if data_start + last > file_size:
        raise InputError(
            f"{file} is truncated: {name} ends at byte {data_start + last}, the file at "
            f"{file_size}; copy or download it again"
        )
    num_bytes = math.prod(tensor.shape) * tensor.dtype.itemsize
    if tensor.dtype != object and last - first != num_bytes:
        raise InputError(
            f"{file}: {name} has {last - first} bytes, expected {num_bytes} for its shape "
            f"{tensor.shape}; the file is damaged"
        )
    return Slot(file, data_start + first, tensor)


def read_json(file: epath.Path) -> dict:
    """Reads a JSON object; raises InputError if the file cannot be read or parsed."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__})") from error


def read_folder(folder: epath.Path) -> dict[str, Slot]:
    """Reads the locations of all tensors in `model.safetensors` or the files of its index.

    Raises:
        InputError: a file or a tensor is missing, or a file is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _read_index(folder, index)
    if not (folder / "model.safetensors").exists():
        raise InputError(
            f"{folder} has neither model.safetensors nor {index.name}; other formats (.bin, .gguf) "
            "are not supported"
        )
    return read_header(folder / "model.safetensors")


def _read_index(folder: epath.Path, index: epath.Path) -> dict[str, Slot]:
    file_of = read_json(index)["weight_map"]
    headers = {}
    for name in sorted(set(file_of.values())):
        if not (folder / name).exists():
            raise InputError(
                f"{folder}: {index.name} names {name}, which is missing; copy or download it again"
            )
        headers[name] = read_header(folder / name)
    missing = [
        f"{tensor} is not in {file}"
        for tensor, file in file_of.items()
        if tensor not in headers[file]
    ]
    if missing:
        raise InputError(f"{folder}: {'; '.join(missing)}")
    return {tensor: headers[file][tensor] for tensor, file in file_of.items()}


def read_block(slot: Slot, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Reads a block of a tensor into aligned memory.

    Rows that the block does not touch are not read; of a touched row all columns are.

    Args:
        slot: the tensor.
        index: slices along its axes; by default the whole tensor.

    Raises:
        InputError: the file ends before the block does.
    """
    num_rows, *row_shape = slot.tensor.shape
    dtype = slot.tensor.dtype
    first, last, _ = index[0].indices(num_rows) if index else (0, num_rows, 1)
    row_bytes = math.prod(row_shape) * dtype.itemsize
    block = _aligned_bytes((last - first) * row_bytes)
    with slot.file.open("rb") as stream:
        stream.seek(slot.offset + first * row_bytes)
        view = memoryview(block)
        while view:
            num_read = _read_into(stream, view)
            if not num_read:
                raise InputError(f"{slot.file} is truncated; copy or download it again")
            view = view[num_read:]
    return block.view(dtype).reshape(last - first, *row_shape)[(slice(None), *index[1:])]


def _aligned_bytes(size: int) -> np.ndarray:
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def _read_into(stream: Any, view: memoryview) -> int:
    """Reads bytes into a buffer and returns how many; remote files may lack `readinto`."""
    num_read = stream.readinto(view) if hasattr(stream, "readinto") else None
    if num_read is None:
        content = stream.read(len(view))
        num_read = len(content)
        view[:num_read] = content
    return num_read
