"""How text becomes token ids: SentencePiece models with Gemma's special ids, by name or by path."""

import pathlib
from collections.abc import Iterable

import sentencepiece

from gemma_encoder.inputs.errors import InputError

PAD_ID, EOS_ID, BOS_ID, UNK_ID, MASK_ID = (
    0,
    1,
    2,
    3,
    4,
)  # Gemma's convention, shared by every tokenizer here

SMALL = pathlib.Path(__file__).parent.parent / "assets" / "small.model"
# The addresses that the gemma package's Gemma2Tokenizer and Gemma3Tokenizer read by default.
PUBLISHED = {
    "gemma2": "gs://gemma-data/tokenizers/tokenizer_gemma2.model",
    "gemma3": "gs://gemma-data/tokenizers/tokenizer_gemma3.model",
}


class Tokenizer:
    """A SentencePiece model with Gemma's special ids.

    Args:
        model: the serialised SentencePiece model.
        name: what it is called in messages.

    Raises:
        InputError: `model` is no SentencePiece model, or its special ids are not Gemma's.
    """

    def __init__(self, model: bytes, name: str):
        self.model, self.name = model, name
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
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
        """A tokenizer by name ("small", "gemma2", "gemma3") or by the path of a SentencePiece model or its folder, local or `gs://`.

        "small" comes with the package: some 8,000 pieces for English, for tests and models trained from random weights.
        """
        if name == "small":
            return cls(SMALL.read_bytes(), name)
        from etils import epath  # only here: nothing else on this floor needs it

        path = epath.Path(PUBLISHED.get(name, name))
        path = path / "tokenizer.model" if name not in PUBLISHED and path.is_dir() else path
        try:
            return cls(path.read_bytes(), name)
        except InputError:
            raise
        except Exception as error:  # each file system's library raises its own
            raise InputError(
                f"tokenizer {name!r} cannot be read from {path} ({type(error).__name__}); give 'small', 'gemma2', 'gemma3' or the path of a tokenizer.model"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of pieces, special ones included."""
        return self._processor.vocab_size()

    bos_id = BOS_ID
    eos_id = EOS_ID

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without bos and eos."""
        return self._processor.encode(texts)

    def encode_with_spans(self, text: str) -> list[tuple[int, int, int]]:
        """(id, first byte, past the last byte) of each token of `text` in UTF-8.

        Of the byte tokens that spell one character, all but the last have an empty span.
        """
        return [
            (piece.id, piece.begin, piece.end)
            for piece in self._processor.encode(text, return_type="proto").pieces
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special ones leave nothing."""
        return self._processor.decode([int(i) for i in ids])

    def pieces(self, ids) -> list[str]:
        """The pieces that ids stand for, for people to read."""
        return [self._processor.id_to_piece(int(i)) for i in ids]
