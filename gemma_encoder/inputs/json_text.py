"""JSON: writing what every reader accepts, and reading what strangers may have written."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from gemma_encoder.inputs.errors import InputError, reason
from gemma_encoder.inputs.untrusted import read_bounded


def to_json(value: Any, **options: Any) -> str:
    """Serializes a value as `json.dumps` does, with null in place of NaN and infinities.

    Args:
        value: the value.
        **options: options of `json.dumps`, such as `indent`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # a number is not finite
        return json.dumps(_finite(value), allow_nan=False, **options)


def from_json(text: str | bytes) -> Any:
    """Parses JSON as `json.loads` does.

    Raises:
        ValueError: the text is not JSON in UTF-8, is nested too deeply, or has an integer of
            thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: pathlib.Path, advice: str = "it is damaged or incompletely copied") -> Any:
    """Reads a file of JSON; arguments and errors as in `read_object`."""
    try:
        return from_json(read_bounded(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); {advice}") from error


def read_object(
    path: pathlib.Path, advice: str = "it is damaged or incompletely copied"
) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Args:
        path: a file, local or of `epath`.
        advice: the end of the message.

    Raises:
        InputError: the file cannot be read, or holds no JSON object.
    """
    content = read_json(path, advice)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; {advice}")
    return content


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
