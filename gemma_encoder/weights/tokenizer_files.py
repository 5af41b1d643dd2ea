"""A tokenizer as the files of a Hugging Face folder: the same ids there as here, without sentencepiece.

tokenizer.model        the SentencePiece model itself
tokenizer.json         the same for the `tokenizers` library, with the bos and the eos that every text of ours has
tokenizer_config.json  what transformers' AutoTokenizer wants to know besides
"""

import itertools
import json
import math

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer

CHECKED_AT_ONCE = 64  # pieces in one text of the last check: far fewer texts than pieces, and each piece has neighbours


def huggingface_files(tokenizer: Tokenizer, max_length: int, padding: str) -> dict[str, bytes]:
    """The tokenizer files of a Hugging Face folder.

    For every text, `tokenizers.Tokenizer.encode(text).ids` and `AutoTokenizer(...)(text)["input_ids"]` are bos, our ids, eos.
    That holds for a text that spells a special token, too: "<bos>" in a text is five characters, as SentencePiece has it, unless
    someone passes `split_special_tokens=False`. Truncation keeps bos and eos and cuts the text's end, where ours cuts the end of
    the fields that a template names, and never within a character.

    Args:
        tokenizer: what the model was trained with.
        max_length: tokens of a text, bos and eos included.
        padding: the side that padding takes, "right" or "left".

    Returns:
        Contents by file name.

    Raises:
        InputError: the model is not of Gemma's kind (BPE, text taken as it is), or asks for what tokenizer.json cannot say.
    """
    fast = _fast(tokenizer)
    _compare(tokenizer, fast)
    pad, eos, bos, unk = tokenizer.pieces([PAD_ID, EOS_ID, BOS_ID, UNK_ID])
    config = {
        # Not GemmaTokenizer, which makes a special token of the piece <mask>: a text would spell it letter by letter.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "add_bos_token": True,
        "add_eos_token": True,
        "split_special_tokens": True,
        "model_max_length": max_length,
        "padding_side": padding,
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        "tokenizer.model": tokenizer.model,
        "tokenizer.json": fast.to_str().encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def _fast(tokenizer: Tokenizer):
    """The `tokenizers.Tokenizer` that gives bos, the ids of `tokenizer`, eos."""
    import tokenizers  # only here, as sentencepiece's protobuf: whoever exports nothing needs neither
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import decoders, models, normalizers, processors

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    _refuse_other_kinds(tokenizer.name, proto)

    pieces = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    bos, eos, unk = (proto.pieces[i].piece for i in (BOS_ID, EOS_ID, UNK_ID))
    fast = tokenizers.Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=_merges(
                tokenizer,
                {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL},
                pieces,
            ),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    # No pre-tokenizer: SentencePiece merges across words, too.
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.post_processor = processors.TemplateProcessing(
        single=[bos, "$A", eos],
        pair=[bos, "$A", "$B", eos],
        special_tokens=[(bos, BOS_ID), (eos, EOS_ID)],
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # Added tokens are cut out of the text first, leftmost and longest first, exactly as user-defined pieces are. They are found
    # in the normalised text, where spaces are "▁" already; one with a space in it is never found, neither here nor there.
    defined = [
        piece.piece
        for piece in proto.pieces
        if piece.type == kinds.USER_DEFINED and " " not in piece.piece
    ]
    fast.add_tokens(
        [tokenizers.AddedToken(piece, normalized=True, special=False) for piece in defined]
    )
    return fast


def _refuse_other_kinds(name: str, proto) -> None:
    """Raises InputError unless the model takes text as it is and merges pieces by their scores."""
    kind, normaliser = (
        proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type),
        proto.normalizer_spec,
    )
    reasons = {
        f"is a {kind} model": kind != "BPE",
        f"normalises text (rule {normaliser.name!r})": bool(normaliser.precompiled_charsmap),
        "puts a space before the text (add_dummy_prefix)": normaliser.add_dummy_prefix,
        "removes spaces (remove_extra_whitespaces)": normaliser.remove_extra_whitespaces,
        "leaves spaces as they are (escape_whitespaces is off)": not normaliser.escape_whitespaces,
        "has unused pieces": any(piece.type == piece.UNUSED for piece in proto.pieces),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"{name}: the tokenizer {reason}; only one of Gemma's kind (BPE, text taken as it is) can be written as tokenizer.json"
            )


def _merges(
    tokenizer: Tokenizer, scores: dict[str, float], pieces: dict[str, int]
) -> list[tuple[str, str]]:
    """The pairs to merge, first the one that goes first, such that merging by rank does what SentencePiece does by score.

    SentencePiece joins any two neighbours that spell a piece, the best-scored piece first, the leftmost of equals. Until two
    neighbours spell a piece, nothing beyond the piece's ends has played a part, so they are the same two wherever the piece is
    made: those of a text that is the piece alone. One merge a piece is enough, and its place among the scores is its rank.

    Raises:
        InputError: two pieces have one score, or a piece is made from a character that is no piece.
    """
    longer = [piece for piece in scores if len(piece) > 1]
    # SentencePiece itself says which pieces it makes: not those that a better-scored or a user-defined piece always preempts.
    made = [
        piece
        for piece, ids in zip(longer, tokenizer.encode(longer), strict=True)
        if ids == [pieces[piece]]
    ]
    made.sort(key=scores.__getitem__, reverse=True)
    for one, other in itertools.pairwise(made):
        if scores[one] == scores[other]:
            raise InputError(
                f"{tokenizer.name}: the pieces {one!r} and {other!r} have one score; tokenizer.json needs to know which goes first"
            )
    merges = [_last_merge(piece, scores) for piece in made]
    for pair in merges:
        for part in pair:
            if part not in pieces:
                raise InputError(
                    f"{tokenizer.name}: the piece {''.join(pair)!r} is made from {part!r}, which is no piece; tokenizer.json cannot say that"
                )
    return merges


def _last_merge(piece: str, scores: dict[str, float]) -> tuple[str, str]:
    """The two parts that SentencePiece joins last when it spells `piece`."""
    parts = list(piece)
    while len(parts) > 2:
        joined = [scores.get(left + right, -math.inf) for left, right in itertools.pairwise(parts)]
        best = joined.index(max(joined))  # the leftmost of equals
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _compare(tokenizer: Tokenizer, fast) -> None:
    """Raises InputError unless both give the same ids for texts that together hold every piece."""
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    texts = [
        "".join(pieces[i : i + CHECKED_AT_ONCE]) for i in range(0, len(pieces), CHECKED_AT_ONCE)
    ]
    for text, ours, theirs in zip(
        texts, tokenizer.encode(texts), fast.encode_batch(texts), strict=True
    ):
        if theirs.ids != [BOS_ID, *ours, EOS_ID]:
            raise InputError(
                f"{tokenizer.name}: tokenizer.json does not give SentencePiece's ids for {text!r}; only one of Gemma's kind can be exported"
            )
