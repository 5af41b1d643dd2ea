"""Reader of safetensors files and folders.

The format: eight bytes with the header's length, a JSON header, then the tensors one after the
other. Tensors are read by byte offset instead of mapped into memory, so that files larger than
memory and files in a bucket can be read too.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.inputs.json_text import from_json, read_object
from gemma_encoder.inputs.untrusted import check_is_regular, inside
from gemma_encoder.weights.tensors import Tensor

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
MAX_HEADER = 2 << 20  # bytes; ten times that of the largest Gemma
MAX_RANK = 8  # dimensions of a tensor
MAX_DIMENSION = 1 << 48
MAX_LISTED = 20  # missing tensors in a message
ALIGNMENT = 64  # bytes; a CPU device adopts aligned memory without a copy
ADVICE = "copy or download it again"


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
        InputError: the file is damaged or truncated. As the format demands, the tensors fill the
            file without gaps or overlaps.
    """
    with in_one_line(f"{file} is not a safetensors file, or it is damaged", ADVICE):
        check_is_regular(file)
        with file.open("rb") as stream:
            file_size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(file_size - 8, MAX_HEADER):
                raise ValueError(f"its header has {length} bytes")
            header = from_json(stream.read(length))
        header.pop("__metadata__", None)
        ranges = {name: _byte_range(entry) for name, entry in header.items()}
        _check_is_contiguous(file, ranges, file_size - 8 - length)
        return {
            name: Slot(file, 8 + length + ranges[name][0], _tensor(file, name, entry))
            for name, entry in header.items()
        }


def _byte_range(entry: dict[str, Any]) -> tuple[int, int]:
    first, last = entry["data_offsets"]
    if type(first) is not int or type(last) is not int or not 0 <= first <= last:
        raise ValueError(f"a tensor's bytes are {first!r:.30} to {last!r:.30}")
    return first, last


def _check_is_contiguous(
    file: epath.Path, ranges: Mapping[str, tuple[int, int]], num_bytes: int
) -> None:
    """Raises InputError unless the tensors fill the bytes after the header, each its own."""
    position = 0
    for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
        if last > num_bytes:
            raise InputError(
                f"{file} is truncated: {name} ends at byte {last}, the data at {num_bytes}; "
                f"{ADVICE}"
            )
        if first != position:
            kind = "overlaps another tensor" if first < position else "leaves a gap before it"
            raise InputError(f"{file} is damaged: {name} {kind}; {ADVICE}")
        position = last
    if position != num_bytes:
        raise InputError(
            f"{file} is damaged: {num_bytes - position} bytes belong to no tensor; {ADVICE}"
        )


def _tensor(file: epath.Path, name: str, entry: dict[str, Any]) -> Tensor:
    """Returns a tensor's shape and dtype, which its number of bytes must confirm."""
    shape = tuple(entry["shape"])
    if len(shape) > MAX_RANK or not all(
        type(size) is int and 0 <= size < MAX_DIMENSION for size in shape
    ):
        raise ValueError(f"{name} has no valid shape")
    tensor = Tensor(shape, DTYPES.get(entry["dtype"], np.dtype(object)))
    first, last = entry["data_offsets"]
    num_bytes = math.prod(shape) * tensor.dtype.itemsize
    if tensor.dtype != object and last - first != num_bytes:
        raise InputError(
            f"{file}: {name} has {last - first} bytes, expected {num_bytes} for its shape "
            f"{shape}; the file is damaged, {ADVICE}"
        )
    return tensor


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
    file_of = read_object(index, ADVICE).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise InputError(f"{index} has no weight_map; {ADVICE}")
    headers = {}
    for name in {str(name): name for name in file_of.values()}.values():
        file = inside(folder, name, index)
        if not file.exists():
            raise InputError(f"{index} names {name}, which is missing; {ADVICE}")
        headers[name] = read_header(file)
    missing = [
        f"{tensor} is not in {file}"
        for tensor, file in file_of.items()
        if tensor not in headers[file]
    ]
    if missing:
        raise InputError(f"{folder}: {'; '.join(missing[:MAX_LISTED])}; {ADVICE}")
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
                raise InputError(f"{slot.file} is truncated; {ADVICE}")
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
