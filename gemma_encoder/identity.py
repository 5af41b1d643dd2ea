"""Identity of a model: a digest of everything that its outputs depend on."""

import hashlib

import jax
import numpy as np

from gemma_encoder.digests import CHUNK, extend_crc
from gemma_encoder.embedding import Embedder
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.inputs.task import Task


def identify(predictor: Embedder, task: Task | None) -> str:
    """Returns the step, and a digest of everything that predictions depend on.

    Parameters are read once, an array at a time, which is faster than loading them.

    Args:
        predictor: the model.
        task: the task that formats the texts; None for texts as they are.
    """
    digest = hashlib.blake2b(digest_size=16)
    description = predictor.spec.description() | {"record": None}  # predictions do not depend on it
    for values in (description, task.to_dict() if task else None):
        digest.update(to_json(values, sort_keys=True, default=str).encode())
    digest.update(predictor.spec.tokenizer.model)
    for path, values in jax.tree_util.tree_leaves_with_path(predictor.parameters):
        content = np.ravel(np.asarray(values)).view(np.uint8)
        crc = 0
        for start in range(0, content.size, CHUNK):
            crc = extend_crc(crc, content[start : start + CHUNK].tobytes())
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {values.dtype} {values.shape} {crc:08x}".encode())
    return f"step {predictor.spec.step}, {digest.hexdigest()}"
