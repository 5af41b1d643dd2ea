import re

import pytest

from gemma_encoder.inputs.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("small")


@pytest.fixture(scope="session")
def spelt(tokenizer):
    """`spelt(ids)`: the UTF-8 that ids spell, byte tokens included."""

    def spell(ids) -> bytes:
        parts = []
        for piece in tokenizer.pieces(ids):
            is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece)
            parts.append(
                bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("\u2581", " ").encode()
            )
        return b"".join(parts)

    return spell
