"""JSON that every reader accepts: standard JSON has neither NaN nor infinity."""

import json
import math
from collections.abc import Mapping
from typing import Any


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


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
