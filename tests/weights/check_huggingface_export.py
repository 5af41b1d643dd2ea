"""Compares exports, loaded by transformers and sentence-transformers, with our own predictions.

Run by hand, in two environments, because the test environment has no torch:

    python tests/weights/check_huggingface_export.py make FOLDER      with gemma_encoder installed
    python tests/weights/check_huggingface_export.py compare FOLDER   with torch, transformers and
                                                                      sentence-transformers

The second prints the largest differences of embeddings and probabilities for each export, of
retrievers also of queries and documents, of sparse ones of the weights of words, and exits with a
non-zero code if one exceeds 1e-5.
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
SPARSE_CASES = {
    "sparse": {"soft_cap": None, "words": 1000, "attention": "bidirectional"},
    "sparse_soft_cap": {"soft_cap": 3.0, "words": 1000, "attention": "bidirectional"},
    "sparse_few_words": {"soft_cap": None, "words": 20, "attention": "causal"},
}
WIDTH = 8  # first dimensions of a retriever's vectors


def make(folder: pathlib.Path) -> None:
    """Writes exports that cover families, masks, poolers and heads, and our predictions for each.

    Windows are far shorter than the texts.
    """
    from gemma_encoder.model.config import HeadConfig, PoolingConfig

    fields = {
        "mean": {},
        "first": {
            "pooling": PoolingConfig("first_k"),
            "heads": {"t": HeadConfig(3, hidden_dims=(12, 6))},
        },
        "last_causal": {"pooling": PoolingConfig("last_k"), "attention": "causal"},
        "projected": {"pooling": PoolingConfig("mean", projection=(48, 16), normalize=True)},
        "retriever": {
            "pooling": PoolingConfig("mean", projection=(16,), normalize=True),
            "heads": {"t": 3, "find": HeadConfig(16, "embedding")},
        },
    }
    for family, transformer in _transformers().items():
        for name, changes in fields.items():
            padding = "left" if name == "mean" else "right"
            _make_export(folder / f"{family}_{name}", transformer, changes, padding)
        for name, options in SPARSE_CASES.items():
            _make_sparse(folder / f"{family}_{name}", transformer, **options)


def _transformers() -> dict:
    """Returns a small transformer of each family."""
    import dataclasses

    from gemma_encoder.model.sizes import GEMMA_CONFIGS

    small = {
        "embed_dim": 32,
        "hidden_dim": 48,
        "num_heads": 4,
        "head_dim": 8,
        "query_scale": 7**-0.5,
        "sliding_window": 6,
    }
    return {
        "gemma2": dataclasses.replace(
            GEMMA_CONFIGS["gemma2_tiny"], **small, attention_soft_cap=2.0
        ),
        "gemma3": dataclasses.replace(
            GEMMA_CONFIGS["gemma3_tiny"], **small, num_layers=5, global_rope_scale=8.0
        ),
    }


def _make_export(folder: pathlib.Path, transformer, changes: dict, padding: str) -> None:
    """Writes one export with random parameters, and `ours.npz` in it."""
    from gemma_encoder.inference import export_huggingface
    from gemma_encoder.inputs.task import Task
    from gemma_encoder.inputs.template import Template
    from gemma_encoder.model.config import EncoderConfig

    tasks = [
        Task("t", "classification", Template("{text}"), metrics=("accuracy",), classes=tuple("abc"))
    ]
    if "find" in changes.get("heads", {}):
        tasks.append(_retrieval_task("retrieval"))
    defaults = {"heads": {"t": 3}, "compute_dtype": "float32"}
    config = EncoderConfig(transformer, **(defaults | changes))
    predictor = _predictor(config, tuple(tasks), padding)
    exported = export_huggingface(predictor, folder)
    ours = {"embed": predictor.embed(TEXTS), "predict": predictor.predict(TEXTS, task="t")}
    if len(tasks) > 1:
        ours |= {role: predictor.embed(TEXTS, role=role) for role in ("query", "document")}
    np.savez(exported / "ours.npz", **ours)


def _make_sparse(
    folder: pathlib.Path, transformer, soft_cap: float | None, words: int, attention: str
) -> None:
    """Writes an export of a sparse retriever, and its vectors [N, V] as `ours.npz` in it."""
    import dataclasses

    from gemma_encoder.inference import export_huggingface
    from gemma_encoder.model.config import EncoderConfig, HeadConfig

    config = EncoderConfig(
        dataclasses.replace(transformer, final_soft_cap=soft_cap),
        heads={"find": HeadConfig(2 * words, "sparse")},
        attention=attention,
        compute_dtype="float32",
    )
    predictor = _predictor(config, (_retrieval_task("sparse_retrieval"),), "right")
    exported = export_huggingface(predictor, folder)
    vectors = {}
    for role in ("query", "document"):
        ids, weights = predictor.embed_sparse(TEXTS, role=role)
        vectors[role] = np.zeros((len(TEXTS), transformer.vocab_size), np.float32)
        for row, of_text, values in zip(vectors[role], ids, weights, strict=True):
            np.add.at(row, of_text, values)  # an id may occur again with the weight 0
    np.savez(exported / "ours.npz", **vectors)


def _retrieval_task(kind: str):
    from gemma_encoder.inputs.task import Task
    from gemma_encoder.inputs.template import Template

    roles = (("query", Template("ask: {query}")), ("document", Template("text: {document}")))
    return Task("find", kind, roles[1][1], head="find", role_templates=roles)


def _predictor(config, tasks: tuple, padding: str):
    """Returns a predictor with random parameters, for texts of at most 100 tokens."""
    import jax

    from gemma_encoder.inference import Predictor
    from gemma_encoder.inputs.tokenizer import Tokenizer
    from gemma_encoder.model.encoder import abstract_encoder
    from gemma_encoder.weights.native import InferenceSpec

    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda leaf: np.asarray(0.2 * rng.standard_normal(leaf.shape), np.float32),
        abstract_encoder(config).shapes,
    )
    spec = InferenceSpec(config, tasks, Tokenizer.load("small"), 100, 128, padding, 0)
    return Predictor(spec, parameters)


def compare(folder: pathlib.Path) -> int:
    """Prints the largest differences of each export; returns the number of exports that differ."""
    import torch
    from sentence_transformers import SentenceTransformer

    num_different = 0
    for export in sorted(path for path in folder.iterdir() if path.is_dir()):
        ours = np.load(export / "ours.npz")
        if "embed" not in ours:
            weights = _compare_sparse(export, ours)
            num_different += not weights < TOLERANCE
            size = max(np.abs(ours[role]).max() for role in ours)
            print(f"{export.name:<24} weights of words {weights:.1e}  (of size {size:.1f})")
            continue
        model = SentenceTransformer(str(export), device="cpu")
        embed = np.abs(model.encode(TEXTS) - ours["embed"]).max()
        tokenize = model.preprocess if hasattr(model, "preprocess") else model.tokenize
        with torch.no_grad():
            features = model(tokenize(TEXTS))
        predict = np.abs(torch.softmax(features["scores"], -1).numpy() - ours["predict"]).max()
        roles = _compare_roles(model, ours) if "query" in ours else 0.0
        num_different += not max(embed, predict, roles) < TOLERANCE
        size = np.abs(ours["embed"]).max()
        print(
            f"{export.name:<24} embedding {embed:.1e}  probabilities {predict:.1e}  "
            f"roles {roles:.1e}  (of size {size:.1f})"
        )
    return num_different


def _compare_roles(model, ours) -> float:
    """Returns the largest difference of queries and documents, whole and truncated."""
    queries, documents = ours["query"], ours["document"]
    short = queries[:, :WIDTH] / np.linalg.norm(queries[:, :WIDTH], axis=1, keepdims=True)
    cut = {"truncate_dim": WIDTH, "normalize_embeddings": True}
    pairs = [
        (model.encode_query(TEXTS), queries),
        (model.encode_document(TEXTS), documents),
        (model.encode_query(TEXTS, **cut), short),
        (model.encode_document(TEXTS, truncate_dim=WIDTH), documents[:, :WIDTH]),
        (model.encode(TEXTS, prompt_name="t"), ours["embed"]),  # an empty prompt
        (model.similarity(queries, documents).numpy(), queries @ documents.T),
    ]
    return max(np.abs(theirs - expected).max() for theirs, expected in pairs)


def _compare_sparse(export: pathlib.Path, ours) -> float:
    """Returns the largest difference of the weights of queries and documents."""
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(export), device="cpu")
    pairs = [
        (model.encode_query(TEXTS), ours["query"]),
        (model.encode_document(TEXTS), ours["document"]),
    ]
    return max(np.abs(theirs.to_dense().numpy() - expected).max() for theirs, expected in pairs)


if __name__ == "__main__":
    command, path = sys.argv[1:]
    sys.exit({"make": make, "compare": compare}[command](pathlib.Path(path)))
