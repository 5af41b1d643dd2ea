"""Exports, loaded by transformers and sentence-transformers themselves and compared with our own embeddings and scores.

Run by hand, in two environments, since torch has no place in the test set-up:

    python tests/weights/check_huggingface_export.py make FOLDER      with gemma_encoder installed
    python tests/weights/check_huggingface_export.py compare FOLDER   with torch, transformers and sentence-transformers

The second prints, for each export, the largest difference of an embedding and of a score, and exits non-zero above 1e-5.
"""

import pathlib
import sys

import numpy as np

TEXTS = [
    "a fine film",
    "a very long text that says nothing at all , again and again , " * 9,
    "żółć 日本語 🎬",
    "x",
    "two  spaces\tand a tab",
]
TOLERANCE = 1e-5  # float32 on both sides, embeddings of size 1 to 5


def make(folder: pathlib.Path) -> None:
    """One export per combination of family, switch, pooler and head; windows far shorter than the texts."""
    import dataclasses

    import jax

    from gemma_encoder.inference import Predictor, export_huggingface
    from gemma_encoder.inputs.task import Task
    from gemma_encoder.inputs.template import Template
    from gemma_encoder.inputs.tokenizer import Tokenizer
    from gemma_encoder.model.config import EncoderConfig, HeadConfig, PoolingConfig
    from gemma_encoder.model.encoder import abstract_encoder
    from gemma_encoder.model.sizes import GEMMA_CONFIGS
    from gemma_encoder.weights.native import InferenceSpec

    small = {
        "embed_dim": 32,
        "hidden_dim": 48,
        "num_heads": 4,
        "head_dim": 8,
        "query_scale": 7**-0.5,
        "sliding_window": 6,
    }
    families = {
        "gemma2": dataclasses.replace(
            GEMMA_CONFIGS["gemma2_tiny"], **small, attention_soft_cap=2.0
        ),
        "gemma3": dataclasses.replace(
            GEMMA_CONFIGS["gemma3_tiny"], **small, num_layers=5, global_rope_scale=8.0
        ),
    }
    fields = {
        "mean": {},
        "first": {
            "pooling": PoolingConfig("first_k"),
            "heads": {"t": HeadConfig(3, hidden_dims=(12, 6))},
        },
        "last_causal": {"pooling": PoolingConfig("last_k"), "attention": "causal"},
        "projected": {"pooling": PoolingConfig("mean", projection=(48, 16), normalize=True)},
    }
    task = Task(
        "t", "classification", Template("{text}"), metrics=("accuracy",), classes=("a", "b", "c")
    )
    for family, transformer in families.items():
        for name, chosen in fields.items():
            config = EncoderConfig(
                transformer, **{"heads": {"t": 3}, "compute_dtype": "float32"} | chosen
            )
            rng = np.random.default_rng(0)
            parameters = jax.tree.map(
                lambda leaf: np.asarray(0.2 * rng.standard_normal(leaf.shape), np.float32),  # noqa: B023
                abstract_encoder(config).shapes,
            )
            predictor = Predictor(
                InferenceSpec(
                    config,
                    (task,),
                    Tokenizer.load("small"),
                    100,
                    128,
                    "left" if name == "mean" else "right",
                    0,
                ),
                parameters,
            )
            place = export_huggingface(predictor, folder / f"{family}_{name}")
            np.savez(
                place / "ours.npz", embed=predictor.embed(TEXTS), predict=predictor.predict(TEXTS)
            )


def compare(folder: pathlib.Path) -> int:
    """The largest differences; how many exports differ."""
    import torch
    from sentence_transformers import SentenceTransformer

    wrong = 0
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        ours = np.load(place / "ours.npz")
        model = SentenceTransformer(str(place), device="cpu")
        embed = np.abs(model.encode(TEXTS) - ours["embed"]).max()
        with torch.no_grad():
            features = model(
                model.preprocess(TEXTS) if hasattr(model, "preprocess") else model.tokenize(TEXTS)
            )
        predict = np.abs(torch.softmax(features["scores"], -1).numpy() - ours["predict"]).max()
        wrong += not (embed < TOLERANCE and predict < TOLERANCE)
        print(
            f"{place.name:<24} embedding {embed:.1e}  probabilities {predict:.1e}  (of size {np.abs(ours['embed']).max():.1f})"
        )
    return wrong


if __name__ == "__main__":
    command, where = sys.argv[1:]
    sys.exit({"make": make, "compare": compare}[command](pathlib.Path(where)))
