"""Comparison and order of class names that were read from files.

Writers spell the same number differently: pandas writes 1 as "1.0" if another row of the column has
no value, and True as "True" where JSON has true.
"""

import decimal
import re
import unicodedata
from collections.abc import Iterable, Sequence

# No leading zeros: "007" is a code. The limit keeps the decimal exact and the name short.
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]{0,17})(\.[0-9]{0,9})?|\.[0-9]{1,9})")


def canonical_name(name: str) -> str:
    """Returns the form in which a class name is compared.

    Numbers are equal by value ("1", "1.0" and "+1" are "1"), truth values in any case, and letters
    with accents in either form of Unicode. Any other name is returned as it is.
    """
    if name in ("True", "TRUE", "False", "FALSE"):
        return name.lower()
    if not _NUMBER.fullmatch(name):
        return unicodedata.normalize("NFC", name)
    value = decimal.Decimal(name)
    return format(value.normalize() if value else abs(value).quantize(1), "f")


def are_numbers(names: Iterable[str]) -> bool:
    """Returns True if all names are numbers."""
    return all(_NUMBER.fullmatch(name) for name in names)


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts class names; by value if all are numbers."""
    names = list(names)
    return tuple(sorted(names, key=decimal.Decimal if are_numbers(names) else None))


def differing_names(names: Sequence[str], others: Sequence[str]) -> bool:
    """Returns True unless both sequences name the same classes in the same order."""
    return list(map(canonical_name, names)) != list(map(canonical_name, others))
