"""Export of a tokenizer to the files of a Hugging Face folder, which give the same ids as ours.

tokenizer.model        the SentencePiece model itself
tokenizer.json         the same for the `tokenizers` library, with bos and eos around every text
tokenizer_config.json  settings for transformers' AutoTokenizer
"""

import itertools
import math

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.inputs.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer

PIECES_PER_TEXT = 64  # in the final comparison: fewer texts than pieces, and pieces have neighbors


def huggingface_files(tokenizer: Tokenizer, max_length: int, padding: str) -> dict[str, bytes]:
    """Returns the tokenizer files of a Hugging Face folder.

    For every text, `tokenizers.Tokenizer.encode(text).ids` and
    `AutoTokenizer(...)(text)["input_ids"]` are bos, our ids, eos. This includes texts that contain
    a special token: "<bos>" in a text is tokenized as five characters, as in SentencePiece, unless
    the caller passes `split_special_tokens=False`. Truncation keeps bos and eos and removes the end
    of the text, whereas ours removes the end of the fields that a template names and never splits a
    character.

    Args:
        tokenizer: the model's tokenizer.
        max_length: maximum number of tokens of a text, bos and eos included.
        padding: padding side, "right" or "left".

    Returns:
        File contents by file name.

    Raises:
        InputError: the tokenizer is not like Gemma's (BPE without text normalization), or
            tokenizer.json cannot represent it.
    """
    fast = _fast(tokenizer)
    _compare(tokenizer, fast)
    pad, eos, bos, unk = tokenizer.pieces([PAD_ID, EOS_ID, BOS_ID, UNK_ID])
    config = {
        # Not GemmaTokenizer, which turns the piece <mask> into a special token: with
        # split_special_tokens it would be tokenized letter by letter.
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
        "tokenizer_config.json": (to_json(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def _fast(tokenizer: Tokenizer):
    """Returns a `tokenizers.Tokenizer` that gives bos, the ids of `tokenizer`, eos."""
    # Imported here, like sentencepiece's protobuf, because only exports need them.
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import decoders, normalizers, processors

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    _check_is_gemma_like(tokenizer.name, proto)
    fast = tokenizers.Tokenizer(_bpe_model(tokenizer, proto))
    # No pre-tokenizer: SentencePiece merges across words too.
    fast.normalizer = normalizers.Replace(" ", "▁")
    bos = proto.pieces[BOS_ID].piece
    eos = proto.pieces[EOS_ID].piece
    fast.post_processor = processors.TemplateProcessing(
        single=[bos, "$A", eos],
        pair=[bos, "$A", "$B", eos],
        special_tokens=[(bos, BOS_ID), (eos, EOS_ID)],
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # Added tokens are split off first, leftmost and longest first, exactly as SentencePiece does
    # with user-defined pieces. They are matched in the normalized text, where a space is "▁", so a
    # piece that contains a space never matches in either library.
    user_defined = [
        piece.piece
        for piece in proto.pieces
        if piece.type == piece.USER_DEFINED and " " not in piece.piece
    ]
    fast.add_tokens(
        [tokenizers.AddedToken(piece, normalized=True, special=False) for piece in user_defined]
    )
    return fast


def _bpe_model(tokenizer: Tokenizer, proto):
    """Returns the `tokenizers.models.BPE` with the pieces and merges of a SentencePiece model."""
    from tokenizers import models

    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    return models.BPE(
        vocab=ids,
        merges=_merges(tokenizer, scores, ids),
        unk_token=proto.pieces[UNK_ID].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _check_is_gemma_like(name: str, proto) -> None:
    """Raises InputError unless the model keeps text unchanged and merges pieces by score."""
    kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
    normalizer = proto.normalizer_spec
    reasons = {
        f"is a {kind} model": kind != "BPE",
        f"normalizes text (rule {normalizer.name!r})": bool(normalizer.precompiled_charsmap),
        "prepends a space (add_dummy_prefix)": normalizer.add_dummy_prefix,
        "removes spaces (remove_extra_whitespaces)": normalizer.remove_extra_whitespaces,
        "does not escape spaces (escape_whitespaces is off)": not normalizer.escape_whitespaces,
        "has unused pieces": any(piece.type == piece.UNUSED for piece in proto.pieces),
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(
                f"{name}: the tokenizer {reason}; only tokenizers like Gemma's (BPE without text "
                "normalization) can be exported to tokenizer.json"
            )


def _merges(
    tokenizer: Tokenizer, scores: dict[str, float], ids: dict[str, int]
) -> list[tuple[str, str]]:
    """Returns the pairs to merge, by rank, so that merges equal SentencePiece's merges by score.

    SentencePiece joins adjacent parts that form a piece, the best-scored piece first, and among
    equal scores the leftmost. Before a piece is completed, nothing outside it has influenced its
    parts, so the last two parts are the same in every text: those of the text that equals the
    piece. One merge per piece is therefore enough, ranked by the piece's score.

    Args:
        tokenizer: the SentencePiece tokenizer.
        scores: scores of the normal pieces.
        ids: ids of all pieces.

    Raises:
        InputError: two pieces have equal scores, or a piece contains a character that is not a
            piece.
    """
    longer = [piece for piece in scores if len(piece) > 1]
    # SentencePiece never produces a piece that better-scored or user-defined pieces always preempt.
    reachable = [
        piece
        for piece, encoded in zip(longer, tokenizer.encode(longer), strict=True)
        if encoded == [ids[piece]]
    ]
    reachable.sort(key=scores.__getitem__, reverse=True)
    for first, second in itertools.pairwise(reachable):
        if scores[first] == scores[second]:
            raise InputError(
                f"{tokenizer.name}: the pieces {first!r} and {second!r} have equal scores; "
                "tokenizer.json needs a strict order of merges"
            )
    merges = [_last_merge(piece, scores) for piece in reachable]
    for pair in merges:
        for part in pair:
            if part not in ids:
                raise InputError(
                    f"{tokenizer.name}: the piece {''.join(pair)!r} contains {part!r}, which is "
                    "not a piece; tokenizer.json cannot represent this"
                )
    return merges


def _last_merge(piece: str, scores: dict[str, float]) -> tuple[str, str]:
    """Returns the two parts that SentencePiece joins last to form `piece`."""
    parts = list(piece)
    while len(parts) > 2:
        joined = [scores.get(left + right, -math.inf) for left, right in itertools.pairwise(parts)]
        best = joined.index(max(joined))  # the leftmost of equal scores
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _compare(tokenizer: Tokenizer, fast) -> None:
    """Raises InputError unless both give the same ids for texts that together cover every piece."""
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    texts = [
        "".join(pieces[start : start + PIECES_PER_TEXT])
        for start in range(0, len(pieces), PIECES_PER_TEXT)
    ]
    encoded = zip(texts, tokenizer.encode(texts), fast.encode_batch(texts), strict=True)
    for text, ours, theirs in encoded:
        if theirs.ids != [BOS_ID, *ours, EOS_ID]:
            raise InputError(
                f"{tokenizer.name}: tokenizer.json and SentencePiece give different ids for "
                f"{text!r}; only tokenizers like Gemma's can be exported"
            )
