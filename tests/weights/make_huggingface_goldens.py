"""Makes the checkpoints of Hugging Face transformers, with their outputs, that tests compare this library with.

    HF_HUB_OFFLINE=1 python tests/weights/make_huggingface_goldens.py

Run by hand where torch is installed; the tests read its output only. Seen in about fifteen seconds on one CPU core with Python 3.12,
torch 2.15.0, transformers 5.23.0, sentence-transformers 6.2.0 and sentencepiece 0.2.3. It replaces `huggingface/` beside this file:

    versions.json       of the packages
    CASE/               a tiny model with random float32 weights, as its own `save_pretrained` writes it
    CASE/golden.npz     what the model gives when it is loaded back from that folder, with eager attention:

    tokens [B, L], hidden [B, L, D]           whole rows; the last hidden state, after the final norm (T5Gemma: the encoder's)
    right_tokens, right_mask, right_hidden    the rows cut to different lengths, then padded on the right; the mask is 1 on tokens
    left_tokens, left_mask, left_hidden       the same, padded on the left
    reach [2]                                 tokens that one local layer sees to the left and to the right, by gradients

Padded rows are given position_ids as `generate` makes them: counted from each text's own start, cumsum(mask) - 1, and 0 on padding.
States on padding mean nothing. `embedding_gemma` is a folder of sentence-transformers, and its golden holds instead:

    texts [B], tokens [B, L], mask [B, L]     as its tokenizer gives them, padded on the right
    hidden [B, L, D], pooled [B, D]           after the Transformer, and after the Pooling module
    embedding, query_embedding [B, D]         of the texts alone, and of the texts after the query prompt

Its tokenizer is a cut of the package's small one: the special ids, the bytes, the first merges and the printable ASCII characters.
`tokenizer.model` is put beside what sentence-transformers wrote, because a downloaded EmbeddingGemma has that file too.
"""

import json
import pathlib
import shutil
import tempfile
from importlib import metadata

import numpy as np
import sentencepiece
import torch
import transformers as hf
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentencepiece import sentencepiece_model_pb2

OUTPUT = pathlib.Path(__file__).parent / "huggingface"
SMALL = pathlib.Path(__file__).parents[2] / "gemma_encoder" / "assets" / "small.model"
LENGTHS = (24, 17, 9)  # of the texts; the first two are longer than any reach

TINY = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# A soft cap far below Gemma's 50 and a query scale that is not head_dim^-½, or tiny random weights would not show either of them.
GEMMA2 = {
    **TINY,
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "attn_logit_softcapping": 2.0,
    "query_pre_attn_scalar": 4,
}
GEMMA3 = {**TINY, "sliding_window": 6, "query_pre_attn_scalar": 8}
# The last group of a pattern is cut short here, as it is by 8 layers of the default pattern of 6.
PERIOD_3 = {
    **GEMMA3,
    "num_hidden_layers": 5,
    "layer_types": (["sliding_attention", "sliding_attention", "full_attention"] * 2)[:5],
}
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 200_000.0},
}
VISION = {
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 4,
    "patch_size": 2,
}
IMAGE_TOKENS = {
    "mm_tokens_per_image": 4,
    "boi_token_index": 44,
    "eoi_token_index": 45,
    "image_token_index": 46,
}
PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}
TEXTS = [
    "the acting was not dull .",
    "a sailor bought the lamp near the shop in 1987, and sold it again",
    "naïve ☃",
]


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every parameter drawn anew, norm scales too: as they start, at zero, a wrong one would pass."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def text_encoder(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """The part of a model whose last hidden state is wanted."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


@torch.no_grad()
def states(
    model: hf.PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, L, D] after the final norm."""
    padding = (
        {}
        if mask is None
        else {
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0),
        }
    )
    hidden = text_encoder(model)(input_ids=tokens, **padding).last_hidden_state
    assert hidden.dtype == torch.float32
    return hidden


def reach(model_class: type[hf.PreTrainedModel], folder: pathlib.Path) -> tuple[int, int]:
    """(left, right) tokens whose embeddings have a gradient in the middle state of a model of one local layer, configured as the folder's."""
    config = hf.AutoConfig.from_pretrained(folder)
    text = config.encoder if config.is_encoder_decoder else config.get_text_config()
    text.num_hidden_layers, text.layer_types = 1, ["sliding_attention"]
    model = randomised(model_class(config))
    model.set_attn_implementation("eager")
    middle = 2 * text.sliding_window
    embeddings = torch.randn(1, 2 * middle + 1, text.hidden_size, requires_grad=True)
    text_encoder(model)(inputs_embeds=embeddings).last_hidden_state[0, middle].sum().backward()
    seen = embeddings.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert seen == list(range(seen[0], seen[-1] + 1)) and seen[0] > 0 and seen[-1] < 2 * middle
    return middle - seen[0], seen[-1] - middle


def write_golden(folder: pathlib.Path, arrays: dict, difference: float) -> None:
    """Writes the arrays and prints a line of the table; `difference` is the largest between a text in a padded batch and the same text alone."""
    assert difference < 1e-5, difference
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    arrays = {
        name: array.astype(np.int32) if array.dtype.kind in "ib" else array
        for name, array in arrays.items()
    }
    assert all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind != "U")
    np.savez(folder / "golden.npz", **arrays)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e3
    print(
        f"{folder.name:22} reach {arrays['reach']!s:7} padding changes {difference:.1e}  {size:.0f} kB"
    )


def write_case(case: str, model: hf.PreTrainedModel, **how_to_save) -> None:
    """Saves a model, loads it back, and writes what it gives on whole, right-padded and left-padded rows."""
    folder = OUTPUT / case
    model.save_pretrained(folder, **how_to_save)
    model_class = type(model)
    model, loading = model_class.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading

    columns, lengths = torch.arange(max(LENGTHS)), torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(
        5, 40, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1)
    )  # no special ids
    alone = torch.cat(
        [states(model, row[None, :length])[0] for row, length in zip(tokens, LENGTHS, strict=True)]
    )
    arrays = {
        "tokens": tokens,
        "hidden": states(model, tokens),
        "reach": reach(model_class, folder),
    }
    difference = 0.0
    for side, mask in (("right", columns < lengths), ("left", columns >= max(LENGTHS) - lengths)):
        padded = torch.zeros_like(tokens)
        padded[mask] = tokens[columns < lengths]
        hidden = states(model, padded, mask.long())
        arrays |= {f"{side}_tokens": padded, f"{side}_mask": mask, f"{side}_hidden": hidden}
        difference = max(difference, (hidden[mask] - alone).abs().max().item())
    write_golden(folder, arrays, difference)


def small_tokenizer(folder: pathlib.Path) -> hf.GemmaTokenizer:
    """A Gemma tokenizer of a few hundred pieces, whose `tokenizer.model` is written into the folder. It adds bos and eos, as EmbeddingGemma's."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(SMALL.read_bytes())
    kept = [
        piece
        for i, piece in enumerate(proto.pieces)
        if i < 360 or (len(piece.piece) == 1 and piece.piece < "\x7f") or piece.piece == "▁"
    ]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    proto.trainer_spec.vocab_size = len(kept)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = hf.GemmaTokenizer.from_pretrained(
        folder, add_bos_token=True, add_eos_token=True, padding_side="right", model_max_length=64
    )
    tokenizer.init_kwargs.pop("vocab_file")  # a path on this machine, which would be saved
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in [*TEXTS, *PROMPTS.values()]:
        assert tokenizer(text)["input_ids"] == [
            pieces.bos_id(),
            *pieces.encode(text),
            pieces.eos_id(),
        ], text
    return tokenizer


def write_embedding_gemma() -> None:
    """Saves a sentence-transformers model with EmbeddingGemma's modules, loads it back, and writes what the modules give."""
    folder = OUTPUT / "embedding_gemma"
    with tempfile.TemporaryDirectory() as name:
        made = pathlib.Path(name)
        tokenizer = small_tokenizer(made)
        config = hf.Gemma3TextConfig(
            **{**PERIOD_3, "vocab_size": 448, "use_bidirectional_attention": True}
        )
        randomised(hf.Gemma3TextModel(config)).save_pretrained(made)
        tokenizer.save_pretrained(made)
        wide, narrow = (
            Dense(*sizes, bias=False, activation_function=torch.nn.Identity())
            for sizes in ((16, 32), (32, 16))
        )
        modules = [
            Transformer(name),
            Pooling(16, "mean"),
            randomised(wide),
            randomised(narrow),
            Normalize(),
        ]
        SentenceTransformer(modules=modules, device="cpu", prompts=PROMPTS).save_pretrained(
            str(folder), create_model_card=False
        )
        shutil.copy(made / "tokenizer.model", folder)

    model = SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"}
    )
    features = model.preprocess(TEXTS)
    arrays = {
        "tokens": features["input_ids"],
        "mask": features["attention_mask"],
        "reach": reach(hf.Gemma3TextModel, folder),
    }
    with torch.no_grad():
        features = model[0](features)
        arrays["hidden"] = features["token_embeddings"]
        arrays["pooled"] = model[1](features)["sentence_embedding"]
    arrays |= {
        "texts": TEXTS,
        "embedding": model.encode(TEXTS),
        "query_embedding": model.encode_query(TEXTS),
    }
    alone = np.stack([model.encode(text) for text in TEXTS])
    write_golden(folder, arrays, np.abs(arrays["embedding"] - alone).max())


def main() -> None:
    hf.utils.logging.disable_progress_bar()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    packages = ("torch", "transformers", "sentence-transformers", "safetensors", "sentencepiece")
    (OUTPUT / "versions.json").write_text(
        json.dumps({package: metadata.version(package) for package in packages}, indent=2) + "\n"
    )

    gemma2 = randomised(hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA2)))
    write_case("gemma2", gemma2, max_shard_size="20KB")  # several files and their index
    bidirectional = hf.Gemma2Model(hf.Gemma2Config(**GEMMA2, is_causal=False))
    bidirectional.load_state_dict(gemma2.model.state_dict())
    write_case("gemma2_bidirectional", bidirectional)

    write_case(
        "gemma3_text",
        randomised(
            hf.Gemma3ForCausalLM(
                hf.Gemma3TextConfig(**GEMMA3, num_hidden_layers=8, rope_parameters=ROPE)
            )
        ),
    )
    write_case(
        "gemma3_bidirectional",
        randomised(
            hf.Gemma3TextModel(hf.Gemma3TextConfig(**PERIOD_3, use_bidirectional_attention=True))
        ),
    )
    assert (
        json.loads((OUTPUT / "gemma3_bidirectional" / "config.json").read_text())["sliding_window"]
        == GEMMA3["sliding_window"]
    )
    vision = hf.Gemma3Config(
        text_config={**PERIOD_3, "query_pre_attn_scalar": 4},
        vision_config={**VISION, "vision_use_head": False},
        **IMAGE_TOKENS,
    )
    write_case("gemma3_vision", randomised(hf.Gemma3ForConditionalGeneration(vision)))

    sides = {
        "encoder": {**GEMMA2, "query_pre_attn_scalar": 8},
        "decoder": {**GEMMA2, "num_hidden_layers": 1},
    }
    write_case(
        "t5gemma",
        randomised(
            hf.T5GemmaForConditionalGeneration(
                hf.T5GemmaConfig(**sides, vocab_size=TINY["vocab_size"])
            )
        ),
    )
    write_embedding_gemma()


if __name__ == "__main__":
    main()
