"""Gemma 2 and Gemma 3 decoders as text encoders for classification, regression and ranking.

Importing the package is fast: each public name is loaded on first use.
"""

import importlib
import os

# Silences the logs of XLA and TensorFlow on stderr, see `runtime.quiet_compiler`; nothing is
# imported for it, since a program handles signals only after this module is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = "0.1.0"

_PUBLIC = {
    "fine_tune": "gemma_encoder.fine_tuning",
    "Predictor": "gemma_encoder.inference",
    "Index": "gemma_encoder.retrieval.index",
    "GemmaEncoder": "gemma_encoder.model.encoder",
    "EncoderConfig": "gemma_encoder.model.config",
    "PoolingConfig": "gemma_encoder.model.config",
    "TransformerConfig": "gemma_encoder.model.config",
    "GEMMA_CONFIGS": "gemma_encoder.model.sizes",
    "Trainer": "gemma_encoder.training.trainer",
    "Hook": "gemma_encoder.training.hooks",
    "Task": "gemma_encoder.inputs.task",
    "Template": "gemma_encoder.inputs.template",
    "Tokenizer": "gemma_encoder.inputs.tokenizer",
    "load_backbone": "gemma_encoder.weights.backbone",
    "load_tokenizer": "gemma_encoder.weights.backbone",
    "save_gemma": "gemma_encoder.weights.backbone",
    "export_huggingface": "gemma_encoder.inference",
    "InputError": "gemma_encoder.inputs.errors",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(
            f"module 'gemma_encoder' has no attribute {name!r}; it offers {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
