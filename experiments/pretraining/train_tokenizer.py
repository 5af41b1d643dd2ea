"""Trains the tokenizer "small" of the package, `gemma_encoder/assets/small.model`.

    TFDS_DATA_DIR=DATA/tfds python -m gemma_encoder.experiments.pretraining.train_tokenizer \
        --text DATA/text/reviews.train.txt.gz DATA/cranfield_msmarco/collection.tsv \
        --tfds glue/sst2 glue/cola glue/mrpc glue/stsb

The SentencePiece model follows Gemma's conventions (special ids, byte fallback, split digits, no
normalization), so that it can replace Gemma's own tokenizer. The toy tasks' texts come first, so
that their words become single pieces. The same texts give the same model, byte for byte.
"""

import argparse
import hashlib
import io
import pathlib
from collections.abc import Iterable

import sentencepiece

from gemma_encoder.data.tasks import toy_text
from gemma_encoder.data.tasks.text import TFDS, UnlabeledTexts
from gemma_encoder.inputs.tokenizer import BOS_ID, EOS_ID, MASK_ID, PAD_ID, SMALL, UNK_ID, Tokenizer
from gemma_encoder.whole_files import write_whole


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a BPE model of `vocab_size` pieces; returns it serialized."""
    model = io.BytesIO()
    # An iterator and a writer in place of file names, which the model would store.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for text in texts if text.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.9999,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 16,  # in bytes; longer texts would be skipped silently
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        bos_id=BOS_ID,
        unk_id=UNK_ID,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<mask>"],  # takes the first free id, which is MASK_ID
        minloglevel=1,
    )
    return model.getvalue()


def main() -> None:
    """Trains, checks, writes and describes the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text",
        nargs="*",
        type=pathlib.Path,
        default=[],
        help="files with one text per line, .gz or not; of a .tsv, the last column is read",
    )
    parser.add_argument(
        "--tfds",
        nargs="*",
        default=[],
        help="TensorFlow datasets, whose train splits are read from TFDS_DATA_DIR",
    )
    parser.add_argument("--toy_size", type=int, default=4000, help="examples of each toy task")
    parser.add_argument(
        "--vocab_size", type=int, default=8000, help="pieces, special ones included"
    )
    parser.add_argument("--output", type=pathlib.Path, default=SMALL)
    flags = parser.parse_args()

    texts = list(toy_text.corpus(flags.toy_size))
    texts += UnlabeledTexts([*map(str, flags.text), *(f"{TFDS}{name}" for name in flags.tfds)])
    model = train_tokenizer(texts, flags.vocab_size)
    tokenizer = Tokenizer(model, str(flags.output))
    assert tokenizer.pieces([MASK_ID]) == ["<mask>"]

    flags.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(flags.output, model)
    print(
        f"{flags.output}: {tokenizer.vocab_size} pieces from {len(texts)} texts, "
        f"{len(model)} bytes, sha256 {hashlib.sha256(model).hexdigest()}"
    )


if __name__ == "__main__":
    main()
