"""Damages of files as disks, power losses, copies and people make them.

Each is drawn from a random generator, so that a seed repeats it.
"""

import pathlib
import random
import re
import shutil
from collections.abc import Callable, Sequence

PAGE = 4096  # bytes that a file system writes at a time
LONGEST_RUN = 300  # bytes that are overwritten at once
HASH = re.compile("[0-9a-f]{32}")  # names of Orbax's data files are drawn at random

Random = random.Random


class Inapplicable(Exception):
    """Raised by a damage that the drawn file cannot have."""


def flip_bit(data: bytes, rng: Random) -> tuple[bytes, str]:
    at, bit = _position(data, rng), rng.randrange(8)
    return _replaced(data, at, bytes([data[at] ^ 1 << bit])), f"bit {bit} of byte {at} flipped"


def change_byte(data: bytes, rng: Random) -> tuple[bytes, str]:
    at = _position(data, rng)
    value = data[at] ^ rng.randrange(1, 256)
    return _replaced(data, at, bytes([value])), f"byte {at} set to {value}"


def overwrite_with_zeros(data: bytes, rng: Random) -> tuple[bytes, str]:
    at, size = _position(data, rng), rng.randrange(1, LONGEST_RUN)
    size = min(size, len(data) - at)
    return _replaced(data, at, bytes(size)), f"{size} bytes from {at} set to zero"


def overwrite_at_random(data: bytes, rng: Random) -> tuple[bytes, str]:
    at, size = _position(data, rng), rng.randrange(1, LONGEST_RUN)
    size = min(size, len(data) - at)
    return _replaced(data, at, rng.randbytes(size)), f"{size} bytes from {at} set at random"


def cut(data: bytes, rng: Random) -> tuple[bytes, str]:
    size = rng.choice([0, len(data) // 2, len(data) - 1, _position(data, rng)])
    return data[:size], f"cut after {size} of {len(data)} bytes"


def lose_pages(data: bytes, rng: Random) -> tuple[bytes, str]:
    """The length is on the disk, but the last pages of the content are not: a power loss."""
    written = _position(range(0, len(data), PAGE), rng) * PAGE
    return data[:written] + bytes(len(data) - written), f"zeros after byte {written}"


def append(data: bytes, rng: Random) -> tuple[bytes, str]:
    more = rng.choice([b"\0", b"\n", b"}", b"\xff", rng.randbytes(50), bytes(PAGE), data[:1000]])
    return data + more, f"{len(more)} bytes appended"


def delete_bytes(data: bytes, rng: Random) -> tuple[bytes, str]:
    at = _position(data, rng)
    size = min(rng.choice([1, 1, 8, LONGEST_RUN]), len(data) - at)
    return data[:at] + data[at + size :], f"{size} bytes from {at} deleted"


def repeat_line(data: bytes, rng: Random) -> tuple[bytes, str]:
    lines = data.splitlines(keepends=True)
    at = _position(lines, rng)
    return b"".join([*lines[: at + 1], *lines[at:]]), f"line {at + 1} repeated"


def delete_line(data: bytes, rng: Random) -> tuple[bytes, str]:
    lines = data.splitlines(keepends=True)
    at = _position(lines, rng)
    return b"".join([*lines[:at], *lines[at + 1 :]]), f"line {at + 1} deleted"


def change_digit(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Leaves text and JSON well-formed, but makes them say something else."""
    digits = [at for at in _window(data, rng) if data[at : at + 1].isdigit()]
    at = digits[_position(digits, rng)]
    digit = rng.choice([value for value in b"123456789" if value != data[at]])
    return _replaced(data, at, bytes([digit])), f"the digit at byte {at} set to {chr(digit)}"


def _window(data: bytes, rng: Random) -> range:
    """Returns positions of a part of a file, since large ones take long to search."""
    start = rng.randrange(max(len(data) - PAGE, 0) + 1)
    return range(start, min(start + PAGE, len(data)))


def _position(values: Sequence, rng: Random) -> int:
    if not values:
        raise Inapplicable
    return rng.randrange(len(values))


def _replaced(data: bytes, at: int, part: bytes) -> bytes:
    return data[:at] + part + data[at + len(part) :]


def delete(path: pathlib.Path, root: pathlib.Path, rng: Random) -> str:
    path.unlink()
    return "deleted"


def become_folder(path: pathlib.Path, root: pathlib.Path, rng: Random) -> str:
    path.unlink()
    path.mkdir()
    return "replaced by a folder"


def become_dangling_link(path: pathlib.Path, root: pathlib.Path, rng: Random) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return "replaced by a dangling link"


def swap(path: pathlib.Path, root: pathlib.Path, rng: Random) -> str:
    others = [other for other in files(path.parent) if other.parent == path.parent]
    return _swap(path, [other for other in others if other != path], root, rng)


def swap_namesakes(path: pathlib.Path, root: pathlib.Path, rng: Random) -> str:
    """As if the file were copied from another checkpoint or part."""
    return _swap(path, [o for o in files(root) if o.name == path.name and o != path], root, rng)


def _swap(path: pathlib.Path, others: Sequence[pathlib.Path], root: pathlib.Path, rng: Random):
    other = others[_position(others, rng)]
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"swapped with {other.relative_to(root)}"


def delete_folder(path: pathlib.Path, root: pathlib.Path, rng: Random) -> str:
    folder = _folder_above(path, root, rng)
    shutil.rmtree(folder)
    return f"the folder {folder.relative_to(root)} deleted"


def empty_folder(path: pathlib.Path, root: pathlib.Path, rng: Random) -> str:
    folder = _folder_above(path, root, rng)
    shutil.rmtree(folder)
    folder.mkdir()
    return f"the folder {folder.relative_to(root)} emptied"


def _folder_above(path: pathlib.Path, root: pathlib.Path, rng: Random) -> pathlib.Path:
    folders = [folder for folder in path.parents if root in folder.parents]
    return folders[_position(folders, rng)]


CONTENT: tuple[Callable[[bytes, Random], tuple[bytes, str]], ...] = (
    flip_bit,
    flip_bit,  # the commonest one on disks
    change_byte,
    overwrite_with_zeros,
    overwrite_at_random,
    cut,
    cut,
    lose_pages,
    append,
    delete_bytes,
    repeat_line,
    delete_line,
    change_digit,
)
FILES: tuple[Callable[[pathlib.Path, pathlib.Path, Random], str], ...] = (
    delete,
    delete,
    become_folder,
    become_dangling_link,
    swap,
    swap_namesakes,
    delete_folder,
    empty_folder,
)


def files(root: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files below a folder in an order that repeats, although some names do not."""

    def key(path: pathlib.Path) -> tuple:
        name = "" if HASH.fullmatch(path.name) else path.name
        return path.parent, name, path.stat().st_size, path.name

    return sorted((path for path in root.rglob("*") if path.is_file()), key=key)


def damage(root: pathlib.Path, rng: Random) -> tuple[pathlib.Path, str]:
    """Damages one file or folder below `root`.

    Returns:
        The file, and a description of the damage.
    """
    everything = files(root)
    while True:
        path = rng.choice(everything)
        before = path.read_bytes()
        change = rng.choice([*CONTENT, *FILES])
        try:
            if change in FILES:
                text = change(path, root, rng)
            else:
                after, text = change(before, rng)
                path.write_bytes(after)
        except Inapplicable:
            continue
        if not path.is_file() or path.read_bytes() != before:
            return path, text
