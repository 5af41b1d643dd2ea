"""Strict dtype and rank promotion for every test of the model, and shared helpers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.model.encoder import abstract_encoder


# Module scope: set up before the module's fixtures that compute something.
@pytest.fixture(scope="module", autouse=True)
def strict_arithmetic():
    """Forbids implicit promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def quick_key():
    """`quick_key(seed)`: a key of a generator that compiles much faster than the default one."""
    return lambda seed: jax.random.key(seed, impl="unsafe_rbg")


@pytest.fixture(scope="session")
def random_parameters():
    """`random_parameters(config, seed=0)`: draws from N(0, 0.2²), about 1/√D for tiny models.

    Scales and biases are drawn, too: zeros would hide errors.
    """

    def draw(config: EncoderConfig, seed: int = 0) -> dict:
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda shape: jnp.asarray(0.2 * rng.standard_normal(shape.shape), shape.dtype),
            abstract_encoder(config).shapes,
        )

    return draw


@pytest.fixture(scope="session")
def make_encoder(random_parameters, tiny_config):
    """`make_encoder(family, changes={}, **fields)`: a float32 encoder with random parameters.

    `changes` override fields of the tiny transformer, `fields` those of the EncoderConfig.
    """

    def make(family: str, changes=None, **fields):
        config = EncoderConfig(
            tiny_config(family, **(changes or {})), **({"compute_dtype": "float32"} | fields)
        )
        return abstract_encoder(config).merge(random_parameters(config))

    return make


@pytest.fixture(scope="session")
def lay_out():
    """`lay_out(rows, num_rows, length, padding)`: packs rows, each a list of texts.

    Returns (tokens, segment_ids, positions).
    """

    def pack(rows, num_rows: int, length: int, padding: str = "right"):
        tokens, segment_ids, positions = (np.zeros((num_rows, length), np.int32) for _ in range(3))
        for row, texts in enumerate(rows):
            start = length - sum(map(len, texts)) if padding == "left" else 0
            for segment, text in enumerate(texts, 1):
                end = start + len(text)
                tokens[row, start:end] = text
                segment_ids[row, start:end] = segment
                positions[row, start:end] = np.arange(len(text))
                start = end
        return jnp.asarray(tokens), jnp.asarray(segment_ids), jnp.asarray(positions)

    return pack
