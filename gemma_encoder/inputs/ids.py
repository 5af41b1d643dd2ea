"""Ids as single words of run and qrels files, whose columns are separated by blanks.

An id without whitespace is written as it is. In an id with whitespace, whitespace and "%" are
percent-encoded as UTF-8 bytes: "query 0" is "query%200". An id that would be read as another one,
such as "a%20b", is encoded too, so that reading is unambiguous.
"""

import re

RUN_TAG = "gemma_encoder"  # last column of our runs
FIRST_STAGE_TAG = "first_stage"
OUR_TAGS = (RUN_TAG, FIRST_STAGE_TAG)

_EMPTY = "%00"  # an empty id
# Characters at which readers split or strip, and the escape character itself.
_SPECIAL = [*filter(str.isspace, map(chr, range(0x3001))), "\ufeff", "%"]
_CODES = {char: "".join(f"%{byte:02X}" for byte in char.encode()) for char in _SPECIAL}
_CHARS = {code: char for char, code in _CODES.items()}
_WHITESPACE = re.compile(f"[{re.escape(''.join(_SPECIAL[:-1]))}]")
_CODE = re.compile("|".join(_CHARS))


def encode_id(text: str) -> str:
    """Returns an id as one word; `decode_id` is its inverse."""
    if not text:
        return _EMPTY
    if not _WHITESPACE.search(text) and decode_id(text) == text:
        return text
    return "".join(_CODES.get(char, char) for char in text)


def decode_id(word: str) -> str:
    """Returns the id that `encode_id` wrote as this word."""
    if "%" not in word:
        return word
    if word == _EMPTY:
        return ""
    return _CODE.sub(lambda match: _CHARS[match[0]], word)
