"""Tokenizers: SentencePiece models with Gemma's special ids, loaded by name or by path."""

import pathlib
from collections.abc import Iterable

import sentencepiece

from gemma_encoder.inputs.errors import InputError, reason
from gemma_encoder.inputs.special_ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from gemma_encoder.inputs.untrusted import read_bounded

SMALL = pathlib.Path(__file__).parent.parent / "assets" / "small.model"
# The default paths of the gemma package's Gemma2Tokenizer and Gemma3Tokenizer.
PUBLISHED = {
    "gemma2": "gs://gemma-data/tokenizers/tokenizer_gemma2.model",
    "gemma3": "gs://gemma-data/tokenizers/tokenizer_gemma3.model",
}


class Tokenizer:
    """A SentencePiece model with Gemma's special ids.

    Args:
        model: the serialized SentencePiece model.
        name: name of the tokenizer in error messages.

    Raises:
        InputError: `model` is not a SentencePiece model, or its special ids are not Gemma's.
    """

    bos_id = BOS_ID
    eos_id = EOS_ID

    def __init__(self, model: bytes, name: str):
        self.model = model
        self.name = name
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter if its message is no text
            raise InputError(f"{name}: not a SentencePiece model") from error
        ids = (
            self._processor.pad_id(),
            self._processor.eos_id(),
            self._processor.bos_id(),
            self._processor.unk_id(),
        )
        if ids != (PAD_ID, EOS_ID, BOS_ID, UNK_ID):
            raise InputError(
                f"{name}: special ids (pad, eos, bos, unk) are {ids}; expected Gemma's (0, 1, 2, 3)"
            )

    @classmethod
    def load(cls, name: str) -> "Tokenizer":
        """Loads a tokenizer by name or by path.

        Args:
            name: "small", "gemma2", "gemma3", or the path of a SentencePiece model or of its
                folder, local or `gs://`. "small" comes with the package: about 8,000 English
                pieces, for tests and for models trained from scratch.
        """
        if name == "small":
            return cls(SMALL.read_bytes(), name)
        from etils import epath  # imported lazily: nothing else in `inputs` needs it

        path = epath.Path(PUBLISHED.get(name, name))
        if name not in PUBLISHED and path.is_dir():
            path = path / "tokenizer.model"
        try:
            return cls(read_bounded(path), name)
        except InputError:
            raise
        except Exception as error:  # each file system's library raises its own
            raise InputError(
                f"tokenizer {name!r} cannot be read from {path} ({reason(error)}); give "
                "'small', 'gemma2', 'gemma3' or the path of a tokenizer.model"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of pieces, special ones included."""
        return self._processor.vocab_size()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text, without bos and eos."""
        return self._processor.encode(texts)

    def encode_with_spans(self, text: str) -> list[tuple[int, int, int]]:
        """Returns (id, begin, end) of each token; the span is in UTF-8 bytes, the end exclusive.

        When several byte tokens encode one character, all but the last have an empty span.
        """
        return [
            (piece.id, piece.begin, piece.end)
            for piece in self._processor.encode(text, return_type="proto").pieces
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; special tokens are dropped."""
        return self._processor.decode([int(i) for i in ids])

    def pieces(self, ids) -> list[str]:
        """Returns the SentencePiece pieces of token ids, for display."""
        return [self._processor.id_to_piece(int(i)) for i in ids]
