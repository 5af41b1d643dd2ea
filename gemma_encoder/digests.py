"""Digests of the files of a folder, by which damage is noticed when they are read.

    FOLDER/digests.json = {"algorithm": "crc32c", "files": {NAME: [DIGEST, …]}, "digest": DIGEST}

A file is whole if it has one of its digests: several are listed only while `update` replaces it, so
that a kill in between leaves no file that seems damaged. CRC-32C finds every flipped bit and is
computed faster than files are read; it does not protect from people who change files on purpose.
"""

import concurrent.futures
import contextlib
import functools
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.inputs.untrusted import inside
from gemma_encoder.whole_files import is_remote, whole_file, write_whole

NAME = "digests.json"
ALGORITHM = "crc32c"
OFF = "GEMMA_ENCODER_CHECK_DIGESTS"  # set to 0 to read files without checking them
CHUNK = 1 << 20  # bytes read at a time: they stay in the processor's cache for the digest
ABSENT = "absent"  # among the digests of a file that `update` is about to create
SMALL = 1 << 20  # bytes; smaller files are checked before the folder is read, others meanwhile
THREADS = 2


class Digest:
    """Digest of a file: its size, the CRC-32C of all but the last four bytes, and these.

    All files that end with their own CRC-32C, as those of OCDBT do, have the same CRC-32C: without
    these four bytes, it depends on the content again.
    """

    def __init__(self, content: bytes = b""):
        self._size = 0
        self._crc = 0
        self._last = b""
        self.add(content)

    def add(self, content: bytes | memoryview) -> None:
        """Adds the next bytes of the file."""
        self._size += len(content)
        if len(content) < 4:
            content = self._last + content
        else:
            self._crc = extend_crc(self._crc, self._last)
        view = memoryview(content)
        self._crc = extend_crc(self._crc, view[:-4])
        self._last = bytes(view[-4:])

    def __str__(self) -> str:
        return f"{self._size}-{self._crc:08x}-{self._last.hex()}"


class DamagedFileError(InputError):
    """Raised if a file is not as it was written.

    Attributes:
        path: the file.
    """

    def __init__(self, path: pathlib.PurePath, problem: str):
        super().__init__(f"{path} {problem}")
        self.path = path


def write(folder: pathlib.Path, computed: Mapping[str, str] | None = None) -> None:
    """Writes the digests of all files of a folder, subfolders included.

    On cloud storage, which checks its objects itself, nothing is written.

    Args:
        folder: the folder.
        computed: digests by name of files that are not read, as `Digest` returns them.
    """
    if is_remote(folder):
        return
    folder = pathlib.Path(folder)
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    computed = computed or {}
    files = {
        name: [computed.get(name) or _digest_of_file(folder / name)]
        for name in names
        if name != NAME
    }
    _write(folder, files)


def add(folder: pathlib.Path, names: Iterable[str]) -> None:
    """Adds the digests of files that are already written; see `write`."""
    if is_remote(folder):
        return
    folder = pathlib.Path(folder)
    before = _read(folder) if (folder / NAME).exists() else {}
    _write(folder, before | {name: [_digest_of_file(folder / name)] for name in names})


def update(folder: pathlib.Path, contents: Mapping[str, bytes | Iterable[bytes]]) -> None:
    """Writes or replaces files of a folder, each as a whole and in their order, and their digests.

    Args:
        folder: the folder, whose other files keep their digests.
        contents: contents by name relative to the folder, as a whole or in pieces, which are not
            held in memory; subfolders must exist.
    """
    pieces = {
        name: [content] if isinstance(content, bytes) else content
        for name, content in contents.items()
    }
    if is_remote(folder):
        for name, content in pieces.items():
            write_whole(folder / name, b"".join(content))
        return
    folder = pathlib.Path(folder)
    before = _read(folder) if (folder / NAME).exists() else {}
    with contextlib.ExitStack() as replaced_at_the_end:
        new = {}
        for name, content in reversed(pieces.items()):  # the last to enter is the first to exit
            temporary = replaced_at_the_end.enter_context(whole_file(folder / name))
            with temporary.open("wb") as file:
                file.writelines(content)
            new[name] = [_digest_of_file(temporary)]
        either = {name: [*new[name], *before.get(name, [ABSENT])] for name in new}
        _write(folder, before | either)
    _write(folder, before | new)


def is_checked(folder: pathlib.Path) -> bool:
    """Returns True if `verified` checks the files of a folder: it has digests, not switched off."""
    return _checked_folder(folder) is not None


@contextlib.contextmanager
def verified(
    folder: pathlib.Path, parts: Sequence[str] = ("",), share: tuple[int, int] = (0, 1)
) -> Iterator[None]:
    """Checks files of a folder while the context reads them.

    Sizes and small files are checked before, the content of large files meanwhile. An error of the
    context is replaced by the one that names a damaged file, if there is one. A folder without
    `digests.json` is not checked.

    Args:
        folder: the folder.
        parts: the files or subfolders that are read; "" for all.
        share: (i, n) checks the content of every n-th large file, the i-th first; (0, 0) of none.

    Raises:
        DamagedFileError: a file is damaged or missing.
    """
    folder = _checked_folder(folder)
    if folder is None:
        yield
        return
    small, large = _select(folder, parts)
    for name, digests in small.items():
        _check(folder, name, digests, _check_content)
    for name, digests in large.items():
        _check(folder, name, digests, _check_size)
    large = _share_of(large, *share)
    is_over = threading.Event()
    check_until_over = functools.partial(_check_content, is_over=is_over)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        checks = [
            pool.submit(_check, folder, name, digests, check_until_over)
            for name, digests in large.items()
        ]
        try:
            yield
        except Exception:
            _raise_first(checks)
            raise
        except BaseException:
            is_over.set()
            raise
        _raise_first(checks)


def check(folder: pathlib.Path, parts: Sequence[str] = ("",)) -> None:
    """Checks files of a folder, see `verified`."""
    with verified(folder, parts):
        pass


def _checked_folder(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder as a local path; None if it has no digests or they are switched off."""
    if is_remote(folder) or os.environ.get(OFF) == "0":
        return None
    folder = pathlib.Path(folder)
    return folder if (folder / NAME).exists() else None


def _select(
    folder: pathlib.Path, parts: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Returns the digests of the small and of the large files below `parts`, by name."""
    small: dict[str, list[str]] = {}
    large: dict[str, list[str]] = {}
    for name, digests in _read(folder).items():
        if any(not part or name == part or name.startswith(f"{part}/") for part in parts):
            is_small = max(_sizes(digests), default=0) < SMALL
            (small if is_small else large)[name] = digests
    return small, large


def _share_of(files: Mapping[str, list[str]], index: int, count: int) -> dict[str, list[str]]:
    """Returns a share of the files, such that all shares have about as many bytes."""
    if not count:
        return {}
    ordered = sorted(files, key=lambda name: (-max(_sizes(files[name])), name))
    return {name: files[name] for name in ordered[index::count]}


def _sizes(digests: Sequence[str]) -> set[int]:
    """Returns the sizes that a file may have."""
    return {int(digest.partition("-")[0]) for digest in digests if digest != ABSENT}


def _raise_first(checks: Sequence[concurrent.futures.Future]) -> None:
    """Waits for checks and raises the error of the first that failed."""
    for future in checks:
        future.result()


def _check(
    folder: pathlib.Path,
    name: str,
    digests: Sequence[str],
    check_file: Callable[[pathlib.Path, str, Sequence[str]], object],
) -> None:
    """Checks a file, once more if `update` has replaced it after its digests were read."""
    try:
        check_file(folder, name, digests)
    except DamagedFileError:
        current = _read(folder).get(name, [])
        if current == digests:
            raise
        check_file(folder, name, current)


def _check_content(
    folder: pathlib.Path, name: str, digests: Sequence[str], is_over: threading.Event | None = None
) -> None:
    path = _check_size(folder, name, digests)
    if path is None:
        return
    try:
        if _digest_of_file(path, is_over) not in digests and not (is_over and is_over.is_set()):
            raise DamagedFileError(path, "is damaged: its content is not what was written")
    except OSError as error:
        raise DamagedFileError(path, f"cannot be read: {error.strerror}") from error


def _check_size(folder: pathlib.Path, name: str, digests: Sequence[str]) -> pathlib.Path | None:
    """Returns the path of a file that has one of its sizes; None if it is rightly absent."""
    path = inside(folder, name, folder / NAME)
    try:
        if not path.is_file():
            if ABSENT in digests:
                return None
            raise DamagedFileError(path, "is missing")
        actual = path.stat().st_size
    except OSError as error:
        raise DamagedFileError(path, f"cannot be read: {error.strerror}") from error
    sizes = _sizes(digests)
    if actual not in sizes:
        expected = " or ".join(map(str, sorted(sizes)))
        raise DamagedFileError(path, f"is damaged: it has {actual} bytes, not {expected}")
    return path


def extend_crc(crc: int, content: bytes | memoryview) -> int:
    """Returns the CRC-32C of earlier bytes, 0 without any, and of more bytes."""
    import google_crc32c
    import numpy as np

    if isinstance(content, memoryview):  # which google_crc32c would refuse
        content = np.frombuffer(content, np.uint8) if content else b""
    return google_crc32c.extend(crc, content)


def _digest_of_file(path: pathlib.Path, is_over: threading.Event | None = None) -> str:
    """Returns the digest of a file, read in chunks until `is_over` is set."""
    with path.open("rb", buffering=0) as file:
        digest = Digest()
        while not (is_over and is_over.is_set()) and (chunk := file.read(CHUNK)):
            digest.add(chunk)
    return str(digest)


def _write(folder: pathlib.Path, files: Mapping[str, Sequence[str]]) -> None:
    content = {"algorithm": ALGORITHM, "files": files, "digest": _digest_of_names(files)}
    write_whole(folder / NAME, to_json(content, indent=1))


def _digest_of_names(files: Mapping[str, Sequence[str]]) -> str:
    return str(Digest(to_json(files, sort_keys=True).encode()))


def _read(folder: pathlib.Path) -> dict[str, list[str]]:
    """Reads the digests by name; raises DamagedFileError if the file itself is damaged."""
    path = folder / NAME
    try:
        content = read_object(path)
        if content.get("algorithm", ALGORITHM) != ALGORITHM:
            raise InputError(f"{path} uses {content['algorithm']!r}, expected {ALGORITHM!r}")
        is_whole = content["digest"] == _digest_of_names(content["files"]) and all(
            digest == ABSENT or re.fullmatch(r"\d{1,18}-[0-9a-f]{8}-[0-9a-f]{0,8}", digest)
            for digests in content["files"].values()
            for digest in digests
        )
    except (InputError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise DamagedFileError(path, "is damaged; without it, nothing is checked")
    return content["files"]
