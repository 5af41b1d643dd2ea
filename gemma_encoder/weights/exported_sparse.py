"""Exports of sparse retrievers, as folders of sentence-transformers' `SparseEncoder`.

model*.safetensors   the causal language model of transformers, which config.json makes
                     bidirectional, with its soft cap; `lm_head` is the embedding table with rows of
                     0 for special tokens, which therefore have no weight
1_WordWeights        factors of a token's logits: 0 of special tokens, which so give no weight
2_SpladePooling      the maximum over tokens of log(1 + max(logit, 0))
max_active_dims      the number of weights of a text
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.special_ids import SPECIAL_IDS
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.weights import huggingface, tensors
from gemma_encoder.weights.exported_modules import Module
from gemma_encoder.weights.sentence_modules import POOLING

SPARSE = "sparse"  # the kind of head that gives weights of words
SPLADE = "sentence_transformers.sparse_encoder.models"


def is_sparse(encoder: EncoderConfig) -> bool:
    """Returns True if an encoder is exported as a `SparseEncoder`.

    Raises:
        InputError: it has a sparse head beside something that a `SparseEncoder` does not have.
    """
    sparse = [name for name, head in encoder.heads.items() if head.kind == SPARSE]
    if not sparse:
        return False
    if others := [name for name in encoder.heads if name != sparse[0]]:
        raise InputError(
            f"cannot be exported: a SparseEncoder has no head beside {sparse[0]!r} of kind sparse, "
            f"the encoder has {', '.join(others)}; heads=False leaves them out"
        )
    if encoder.pooling.name not in POOLING or encoder.pooling.projection:
        raise InputError(
            "cannot be exported: a SparseEncoder has no pooler with parameters, the encoder has "
            f"{encoder.pooling.name}, projection {encoder.pooling.projection}"
        )
    return True


def sparse_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the `config.json` of a transformer's language model."""
    name = "Gemma2ForCausalLM" if config["model_type"] == "gemma2" else "Gemma3ForCausalLM"
    return config | {"architectures": [name], "tie_word_embeddings": False}


def sparse_settings(encoder: EncoderConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns fields of sentence_bert_config.json and of config_sentence_transformers.json."""
    (head,) = encoder.heads.values()
    transformer = {
        "transformer_task": "text-generation",
        "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"text": {"logits_to_keep": 0}},  # 0: those of all tokens
    }
    model = {
        "model_type": "SparseEncoder",
        "similarity_fn_name": "dot",
        "max_active_dims": head.outputs // 2,
    }
    return transformer, model


def sparse_modules(encoder: EncoderConfig) -> list[Module]:
    """Returns the modules after the transformer."""
    size = encoder.transformer.vocab_size
    # Words are named by their ids: the names serve to look up the factors only.
    factors = {
        "vocab": [str(index) for index in range(size)],
        "word_weights": {str(index): 0.0 for index in SPECIAL_IDS},
        "unknown_word_weight": 1.0,
    }
    pooling = {
        "pooling_strategy": "max",
        "activation_function": "relu",
        "embedding_dimension": size,
    }
    return [Module("WordWeights", factors), Module("SpladePooling", pooling, package=SPLADE)]


def sparse_tensors(
    backbone: dict, encoder: EncoderConfig, model_type: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of the language model."""
    table = huggingface.tensor_table(model_type, "model.")
    yield from tensors.dump(backbone, encoder.transformer, table)
    head = np.array(backbone["embedding"], np.float32)
    head[list(SPECIAL_IDS)] = 0
    yield "lm_head.weight", head
