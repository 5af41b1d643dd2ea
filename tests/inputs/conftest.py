import re

import pytest

from gemma_encoder.inputs.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("small")


@pytest.fixture(scope="session")
def to_bytes(tokenizer):
    """Function from token ids to the UTF-8 bytes that they encode, byte tokens included."""

    def concatenate_pieces(ids) -> bytes:
        parts = []
        for piece in tokenizer.pieces(ids):
            if re.fullmatch("<0x[0-9A-F]{2}>", piece):
                parts.append(bytes([int(piece[3:5], 16)]))
            else:
                parts.append(piece.replace("\u2581", " ").encode())
        return b"".join(parts)

    return concatenate_pieces
