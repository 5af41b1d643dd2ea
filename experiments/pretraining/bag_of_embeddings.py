"""Trains a bag of embeddings on passage-ranking files: a baseline of retrieval, and its start.

    MSMARCO_DIR=DATA python -m gemma_encoder.experiments.pretraining.bag_of_embeddings \
        --output=BAG --run=bag.trec

A text is the sum of its tokens' vectors, each times a weight of the token, scaled to length 1. Both
are learned by InfoNCE over the pairs of a batch. The program prints the metrics of a search of the
whole collection with the dev queries, which a retriever has to beat, and writes the run. BAG is a
checkpoint in the gemma package's format: its embedding table holds the vectors times their weights,
its other parameters are random. A retriever starts from it with
`--config.model.pretrained=BAG`.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gemma_encoder import terminal
from gemma_encoder.data.files.corpus import Corpus
from gemma_encoder.data.registry import get
from gemma_encoder.data.source import DataOptions
from gemma_encoder.evaluation import ranking
from gemma_encoder.evaluation.vector_search import nearest
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.model.transformer import Transformer
from gemma_encoder.weights.backbone import save_gemma
from gemma_encoder.whole_files import write_whole

PAIRS = 256  # of a batch
TEMPERATURE = 0.05
LEARNING_RATE = 0.01
LONGEST = 512  # tokens of a text
METRICS = ("mrr@10", "ndcg@10", "recall@100")
# Root mean square of an embedding, in units of what a block adds to the residual stream. A token of
# low weight is smaller, and so takes on the states of its neighbors.
SCALE = 4.0


def tokens_of(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Returns token ids [N, L], 0 for padding."""
    encoded = [ids[:LONGEST] for ids in tokenizer.encode(texts)]
    tokens = np.zeros((len(encoded), max(map(len, encoded))), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    return tokens


def embed(parameters: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Returns the vector of each text, [N, D]."""
    weights = jax.nn.softplus(parameters["weights"])[tokens] * (tokens > 0)
    vectors = jnp.einsum("NL,NLD->ND", weights, parameters["vectors"][tokens])
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


def train(
    parameters: dict[str, jax.Array],
    queries: np.ndarray,
    documents: np.ndarray,
    epochs: int,
    seed: int,
) -> dict[str, jax.Array]:
    """Trains on pairs of the same row of `queries` and `documents`, token ids [N, L]."""
    optimizer = optax.adam(LEARNING_RATE)

    @jax.jit
    def step(parameters, state, queries, documents):
        def loss(parameters):
            similarity = embed(parameters, queries) @ embed(parameters, documents).T
            labels = jnp.arange(len(queries))
            logits = similarity / TEMPERATURE
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(parameters, updates), state, value

    state = optimizer.init(parameters)
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        order = rng.permutation(len(queries))
        losses = []
        for first in range(0, len(order) - PAIRS + 1, PAIRS):
            rows = order[first : first + PAIRS]
            parameters, state, value = step(parameters, state, queries[rows], documents[rows])
            losses.append(value)
        terminal.print_note(f"epoch {epoch + 1}: loss {float(np.mean(losses)):.3f}")
    return parameters


def search(
    parameters: dict[str, jax.Array],
    queries: np.ndarray,
    documents: np.ndarray,
    ids: list[str],
    query_ids: list[str],
    depth: int = 1000,
) -> ranking.Run:
    """Returns the best documents of each query."""
    function = jax.jit(embed)
    vectors = [
        np.concatenate(
            [function(parameters, texts[i : i + 1024]) for i in range(0, len(texts), 1024)]
        )
        for texts in (queries, documents)
    ]
    best, scores = nearest(*vectors, depth)
    names = np.array(ids, object)[best.ravel()]
    return ranking.make_run(np.repeat(query_ids, best.shape[1]), names, scores.ravel())


def embedding_table(parameters: dict[str, jax.Array]) -> jax.Array:
    """Returns the vectors times their weights, as an embedding table of scale `SCALE`."""
    weights = jax.nn.softplus(parameters["weights"])[:, None]
    vectors = parameters["vectors"] * weights
    # A transformer multiplies embeddings by the root of their width.
    return vectors * SCALE / jnp.sqrt(jnp.mean(jnp.sum(vectors * vectors, axis=-1)))


def save(
    table: jax.Array, size: str, tokenizer: Tokenizer, output: pathlib.Path, seed: int
) -> None:
    """Writes a transformer with this embedding table and otherwise random parameters."""
    config = GEMMA_CONFIGS[size]
    backbone = Transformer(config, rngs=nnx.Rngs(seed))
    rows = backbone.embedding[...].at[: len(table)].set(table[: config.vocab_size])
    backbone.embedding[...] = rows
    save_gemma(backbone, output, tokenizer)


def main() -> None:
    """Trains, searches, prints metrics and writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="new folder of the checkpoint")
    parser.add_argument("--run", type=pathlib.Path, help="file of the run, in TREC's format")
    parser.add_argument("--size", default="gemma3_tiny", help="size of the checkpoint's model")
    parser.add_argument("--tokenizer", default="small")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.tokenizer)
    source = get("msmarco_retrieval", DataOptions())
    files = source.located("train")
    documents = _texts(files.documents, range(len(files.documents)))
    document_tokens = tokens_of(documents, tokenizer)
    train_queries = np.flatnonzero(files.positives() > 0)
    positives = [int(files.qrels.positives_of(query)[0]) for query in train_queries]
    query_tokens = tokens_of(_texts(files.queries, train_queries), tokenizer)
    rng = np.random.default_rng(arguments.seed)
    width = GEMMA_CONFIGS[arguments.size].embed_dim
    parameters = {
        "vectors": jnp.asarray(rng.normal(size=(tokenizer.vocab_size, width)), jnp.float32),
        "weights": jnp.ones(tokenizer.vocab_size),
    }
    start = time.perf_counter()
    if arguments.epochs:
        parameters = train(
            parameters, query_tokens, document_tokens[positives], arguments.epochs, arguments.seed
        )
    seconds = time.perf_counter() - start
    dev = source.located("validation")
    judged = np.flatnonzero(dev.qrels.judged > 0)
    query_ids = [dev.queries.ids[query] for query in judged]
    ids = [dev.documents.ids[index] for index in range(len(dev.documents))]
    dev_tokens = tokens_of(_texts(dev.queries, judged), tokenizer)
    run = search(parameters, dev_tokens, document_tokens, ids, query_ids)
    metrics = ranking.compute_ranking_metrics(METRICS, dev.qrels.by_id(judged), run)
    values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    terminal.print_result(f"{values} on {len(judged)} queries; trained {seconds:.0f} s")
    if arguments.run:
        write_whole(arguments.run, "".join(ranking.trec_lines(run, "bag")))
    if arguments.output:
        save(
            embedding_table(parameters), arguments.size, tokenizer, arguments.output, arguments.seed
        )


def _texts(corpus: Corpus, indices) -> list[str]:
    return [corpus.text(int(index)) for index in indices]


if __name__ == "__main__":
    main()
