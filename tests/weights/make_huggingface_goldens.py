"""Makes the golden folders: tiny checkpoints of Hugging Face transformers, and their outputs.

    HF_HUB_OFFLINE=1 python tests/weights/make_huggingface_goldens.py

Run by hand where torch is installed; the tests only read its output. It takes about fifteen seconds
on one CPU core with Python 3.12, torch 2.15.0, transformers 5.23.0, sentence-transformers 6.2.0 and
sentencepiece 0.2.3. It replaces `huggingface/` beside this file:

    versions.json       versions of the packages
    CASE/               a tiny model with random float32 weights, written by its `save_pretrained`
    CASE/golden.npz     outputs of the model loaded from that folder, with eager attention:

    tokens [B, L], hidden [B, L, D]           rows without padding; the last hidden state, after the
                                              final norm (T5Gemma: the encoder's)
    right_tokens, right_mask, right_hidden    the rows truncated to different lengths and padded on
                                              the right; the mask is 1 on tokens
    left_tokens, left_mask, left_hidden       the same, padded on the left
    reach [2]                                 tokens to the left and to the right that one local
                                              layer attends to, measured by gradients

Padded rows have the position_ids that `generate` makes: cumsum(mask) - 1 in each text, 0 on
padding. States on padding are undefined. `embedding_gemma` is a sentence-transformers folder, and
its golden file has instead:

    texts [B], tokens [B, L], mask [B, L]     as its tokenizer returns them, padded on the right
    hidden [B, L, D], pooled [B, D]           after the Transformer and the Pooling module
    embedding, query_embedding [B, D]         of the texts, and of the texts after the query prompt

Its tokenizer is a part of the package's small one: the special ids, the bytes, the first merges and
the printable ASCII characters. `tokenizer.model` is added to the files of sentence-transformers,
because a downloaded EmbeddingGemma has it too.
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
# With tiny random weights, Gemma's soft cap of 50 and a query scale of head_dim^-½ would have no
# measurable effect; these values do.
GEMMA2 = {
    **TINY,
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "attn_logit_softcapping": 2.0,
    "query_pre_attn_scalar": 4,
}
GEMMA3 = {**TINY, "sliding_window": 6, "query_pre_attn_scalar": 8}
# The last group of the pattern is incomplete, as in 8 layers of the default pattern of 6.
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


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Draws every parameter of a model at random, in place, and returns the model.

    This includes norm scales: at their initial value, zero, an error in them would not show.
    """
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def text_encoder(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """Returns the part of a model whose last hidden state is compared."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


@torch.no_grad()
def states(
    model: hf.PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns hidden states after the final norm, [B, L, D]."""
    padding = {}
    if mask is not None:
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        padding = {"attention_mask": mask, "position_ids": positions}
    hidden = text_encoder(model)(input_ids=tokens, **padding).last_hidden_state
    assert hidden.dtype == torch.float32
    return hidden


def reach(model_class: type[hf.PreTrainedModel], folder: pathlib.Path) -> tuple[int, int]:
    """Measures the reach of a local layer.

    Takes the folder's config with a single local layer, and the gradient of the middle token's
    state.

    Returns:
        (left, right): the number of tokens to each side whose embeddings have a gradient.
    """
    config = hf.AutoConfig.from_pretrained(folder)
    text = config.encoder if config.is_encoder_decoder else config.get_text_config()
    text.num_hidden_layers = 1
    text.layer_types = ["sliding_attention"]
    model = randomized(model_class(config))
    model.set_attn_implementation("eager")
    middle = 2 * text.sliding_window
    embeddings = torch.randn(1, 2 * middle + 1, text.hidden_size, requires_grad=True)
    text_encoder(model)(inputs_embeds=embeddings).last_hidden_state[0, middle].sum().backward()
    seen = embeddings.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert seen == list(range(seen[0], seen[-1] + 1)) and seen[0] > 0 and seen[-1] < 2 * middle
    return middle - seen[0], seen[-1] - middle


def write_golden(folder: pathlib.Path, arrays: dict, difference: float) -> None:
    """Writes the arrays and prints a line of a table.

    Args:
        folder: folder of the case.
        arrays: arrays by name.
        difference: the largest difference between a text in a padded batch and alone.
    """
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
        f"{folder.name:22} reach {arrays['reach']!s:7} padding changes {difference:.1e}  "
        f"{size:.0f} kB"
    )


def write_case(case: str, model: hf.PreTrainedModel, **save_options) -> None:
    """Saves a model, loads it, and writes its outputs for rows without and with padding."""
    folder = OUTPUT / case
    model.save_pretrained(folder, **save_options)
    model_class = type(model)
    model, loading = model_class.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading

    columns = torch.arange(max(LENGTHS))
    lengths = torch.tensor(LENGTHS)[:, None]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(
        5, 40, (len(LENGTHS), max(LENGTHS)), generator=generator
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
    """Makes a Gemma tokenizer of a few hundred pieces and writes its `tokenizer.model`.

    It adds bos and eos, as EmbeddingGemma's does.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(SMALL.read_bytes())
    selected = [
        piece
        for index, piece in enumerate(proto.pieces)
        if index < 360 or (len(piece.piece) == 1 and piece.piece < "\x7f") or piece.piece == "▁"
    ]
    del proto.pieces[:]
    proto.pieces.extend(selected)
    proto.trainer_spec.vocab_size = len(selected)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = hf.GemmaTokenizer.from_pretrained(
        folder, add_bos_token=True, add_eos_token=True, padding_side="right", model_max_length=64
    )
    tokenizer.init_kwargs.pop("vocab_file")  # a path on this machine, which would be saved
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in [*TEXTS, *PROMPTS.values()]:
        expected = [pieces.bos_id(), *pieces.encode(text), pieces.eos_id()]
        assert tokenizer(text)["input_ids"] == expected, text
    return tokenizer


def write_embedding_gemma() -> None:
    """Saves a sentence-transformers model like EmbeddingGemma, loads it, and writes its outputs."""
    folder = OUTPUT / "embedding_gemma"
    with tempfile.TemporaryDirectory() as name:
        made = pathlib.Path(name)
        tokenizer = small_tokenizer(made)
        config = hf.Gemma3TextConfig(
            **{**PERIOD_3, "vocab_size": 448, "use_bidirectional_attention": True}
        )
        randomized(hf.Gemma3TextModel(config)).save_pretrained(made)
        tokenizer.save_pretrained(made)
        wide, narrow = (
            Dense(*sizes, bias=False, activation_function=torch.nn.Identity())
            for sizes in ((16, 32), (32, 16))
        )
        modules = [
            Transformer(name),
            Pooling(16, "mean"),
            randomized(wide),
            randomized(narrow),
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
    write_gemma2()
    write_gemma3()
    write_t5gemma()
    write_embedding_gemma()


def write_gemma2() -> None:
    causal = randomized(hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA2)))
    write_case("gemma2", causal, max_shard_size="20KB")  # several files and their index
    bidirectional = hf.Gemma2Model(hf.Gemma2Config(**GEMMA2, is_causal=False))
    bidirectional.load_state_dict(causal.model.state_dict())
    write_case("gemma2_bidirectional", bidirectional)


def write_gemma3() -> None:
    text = hf.Gemma3TextConfig(**GEMMA3, num_hidden_layers=8, rope_parameters=ROPE)
    write_case("gemma3_text", randomized(hf.Gemma3ForCausalLM(text)))
    bidirectional = hf.Gemma3TextConfig(**PERIOD_3, use_bidirectional_attention=True)
    write_case("gemma3_bidirectional", randomized(hf.Gemma3TextModel(bidirectional)))
    saved = json.loads((OUTPUT / "gemma3_bidirectional" / "config.json").read_text())
    assert saved["sliding_window"] == GEMMA3["sliding_window"]
    vision = hf.Gemma3Config(
        text_config={**PERIOD_3, "query_pre_attn_scalar": 4},
        vision_config={**VISION, "vision_use_head": False},
        **IMAGE_TOKENS,
    )
    write_case("gemma3_vision", randomized(hf.Gemma3ForConditionalGeneration(vision)))


def write_t5gemma() -> None:
    config = hf.T5GemmaConfig(
        encoder={**GEMMA2, "query_pre_attn_scalar": 8},
        decoder={**GEMMA2, "num_hidden_layers": 1},
        vocab_size=TINY["vocab_size"],
    )
    write_case("t5gemma", randomized(hf.T5GemmaForConditionalGeneration(config)))


if __name__ == "__main__":
    main()
