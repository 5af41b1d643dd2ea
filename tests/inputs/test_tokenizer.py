"""Tokenizers: Gemma's special ids, byte spans, and errors for unusable models."""

import io
import re

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.inputs import tokenizer as tokenizers
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.special_ids import MASK_ID
from gemma_encoder.inputs.tokenizer import Tokenizer

texts = st.text(st.sampled_from("abcdefg ABC 012.,!?{}<>\n\té文€👩ßñ"), max_size=40) | st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"), max_size=20
)


@given(texts)
def test_tokens_encode_the_text(tokenizer, to_bytes, text):
    [ids] = tokenizer.encode([text])
    assert to_bytes(ids) == text.encode()
    assert all(MASK_ID < i < tokenizer.vocab_size for i in ids)


@given(texts)
def test_spans_agree_with_the_ids_and_cover_the_text(tokenizer, to_bytes, text):
    pieces = tokenizer.encode_with_spans(text)
    data = text.encode()
    assert [piece[0] for piece in pieces] == tokenizer.encode([text])[0]
    end = 0
    waiting = b""  # byte tokens of an incomplete character
    for identity, first, last in pieces:
        assert first == end
        waiting += to_bytes([identity])
        if last > first:
            assert waiting == data[first:last]
            waiting = b""
        end = last
    assert end == len(data)
    assert not waiting


def test_a_batch_is_encoded_like_single_texts(tokenizer):
    several = ["one", "", "the second text", "文"]
    assert tokenizer.encode(several) == [tokenizer.encode([text])[0] for text in several]
    assert tokenizer.encode([]) == []


def test_the_small_tokenizer_has_gemmas_special_ids(tokenizer):
    assert tokenizer.pieces(range(5)) == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1)
    assert 7_000 <= tokenizer.vocab_size <= 8_192  # fits the tiny models' embedding table
    assert tokenizer.name == "small"


def test_the_small_tokenizer_knows_english(tokenizer, to_bytes):
    text = "The film is a quiet story about two brothers who never learned to talk to each other."
    [ids] = tokenizer.encode([text])
    assert len(text) / len(ids) > 2.5  # characters per token
    assert to_bytes(ids) == text.encode()


def test_a_tokenizer_loads_from_a_path_and_by_published_name(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.model)
    monkeypatch.setitem(tokenizers.PUBLISHED, "gemma3", str(path))
    for name in (str(path), "gemma3"):
        loaded = Tokenizer.load(name)
        assert loaded.name == name
        assert loaded.model == tokenizer.model
        assert loaded.encode(["a text"]) == tokenizer.encode(["a text"])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(
        InputError,
        match=r"cannot be read from .*absent.model .*give 'small', 'gemma2', 'gemma3' or the path "
        "of a tokenizer.model",
    ):
        Tokenizer.load(str(tmp_path / "absent.model"))


def test_a_file_that_is_not_a_model_is_refused(tokenizer, tmp_path):
    for content in (b"some text", tokenizer.model[:1000], b""):
        path = tmp_path / "broken.model"
        path.write_bytes(content)
        with pytest.raises(
            InputError, match=r"broken.model: (not a SentencePiece model|special ids)"
        ):
            Tokenizer.load(str(path))


def test_special_ids_other_than_gemmas_are_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 10),
        model_writer=model,
        vocab_size=12,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    with pytest.raises(
        InputError,
        match=re.escape(
            "llama: special ids (pad, eos, bos, unk) are (-1, 2, 1, 0); "
            "expected Gemma's (0, 1, 2, 3)"
        ),
    ):
        Tokenizer(model.getvalue(), "llama")
