"""Hashes of the texts of tables, eight bytes at a time: equal for texts equal but for whitespace.

Shapes: N rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_encoder.data.table import Table

_FACTORS = [np.uint64(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)]
_IS_SPACE = np.zeros(256, bool)
_IS_SPACE[list(b" \t\n\r\v\f")] = True


def text_hashes(table: Table, columns: Sequence[str]) -> np.ndarray:
    """Returns [N] uint64, a hash of the texts of each row; whitespace is ignored."""
    result = np.zeros(len(table), np.uint64)
    for column in columns:
        first = 0
        for chunk in table.arrow.column(column).chunks:
            rows = slice(first, first + len(chunk))
            result[rows] = mixed_bits(result[rows] * _FACTORS[2] + _hashes(chunk))
            first += len(chunk)
    return result


def _hashes(texts: Any) -> np.ndarray:
    """Hashes the texts of an Arrow array, eight bytes at a time."""
    _, offsets, content = texts.buffers()
    offsets = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(content, np.uint8)[offsets[0] : offsets[-1]]
    is_space = _IS_SPACE[data]
    spaces = np.concatenate([[0], np.cumsum(is_space)])
    offsets = offsets - offsets[0]
    offsets = offsets - spaces[offsets]
    lengths = np.diff(offsets)
    num_words = lengths // 8 + 1  # the last word has 0 to 7 bytes
    first_words = np.cumsum(num_words) - num_words
    position = np.arange(num_words.sum()) - np.repeat(first_words, num_words)
    padded = np.concatenate([data[~is_space], np.zeros(8, np.uint8)])
    unaligned = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))
    words = unaligned[np.repeat(offsets[:-1], num_words) + 8 * position]
    last_bits = (8 * (lengths % 8)).astype(np.uint64)
    words[first_words + num_words - 1] &= (np.uint64(1) << last_bits) - np.uint64(1)
    words = mixed_bits(words + position.astype(np.uint64) * _FACTORS[0])
    sums = np.add.reduceat(words, first_words)
    return mixed_bits(sums + lengths.astype(np.uint64))


def mixed_bits(values: np.ndarray) -> np.ndarray:
    """Mixes the bits of [n] uint64: the finalizer of SplitMix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _FACTORS[1]
    values = (values ^ (values >> np.uint64(27))) * _FACTORS[2]
    return values ^ (values >> np.uint64(31))
