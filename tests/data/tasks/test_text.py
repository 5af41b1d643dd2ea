"""Unlabeled text: sources, splitting of long texts without loss, and errors."""

import gzip

import numpy as np
import pytest

from gemma_encoder.data import cache, registry
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.tasks.text import split_texts
from gemma_encoder.inputs.errors import InputError


def source(**text):
    return registry.get("text", DataOptions(text=text))


@pytest.mark.parametrize("most", [6, 20, 254])
def test_long_texts_are_split_at_spaces_without_loss(tokenizer, most):
    rng = np.random.default_rng(0)
    words = ["a", "fine", "film", "unbelievable", "…", "café", "2,000", "don't"]
    texts = [" ".join(rng.choice(words, count)) for count in (1, 3, 30, 400)]
    for text in texts:
        pieces = split_texts([text], tokenizer, most)
        assert " ".join(pieces) == text
        lengths = [len(ids) for ids in tokenizer.encode(pieces)]
        assert max(lengths) <= most
        assert len(pieces) <= 1 + 3 * len(tokenizer.encode([text])[0]) / most, (
            "pieces are as long as possible"
        )
    assert split_texts(texts, tokenizer, most) == [
        piece for text in texts for piece in split_texts([text], tokenizer, most)
    ]


@pytest.mark.parametrize("text", ["x" * 90, "    " + "é" * 40 + "  ", "a " + "b" * 60, "𝄞" * 20])
def test_a_long_word_is_split_between_characters(tokenizer, text):
    pieces = split_texts([text], tokenizer, 10)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert max(len(ids) for ids in tokenizer.encode(pieces)) <= 10 and all(
        piece.strip() for piece in pieces
    )


def test_texts_of_all_file_types_are_deduplicated(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nheld\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"two\nthree\r\n"))
    (tmp_path / "c.tsv").write_text("7\tfour\n8\tone\n")
    (tmp_path / "d.txt").write_text("held\nout\n")
    texts = source(
        train=[str(tmp_path / name) for name in ("a.txt", "b.txt.gz", "c.tsv")],
        validation=(str(tmp_path / "d.txt"),),
    )
    texts.check()
    texts.fit(tokenizer, 64)
    assert list(texts.pieces("train")) == ["one", "two", "three", "four"]
    assert list(texts.pieces("validation")) == ["held", "out"]
    assert (texts.size("train"), texts.size("validation")) == (4, 2)
    assert [texts.examples("train", index)[0].fields for index in range(4)] == [
        {"text": "one"},
        {"text": "two"},
        {"text": "three"},
        {"text": "four"},
    ]


def test_all_texts_of_datasets_are_read(benchmarks):
    made = source(train=("tfds:glue/sst2", "tfds:glue/mrpc"))
    made.check()
    texts = [*made.pieces("train"), *made.pieces("validation")]
    assert {"train film 0", "first 0", "second 0"} <= {text.strip() for text in texts}
    assert not any(text.startswith(("dev", "test")) for text in texts)


def test_the_held_out_fraction_is_repeatable(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"text {index}\n" for index in range(50)))
    first, second = [source(train=(str(path),), held_out=0.1) for _ in range(2)]
    second.fit(tokenizer, 8)
    held_out = list(first.pieces("validation"))
    assert held_out == list(second.pieces("validation")) and len(held_out) == 5
    assert sorted([*first.pieces("train"), *held_out]) == sorted(
        f"text {index}" for index in range(50)
    )
    few = registry.get("text", DataOptions(text={"train": (str(path),)}, max_train_examples=3))
    assert (few.size("train"), few.size("validation")) == (3, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({}, "text.train is not set; set it to files and datasets"),
        ({"train": ("a",), "held_out": 1.0}, "text.held_out must be between 0 and 1, got 1.0"),
        ({"train": ("nowhere.txt",)}, "text: nowhere.txt is not a file"),
        (
            {"train": ("tfds:glue/nothing",)},
            "text: no prepared data in .*glue/nothing.*tfds build glue/nothing",
        ),
        ({"train": ("empty.txt",)}, "text.train: no text is left in empty.txt"),
        (
            {"train": ("same.txt",), "validation": ("same.txt",)},
            "text.train: no text is left in same.txt",
        ),
        ({"train": ("latin.txt",)}, "latin.txt:1: not valid UTF-8"),
    ],
)
def test_invalid_sources_are_errors(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "same.txt").write_text("a text\n")
    (tmp_path / "latin.txt").write_bytes("naïve\n".encode("latin-1"))
    with pytest.raises(InputError, match=message):
        texts = source(**text)
        texts.check()
        texts.size("train")


def test_a_large_corpus_is_cached(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(cache, "KEEP_FROM", 0)
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.txt"
    path.write_text("".join(f"text {index}\n" for index in range(50)))
    pieces = []
    for _ in range(2):
        made = source(train=(str(path),))
        made.fit(tokenizer, 16)
        pieces.append([*made.pieces("train"), *made.pieces("validation")])
    assert pieces[0] == pieces[1] and len(pieces[0]) == 50
