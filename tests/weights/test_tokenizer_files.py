"""Exported tokenizer files: the `tokenizers` library gives SentencePiece's ids for any text, or the export is refused."""

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

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of piece
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
# A number stands for a piece of the tokenizer at hand, so that texts hold its pieces and what user-defined ones begin with.
parts = (
    st.integers(0, 10_000)
    | st.sampled_from(SPECIAL + ODD + DEFINED)
    | st.text("ab 01<\n", max_size=8)
    | any_text
)


def corpus() -> list[str]:
    """Lines of made-up words, numbers, runs of spaces and tags, the same at every call."""
    rng = random.Random(0)
    words = [
        "".join(
            rng.choices(
                ["ba", "na", "na", "tor", "é", "ing", "aa", "文", "th", "e", "-"],
                k=rng.randint(1, 4),
            )
        )
        for _ in range(300)
    ]
    return [
        rng.choice([" ", "  ", "\t"]).join(
            rng.choices([*words, str(rng.randrange(3000)), "<td>", "((", "a\tb"], k=12)
        )
        for _ in range(400)
    ]


def trained(**options) -> Tokenizer:
    """A tiny tokenizer of Gemma's kind."""
    model = io.BytesIO()
    gemmas = {
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
        sentence_iterator=iter(corpus()), model_writer=model, **(gemmas | options)
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
    """A tokenizer of ours and what the `tokenizers` library makes of its files."""
    ours = TOKENIZERS[request.param]()
    return SimpleNamespace(
        ours=ours, theirs=theirs(ours), pieces=ours.pieces(range(ours.vocab_size))
    )


def theirs(ours: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(
        huggingface_files(ours, 128, "right")["tokenizer.json"].decode()
    )


def made_of(pieces, parts) -> str:
    return "".join(part if isinstance(part, str) else pieces[part % len(pieces)] for part in parts)


@settings(max_examples=300)
@given(st.lists(parts, max_size=20))
def test_ids_are_sentencepieces_between_bos_and_eos(pair, parts):
    for text in (made_of(pair.pieces, parts), made_of(pair.pieces, parts).replace("▁", " ")):
        [ids] = pair.ours.encode([text])
        assert pair.theirs.encode(text).ids == [2, *ids, 1]


@st.composite
def odd_models(draw):
    """Models that no training gives: any pieces over few characters, so that pieces overlap; any order of scores."""
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
    """The small model's special and byte pieces, then these (piece, score, kind)."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(SMALL.read_bytes())
    del proto.pieces[261:]
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    return Tokenizer(proto.SerializeToString(), "odd")


@settings(max_examples=150)
@given(odd_models(), st.data())
def test_merges_follow_the_scores_whatever_they_are(model, data):
    alphabet, pieces = model
    ours = model_of(pieces)
    exported = theirs(ours)
    for text in data.draw(st.lists(st.text(alphabet + " ", max_size=40), min_size=5, max_size=5)):
        [ids] = ours.encode([text])
        assert exported.encode(text).ids == [2, *ids, 1]


def test_a_piece_is_one_merge_in_the_order_of_scores():
    # "aba" is always "ab" and "a": where "ba" is, it was not taken.
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
    # The longest that begins first: four spaces, then one; "<unused01", not "<unused0" + …
    assert exported.encode(" " * 5 + "<unused01>").tokens == [
        "<bos>",
        "▁▁▁▁",
        "▁",
        "<unused01",
        "<0x3E>",
        "<eos>",
    ]


def test_ids_decode_to_the_text():
    ours, text = trained(), "a  banana,\n\n 12 <td> <bos> 文👩"
    assert theirs(ours).decode(ours.encode([text])[0]) == text


def test_truncation_keeps_bos_and_eos(pair):
    text = "a banana and a banana"
    [ids] = pair.ours.encode([text])
    exported = theirs(pair.ours)
    for length in range(2, len(ids) + 2):
        exported.enable_truncation(length)
        assert exported.encode(text).ids == [2, *ids[: length - 2], 1]


def test_a_pair_is_one_text(pair):
    [one], [other] = pair.ours.encode(["a ban"]), pair.ours.encode(["ana b"])
    assert pair.theirs.encode("a ban", "ana b").ids == [2, *one, *other, 1]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_files_say_what_transformers_needs(padding):
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
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # reads tokenizer.json as it is
    assert config["split_special_tokens"]  # "<bos>" in a text is text there, too
    assert config["add_bos_token"]
    assert config["add_eos_token"]
    assert config["model_input_names"] == [
        "input_ids",
        "attention_mask",
    ]  # no token types, which the model does not take
    assert not config["clean_up_tokenization_spaces"]

    exported = json.loads(files["tokenizer.json"])
    assert exported["truncation"] is exported["padding"] is None  # whoever calls it decides
    assert exported["pre_tokenizer"] is None
    assert [token["content"] for token in exported["added_tokens"]] == DEFINED
    assert not any(token["special"] for token in exported["added_tokens"])
    assert exported["model"]["vocab"] == {
        piece: i for i, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size)))
    }


def edited(change) -> Tokenizer:
    """The tiny tokenizer with its model changed by hand."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained().model)
    change(proto)
    return Tokenizer(proto.SerializeToString(), "tiny")


def with_pieces(*pieces) -> Tokenizer:
    return edited(
        lambda proto: [
            proto.pieces.add(piece=piece, score=score, type=kind) for piece, score, kind in pieces
        ]
    )


OTHER_KINDS = {
    "is a UNIGRAM model": lambda: trained(model_type="unigram", vocab_size=350),
    "normalises text (rule 'nfkc')": lambda: trained(normalization_rule_name="nfkc"),
    "puts a space before the text (add_dummy_prefix)": lambda: trained(add_dummy_prefix=True),
    "removes spaces (remove_extra_whitespaces)": lambda: trained(remove_extra_whitespaces=True),
    "leaves spaces as they are (escape_whitespaces is off)": lambda: edited(
        lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False)
    ),
    "has unused pieces": lambda: edited(lambda proto: setattr(proto.pieces[-1], "type", UNUSED)),
}


@pytest.mark.parametrize("reason", OTHER_KINDS)
def test_a_tokenizer_of_another_kind_is_refused(reason):
    with pytest.raises(
        InputError,
        match=re.escape(
            f"tiny: the tokenizer {reason}; only one of Gemma's kind (BPE, text taken as it is) can be written"
        ),
    ):
        huggingface_files(OTHER_KINDS[reason](), 128, "right")


def test_pieces_of_one_score_are_refused():
    with pytest.raises(
        InputError,
        match=re.escape(
            "tiny: the pieces '0-' and '-0' have one score; tokenizer.json needs to know which goes first"
        ),
    ):
        huggingface_files(with_pieces(("0-", -5000, NORMAL), ("-0", -5000, NORMAL)), 128, "right")


def test_a_piece_made_from_a_character_that_is_no_piece_is_refused():
    with pytest.raises(
        InputError,
        match=re.escape(
            "tiny: the piece 'b☃' is made from '☃', which is no piece; tokenizer.json cannot say that"
        ),
    ):
        huggingface_files(with_pieces(("b☃", -5000, NORMAL)), 128, "right")


def test_a_piece_that_is_never_made_costs_nothing():
    # "▁▁▁" is user-defined, and no text holds a space once it is normalised. So one score and a character that is no piece do no harm.
    ours = with_pieces(
        ("a▁▁▁", -5000, NORMAL),
        ("a b", -5001, NORMAL),
        ("a c", 0, USER_DEFINED),
        ("ana☃ ", -5000, NORMAL),
    )
    exported = theirs(ours)
    for text in ("a    b", "a b", "a c", "ana☃ "):
        assert exported.encode(text).ids[1:-1] == ours.encode([text])[0]


def test_what_differs_for_a_reason_not_foreseen_is_refused():
    # A control piece of one character: SentencePiece spells that character in bytes, tokenizer.json would give the piece.
    with pytest.raises(
        InputError,
        match="tiny: tokenizer.json does not give SentencePiece's ids for '.*☃.*'; only one of Gemma's kind can be exported",
    ):
        huggingface_files(with_pieces(("☃", 0, CONTROL)), 128, "right")
