"""The one exception for what a user handed over, and the sentence that names the nearest valid spelling."""

import difflib
import re
import traceback
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user handed over cannot be used. The message is one line: what, what was expected, what to do."""

    def _render_traceback_(self) -> list[str]:
        """The one line, which IPython then shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def unknown(kind: str, name: object, valid: Iterable[str]) -> InputError:
    """The error for a name that is not among `valid`, with the nearest valid one first.

    Args:
        kind: what was named, e.g. "task".
        name: what the user wrote.
        valid: every name that would have been accepted.
    """
    names, group = sorted(map(str, valid)), str(name)[: str(name).rfind(".") + 1]
    if not all(each.startswith(group) for each in names):
        group = ""
    tails = [each.removeprefix(group) for each in names]  # a path's own last part is compared
    near = difflib.get_close_matches(str(name).removeprefix(group), tails, n=1, cutoff=0.5)
    near = [group + each for each in near]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    valid_names = ", ".join(names) or "none"
    return InputError(f"unknown {kind} {str(name)!r}{hint or '.'} Valid: {valid_names}")


def location(error: BaseException) -> str:
    """FILE:LINE where an error was raised, or where a file is no Python."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def described(error: BaseException) -> str:
    """The error's type and message, on one line."""
    text = error.msg if isinstance(error, SyntaxError) else one_line(error)
    return f"{type(error).__name__}: {text}"


def one_line(error: Exception) -> str:
    """What an error of absl's flags or of ml_collections says, on one line; of a traceback that it quotes, the last line without the exception's name."""
    text = str(error.args[0] if error.args else error).strip()
    if "Traceback" in text or isinstance(error, OSError):
        last = text.splitlines()[-1].strip()
        return re.sub(r"^[\w.]+(Error|Exception): ", "", last)
    # ml_collections passes on the repr of a message that holds line breaks.
    text = text[1:-1] if text[:1] == text[-1:] == "'" else text
    return " ".join(text.replace("\\n", " ").replace("\\'", "'").split())
