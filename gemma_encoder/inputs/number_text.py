"""Numbers as text for people, readable in any unit."""

import math


def format_number(value: float, sign: str = "") -> str:
    """Formats a value in units of its own, such as an error of a regression.

    Three decimals, as all figures have, unless these would hide a small value or be of no use.

    Args:
        value: the value.
        sign: "+" for a sign in front of positive values, too.
    """
    size = abs(value)
    if 0 < size < 0.001:
        return f"{value:{sign}.3g}"
    return f"{value:{sign}.0f}" if size >= 100_000 else f"{value:{sign}.3f}"


def format_label(value: float) -> str:
    """Formats a target as users wrote it, up to six digits, or all digits of a large one."""
    return f"{value:.12g}" if math.isfinite(value) and abs(value) >= 1e6 else f"{value:g}"
