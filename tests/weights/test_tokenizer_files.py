"""Exported tokenizer files give SentencePiece's ids for any text, or the export is refused."""

import io
import json
import random
import re
from types import SimpleNamespace

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.tokenizer import SMALL, Tokenizer
from gemma_encoder.weights.tokenizer_files import huggingface_files

# Types of pieces.
NORMAL = 1
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
DEFINED = [
    "<mask>",
    "\n\n",
    "\n\n\n",
    "▁▁",
    "▁▁▁",
    "▁▁▁▁",
    "\t",
    "<unused0>",
    "<unused01",
    "<start_of_turn>",
    "<td>",
    "</td>",
]
SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>", "<0x0A>", "bos>"]
ODD = [
    "▁",
    " ",
    "\t",
    "\r\n",
    "\0",
    "\x7f",
    "e\u0301",
    "👩\u200d👩\u200d👧",
    "文",
    "\ufeff",
    "\ufffd",
    "\U0010ffff",
    "٣½",
]
any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
# An integer is the index of a piece of the tokenizer under test, so that texts contain its pieces
# and prefixes of its user-defined ones.
parts = (
    st.integers(0, 10_000)
    | st.sampled_from(SPECIAL + ODD + DEFINED)
    | st.text("ab 01<\n", max_size=8)
    | any_text
)


def corpus() -> list[str]:
    """Returns lines of made-up words, numbers, runs of spaces and tags, the same at every call."""
    rng = random.Random(0)
    syllables = ["ba", "na", "na", "tor", "é", "ing", "aa", "文", "th", "e", "-"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(300)]

    def line() -> str:
        separator = rng.choice([" ", "  ", "\t"])
        options = [*words, str(rng.randrange(3000)), "<td>", "((", "a\tb"]
        return separator.join(rng.choices(options, k=12))

    return [line() for _ in range(400)]


def trained(**options) -> Tokenizer:
    """Returns a tiny tokenizer that is like Gemma's, except for the given options."""
    model = io.BytesIO()
    gemma_options = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "unk_piece": "<unk>",
        "user_defined_symbols": DEFINED,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, **(gemma_options | options)
    )
    return Tokenizer(model.getvalue(), "tiny")


TOKENIZERS = {
    "small": lambda: Tokenizer.load("small"),
    "gemma_like": trained,
    "no_byte_fallback": lambda: trained(
        byte_fallback=False, vocab_size=300, character_coverage=0.99
    ),
}


@pytest.fixture(scope="session", params=TOKENIZERS)
def pair(request):
    """Returns one of our tokenizers, its pieces, and its files loaded by `tokenizers`."""
    ours = TOKENIZERS[request.param]()
    return SimpleNamespace(
        ours=ours, theirs=theirs(ours), pieces=ours.pieces(range(ours.vocab_size))
    )


def theirs(ours: Tokenizer) -> tokenizers.Tokenizer:
    """Exports a tokenizer and loads it by the `tokenizers` library."""
    files = huggingface_files(ours, 128, "right")
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())


def joined(pieces, parts) -> str:
    """Joins parts to a text; an integer is the index of a piece."""
    return "".join(part if isinstance(part, str) else pieces[part % len(pieces)] for part in parts)


@settings(max_examples=300)
@given(st.lists(parts, max_size=20))
def test_ids_are_sentencepieces_between_bos_and_eos(pair, parts):
    drawn = joined(pair.pieces, parts)
    for text in (drawn, drawn.replace("▁", " ")):
        [ids] = pair.ours.encode([text])
        assert pair.theirs.encode(text).ids == [2, *ids, 1]


@st.composite
def odd_models(draw):
    """Draws models that no training yields: overlapping pieces over few characters, any scores."""
    alphabet = draw(st.sampled_from(["a", "ab", "ab▁", "aé\n"]))
    pieces = draw(
        st.lists(st.text(alphabet, min_size=2, max_size=7), unique=True, min_size=1, max_size=20)
    )
    scores = draw(st.permutations(range(len(pieces))))
    kinds = draw(
        st.lists(
            st.sampled_from([NORMAL] * 6 + [USER_DEFINED]),
            min_size=len(pieces),
            max_size=len(pieces),
        )
    )
    return alphabet, [
        *zip(pieces, scores, kinds, strict=True),
        *((character, -1000, NORMAL) for character in alphabet),
    ]


def model_of(pieces) -> Tokenizer:
    """Returns a model of the small one's special and byte pieces, and (piece, score, type)s."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(SMALL.read_bytes())
    del proto.pieces[261:]
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    return Tokenizer(proto.SerializeToString(), "odd")


@settings(max_examples=150)
@given(odd_models(), st.data())
def test_merges_follow_any_scores(model, data):
    alphabet, pieces = model
    ours = model_of(pieces)
    exported = theirs(ours)
    for text in data.draw(st.lists(st.text(alphabet + " ", max_size=40), min_size=5, max_size=5)):
        [ids] = ours.encode([text])
        assert exported.encode(text).ids == [2, *ids, 1]


def test_a_piece_is_one_merge_in_the_order_of_scores():
    # "aba" is always made of "ab" and "a", since "ab" has a better score than "ba".
    exported = theirs(
        model_of(
            [
                ("aba", -2, NORMAL),
                ("ba", -1, NORMAL),
                ("ab", 0, NORMAL),
                ("a", -9, NORMAL),
                ("b", -10, NORMAL),
            ]
        )
    )
    assert json.loads(exported.to_str())["model"]["merges"] == [["a", "b"], ["b", "a"], ["ab", "a"]]


def test_a_special_token_within_a_text_is_text(pair):
    for name in ("<bos>", "<eos>", "<pad>", "<unk>"):
        encoding = pair.theirs.encode(f"a{name}b")
        assert encoding.special_tokens_mask == [1, *[0] * (len(encoding.ids) - 2), 1]
        assert not {0, 1, 2} & set(encoding.ids[1:-1])


def test_a_user_defined_piece_within_a_text_is_that_piece():
    exported = theirs(trained())
    for name in DEFINED:
        assert exported.encode("a" + name.replace("▁", " ") + "b").tokens[2:-2] == [name]
    # The longest match at the leftmost position: four spaces, then one; "<unused01", not
    # "<unused0".
    assert exported.encode(" " * 5 + "<unused01>").tokens == [
        "<bos>",
        "▁▁▁▁",
        "▁",
        "<unused01",
        "<0x3E>",
        "<eos>",
    ]


def test_ids_decode_to_the_text():
    ours = trained()
    text = "a  banana,\n\n 12 <td> <bos> 文👩"
    assert theirs(ours).decode(ours.encode([text])[0]) == text


def test_truncation_keeps_bos_and_eos(pair):
    text = "a banana and a banana"
    [ids] = pair.ours.encode([text])
    exported = theirs(pair.ours)
    for length in range(2, len(ids) + 2):
        exported.enable_truncation(length)
        assert exported.encode(text).ids == [2, *ids[: length - 2], 1]


def test_a_pair_is_encoded_as_a_single_text(pair):
    [first], [second] = (pair.ours.encode([text]) for text in ("a ban", "ana b"))
    assert pair.theirs.encode("a ban", "ana b").ids == [2, *first, *second, 1]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_files_have_the_settings_that_transformers_needs(padding):
    tokenizer = trained()
    files = huggingface_files(tokenizer, 77, padding)
    assert list(files) == ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"]
    assert files["tokenizer.model"] == tokenizer.model
    config = json.loads(files["tokenizer_config.json"])
    assert (config["model_max_length"], config["padding_side"], config["truncation_side"]) == (
        77,
        padding,
        "right",
    )
    assert [config[f"{name}_token"] for name in ("pad", "eos", "bos", "unk")] == [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
    ]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # reads tokenizer.json unchanged
    assert config["split_special_tokens"]  # "<bos>" in a text is text there, too
    assert config["add_bos_token"]
    assert config["add_eos_token"]
    # No token types, which the model does not accept.
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert not config["clean_up_tokenization_spaces"]

    exported = json.loads(files["tokenizer.json"])
    assert exported["truncation"] is exported["padding"] is None  # left to the caller
    assert exported["pre_tokenizer"] is None
    assert [token["content"] for token in exported["added_tokens"]] == DEFINED
    assert not any(token["special"] for token in exported["added_tokens"])
    assert exported["model"]["vocab"] == {
        piece: i for i, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size)))
    }


def edited(change) -> Tokenizer:
    """Returns the tiny tokenizer with a modified model."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained().model)
    change(proto)
    return Tokenizer(proto.SerializeToString(), "tiny")


def with_pieces(*pieces) -> Tokenizer:
    """Returns the tiny tokenizer with further (piece, score, type)s."""

    def add(proto) -> None:
        for piece, score, kind in pieces:
            proto.pieces.add(piece=piece, score=score, type=kind)

    return edited(add)


UNSUPPORTED = {
    "is a UNIGRAM model": lambda: trained(model_type="unigram", vocab_size=350),
    "normalizes text (rule 'nfkc')": lambda: trained(normalization_rule_name="nfkc"),
    "prepends a space (add_dummy_prefix)": lambda: trained(add_dummy_prefix=True),
    "removes spaces (remove_extra_whitespaces)": lambda: trained(remove_extra_whitespaces=True),
    "does not escape spaces (escape_whitespaces is off)": lambda: edited(
        lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False)
    ),
    "has unused pieces": lambda: edited(lambda proto: setattr(proto.pieces[-1], "type", UNUSED)),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_a_tokenizer_unlike_gemmas_is_refused(reason):
    message = (
        f"tiny: the tokenizer {reason}; only tokenizers like Gemma's (BPE without text "
        "normalization) can be exported"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        huggingface_files(UNSUPPORTED[reason](), 128, "right")


def test_pieces_of_equal_scores_are_refused():
    tokenizer = with_pieces(("0-", -5000, NORMAL), ("-0", -5000, NORMAL))
    message = (
        "tiny: the pieces '0-' and '-0' have equal scores; tokenizer.json needs a strict order of "
        "merges"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        huggingface_files(tokenizer, 128, "right")


def test_a_piece_with_a_character_that_is_no_piece_is_refused():
    tokenizer = with_pieces(("b☃", -5000, NORMAL))
    message = (
        "tiny: the piece 'b☃' contains '☃', which is not a piece; tokenizer.json cannot represent "
        "this"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        huggingface_files(tokenizer, 128, "right")


def test_unreachable_pieces_do_not_prevent_an_export():
    # "▁▁▁" is user-defined, and a normalized text has no spaces, so none of these pieces is ever
    # made: equal scores and a character that is not a piece are harmless.
    ours = with_pieces(
        ("a▁▁▁", -5000, NORMAL),
        ("a b", -5001, NORMAL),
        ("a c", 0, USER_DEFINED),
        ("ana☃ ", -5000, NORMAL),
    )
    exported = theirs(ours)
    for text in ("a    b", "a b", "a c", "ana☃ "):
        assert exported.encode(text).ids[1:-1] == ours.encode([text])[0]


def test_unforeseen_differences_are_refused():
    # A control piece of one character: SentencePiece encodes the character as bytes, tokenizer.json
    # would give the piece.
    message = (
        "tiny: tokenizer.json and SentencePiece give different ids for '.*☃.*'; only tokenizers "
        "like Gemma's can be exported"
    )
    with pytest.raises(InputError, match=message):
        huggingface_files(with_pieces(("☃", 0, CONTROL)), 128, "right")
