"""Reads safetensors files and folders.

The format: eight bytes with the header's length, a JSON header, then the tensors one after the
other. It is read by offset, not mapped into memory, so that a file larger than the memory, or one
in a bucket, is read as well.
"""

import json
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.weights.tensors import Tensor

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}


class Slot(NamedTuple):
    """Where a tensor lies in its file."""

    file: epath.Path
    offset: int
    tensor: Tensor


def read_header(file: epath.Path) -> dict[str, Slot]:
    """The tensors of a safetensors file; raises InputError where it is damaged or cut short."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if 0 < length < 1 << 30 else None
            end = stream.seek(0, 2)
        slots = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            tensor = Tensor(tuple(entry["shape"]), DTYPES.get(entry["dtype"], np.dtype(object)))
            if 8 + length + last > end:
                raise InputError(
                    f"{file} is cut short: {name} ends at byte {8 + length + last}, the file at {end}; copy or download it again"
                )
            if (
                tensor.dtype != object
                and last - first != math.prod(tensor.shape) * tensor.dtype.itemsize
            ):
                raise InputError(
                    f"{file}: {name} takes {last - first} bytes, which its shape {tensor.shape} does not; the file is damaged"
                )
            slots[name] = Slot(file, 8 + length + first, tensor)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is no safetensors file, or it is damaged ({type(error).__name__})"
        ) from error
    return slots


def read_json(file: epath.Path) -> dict:
    """A JSON file's object; raises InputError where it cannot be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__})") from error


def read_folder(folder: epath.Path) -> dict[str, Slot]:
    """The tensors of `model.safetensors`, or of the files that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted = read_json(index)["weight_map"]
        headers = {}
        for name in sorted(set(wanted.values())):
            if not (folder / name).exists():
                raise InputError(
                    f"{folder}: {index.name} names {name}, which is missing; copy or download it again"
                )
            headers[name] = read_header(folder / name)
        lost = [
            f"{tensor} is not in {file}"
            for tensor, file in wanted.items()
            if tensor not in headers[file]
        ]
        if lost:
            raise InputError(f"{folder}: {'; '.join(lost)}")
        return {tensor: headers[file][tensor] for tensor, file in wanted.items()}
    if not (folder / "model.safetensors").exists():
        raise InputError(
            f"{folder} holds no model.safetensors and no {index.name}; other formats (.bin, .gguf) are not read"
        )
    return read_header(folder / "model.safetensors")


def read_block(slot: Slot, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A block of a tensor: whole rows are read, in memory aligned so that a CPU device takes it over as it is."""
    (count, *width), dtype = slot.tensor.shape, slot.tensor.dtype
    first, last, _ = index[0].indices(count) if index else (0, count, 1)
    row = math.prod(width) * dtype.itemsize
    memory = np.empty((last - first) * row + 64, np.uint8)
    start = -memory.ctypes.data % 64
    block = memory[start : start + (last - first) * row]
    with slot.file.open("rb") as stream:
        stream.seek(slot.offset + first * row)
        view = memoryview(block)
        while view:
            taken = stream.readinto(view) if hasattr(stream, "readinto") else None
            if taken is None:
                content = stream.read(len(view))
                taken = len(content)
                view[:taken] = content
            if not taken:
                raise InputError(f"{slot.file} ends too early; copy or download it again")
            view = view[taken:]
    return block.view(dtype).reshape(last - first, *width)[(slice(None), *index[1:])]
