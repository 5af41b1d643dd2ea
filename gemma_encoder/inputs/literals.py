"""Lists in the syntax of Python, as pandas' `to_csv` writes them, from texts of strangers."""

import ast
import warnings
from typing import Any

MAX_LENGTH = 100_000  # characters; the syntax tree of a text needs hundreds of bytes for each


def parse_literal(text: str) -> Any:
    """Parses a literal as `ast.literal_eval` does, in bounded memory.

    Raises:
        ValueError: the text is no literal, nested too deeply, or too long.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"it has more than {MAX_LENGTH} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escape sequences that Python does not know
            return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"it is not a Python literal ({type(error).__name__})") from None
