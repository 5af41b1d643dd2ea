"""Files that one process at a time appends to, and that a later start continues.

    OUTPUT.part       the bytes so far
    OUTPUT.part.json  the state: settings, progress, the size and the CRC-32C of OUTPUT.part
    OUTPUT.lock       names the process that writes

A commit flushes the bytes to disk before it replaces the state. A start continues after the last
commit if the settings are the same and the bytes are those of the state; it never mixes two
commands or skips damage. At the end, OUTPUT.part is renamed or converted to OUTPUT.
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from gemma_encoder.digests import CHUNK, extend_crc
from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.whole_files import claim, move_whole, whole_file, write_whole

Convert = Callable[[pathlib.Path, pathlib.Path], None]


class ContinuedFile:
    """A file that is written by appending, and continued by a later start with the same settings.

    Used as a context, during which no other process writes the file.

    Args:
        output: the final file; its folder must exist.
        settings: what the content depends on, for JSON.
        subject: names the file in messages, such as "--output=FILE".

    Attributes:
        path: the bytes so far.
        state_path: the state.
    """

    def __init__(self, output: pathlib.Path, settings: Mapping[str, Any], subject: str):
        self.output = output
        self.path = output.with_name(f"{output.name}.part")
        self.state_path = output.with_name(f"{output.name}.part.json")
        self._settings = dict(settings)
        self._subject = subject
        self._size = 0
        self._crc = 0
        self._file = None
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> "ContinuedFile":
        lock = self.output.with_name(f"{self.output.name}.lock")
        advice = "wait for it, or name another output"
        self._lock.enter_context(claim(lock, self._subject, advice))
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # after a full disk, buffered bytes are lost
                self._file.close()
            if not self.state_path.exists():  # nothing was committed
                with contextlib.suppress(OSError):
                    self.path.unlink()
        self._lock.close()

    def read(self) -> dict[str, Any] | None:
        """Returns the progress at the last commit; None if there is none.

        Raises:
            InputError: the file was left by a command with other settings, or is damaged.
        """
        if not self.state_path.exists():
            return None
        state = self._read_state()
        self._check_settings(state["settings"])
        if not self._holds(self.path, state):
            if not self.path.exists() and self._holds(self.output, state):
                return None  # killed at the very end: the output is complete
            raise self._mismatch()
        self._size = state["bytes"]
        self._crc = state["crc32c"]
        return state["progress"]

    def _read_state(self) -> dict[str, Any]:
        """Reads the state; raises InputError if it is damaged."""
        try:
            state = read_object(self.state_path)
            if state.pop("digest") == _digest(state):
                return state
        except (InputError, KeyError):
            pass
        raise self._mismatch()

    def _mismatch(self) -> InputError:
        return InputError(
            f"{self.path} and {self.state_path.name} do not match, since one of them was changed, "
            "cut or deleted, or is of another version; remove both, and the command starts anew"
        )

    def _holds(self, path: pathlib.Path, state: Mapping[str, Any]) -> bool:
        """Returns True if a file begins with the bytes of the state."""
        left = state["bytes"]
        crc = 0
        try:
            with path.open("rb", buffering=0) as file:
                while left and (chunk := file.read(min(left, CHUNK))):
                    crc = extend_crc(crc, chunk)
                    left -= len(chunk)
        except OSError:
            return False
        return not left and crc == state["crc32c"]

    def _check_settings(self, stored: Mapping[str, Any]) -> None:
        changed = [
            f"{name}: {stored.get(name)!r} -> {self._settings.get(name)!r}"
            for name in self._settings | dict(stored)
            if stored.get(name) != self._settings.get(name)
        ]
        if changed:
            raise InputError(
                f"{self.path} was left by another command ({'; '.join(changed)}); remove it and "
                f"{self.state_path.name}, or name another output"
            )

    def begin(self) -> None:
        """Opens the file after the bytes that `read` accepted; others are discarded."""
        with self._errors():
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.fdopen(os.open(self.path, flags, 0o666), "r+b")
            self._file.truncate(self._size)
            self._file.seek(self._size)
            if not self._size:
                self.state_path.unlink(missing_ok=True)

    def write(self, content: bytes) -> None:
        """Appends bytes."""
        with self._errors():
            self._file.write(content)
        self._crc = extend_crc(self._crc, content)
        self._size += len(content)

    def commit(self, progress: Mapping[str, Any]) -> None:
        """Flushes the bytes to disk, then records them and the progress as done."""
        with self._errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            state = {
                "settings": self._settings,
                "progress": dict(progress),
                "bytes": self._size,
                "crc32c": self._crc,
            }
            write_whole(self.state_path, to_json({**state, "digest": _digest(state)}))

    def finish(self, convert: Convert | None = None) -> None:
        """Ends writing: the file is renamed to the output, or converted and removed.

        Args:
            convert: writes the second of two files from the first.
        """
        with self._errors():
            self._file.close()
            if convert is None:
                move_whole(self.path, self.output)
            else:
                with whole_file(self.output) as temporary:
                    convert(self.path, temporary)
            # Bytes without a state are no damage, if it is killed in between.
            self.state_path.unlink()
            self.path.unlink(missing_ok=True)

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        """Turns errors of the file system into an InputError."""
        advice = "rerun the command to resume"
        if self.state_path.exists():
            advice = f"what was committed before is in {self.path}, {advice}"
        return in_one_line(f"{self._subject} cannot be written", advice, OSError)


def _digest(state: Mapping[str, Any]) -> int:
    """Returns the digest of a state, by which damage of the state itself is noticed."""
    return extend_crc(0, to_json(state, sort_keys=True).encode())
