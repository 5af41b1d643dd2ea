"""Small models with roles, collections, and a sparse head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder.model import heads
from gemma_encoder.model.encoder import initial_parameters
from gemma_encoder.weights.native import InferenceSpec

WEIGHTS = 16  # of a sparse vector


class LargestProducts(heads.Head):
    """Weights of the pieces whose embeddings are nearest to the pooled state."""

    def __init__(self, config, encoder, *, rngs):
        del encoder, rngs
        self._count = config.outputs // 2

    def __call__(self, inputs):
        weights = jax.nn.relu(inputs.pooled @ inputs.embedding.T)
        top, ids = jax.lax.top_k(weights, self._count)
        return jnp.concatenate([top, ids.astype(jnp.float32)], axis=-1)


def roles(document="{text}", name="find"):
    """A task with templates for queries and documents."""
    return ge.Task(
        name,
        "ranking",
        ge.Template("{text}"),
        role_templates=(
            ("query", ge.Template("query: {text}")),
            ("document", ge.Template(f"document: {document}")),
        ),
    )


@pytest.fixture(scope="session")
def searcher(random_predictor):
    """`searcher(sparse=False, seed=0, tasks=None, normalize=True)`: an untrained retriever."""

    def make(sparse=False, seed=0, tasks=None, normalize=True):
        tasks = (roles(),) if tasks is None else tasks
        spec = random_predictor().spec
        kind = {"outputs": 2 * WEIGHTS, "kind": "sparse"} if sparse else {"outputs": 1}
        config = dataclasses.replace(
            spec.encoder,
            heads={task.head: ge.model.config.HeadConfig(**kind) for task in tasks},
            pooling=ge.PoolingConfig("mean", normalize=normalize),
        )
        parameters = initial_parameters(config, jax.random.key(seed))
        return ge.Predictor(
            InferenceSpec(config, tasks, spec.tokenizer, 64, 64, "right", 0), parameters
        )

    return make


@pytest.fixture(scope="session")
def dense(searcher):
    return searcher()


@pytest.fixture
def sparse(searcher, monkeypatch):
    monkeypatch.setitem(heads.HEADS, "sparse", LargestProducts)
    return searcher(sparse=True)


WORDS = [
    *("river", "stone", "cloud", "ember", "willow", "harbor"),
    *("candle", "meadow", "copper", "lantern", "violet", "marble"),
]


def texts(count, seed=0, words=5):
    """Random texts, none twice."""
    rng = np.random.default_rng(seed)
    return [f"{' '.join(rng.choice(WORDS, words))} {index}" for index in range(count)]


@pytest.fixture
def collection(tmp_path):
    """`collection(count)` writes a collection and returns its path."""

    def write(count=50, name="collection.tsv"):
        path = tmp_path / name
        path.write_text("".join(f"p{i}\t{text}\n" for i, text in enumerate(texts(count))))
        return path

    return write
