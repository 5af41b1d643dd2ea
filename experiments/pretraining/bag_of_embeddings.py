"""Trains a bag of embeddings on passage-ranking files: a baseline of retrieval, and its start.

    MSMARCO_DIR=DATA python -m gemma_encoder.experiments.pretraining.bag_of_embeddings \
        --output=BAG --run=bag.trec

A text is the sum of its tokens' vectors, each times a weight of the token, scaled to length 1. Both
are learned by InfoNCE over the pairs of a batch, on the texts that the task's templates give. The
program prints the metrics of a search of the whole collection with the dev queries, which a
retriever has to beat, and writes the run.

BAG is a checkpoint in the gemma package's format that starts as this bag under mean pooling; a
retriever starts from it with `--config.model.pretrained=BAG`. RMSNorm takes the length of a token's
state away, and with it the weight of the token, so some dimensions of all embeddings hold the same
large constant, to which the length of the others is relative; the final norm's scale is 0 there.
The layers' weights are random, and the scale of the norms after them is small. With --sparse, the
constant gives the logits of sparse vectors a negative bias, so that a token weighs itself and its
nearest neighbors; else all words would have a weight.
"""

import argparse
import pathlib
import time
from collections.abc import Iterable, Sequence

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
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import encode
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model.block import Block
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.model.transformer import Transformer
from gemma_encoder.weights.backbone import save_gemma
from gemma_encoder.whole_files import write_whole

PAIRS = 256  # of a batch
TEMPERATURE = 0.05
LEARNING_RATE = 0.01
LONGEST = 512  # tokens of a text
METRICS = ("mrr@10", "ndcg@10", "recall@100")
CONSTANT = 16  # dimensions of the constant, whose length is 1
CONTENT = 1 / 3  # root mean square of the length of the other dimensions
LAYERS = 0.1  # scale of what a layer adds to the residual stream
SPARSE_CONTENT = 6.0  # scale of the final norm for sparse vectors
SPARSE_BIAS = -0.3


def tokens_of(texts: Sequence[str], task: Task, role: str, tokenizer: Tokenizer) -> np.ndarray:
    """Returns token ids [N, L] of texts in the template of a role, 0 for padding."""
    template = task.template_for(role)
    names = [f"{role} {index}" for index in range(len(texts))]
    fields = [{role: text} for text in texts]
    encoded = [text.tokens for text in encode(tokenizer, template, fields, LONGEST, names)]
    tokens = np.zeros((len(encoded), max(map(len, encoded))), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    return tokens


def embed(parameters: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Returns the vector of each text, [N, D]."""
    weights = jax.nn.softplus(parameters["weights"])[tokens] * (tokens > 0)
    vectors = jnp.einsum("NL,NLD->ND", weights, parameters["vectors"][tokens])
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


def train_bag(
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


def search_collection(
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


def start_of(
    parameters: dict[str, jax.Array], size: str, seed: int, is_sparse: bool = False
) -> Transformer:
    """Returns a transformer whose mean-pooled states are the bag's vectors, but for its layers.

    Args:
        parameters: the bag.
        size: size of the transformer.
        seed: seed of its random parameters.
        is_sparse: start of a sparse head in place of a mean.
    """
    config = GEMMA_CONFIGS[size]
    backbone = Transformer(config, rngs=nnx.Rngs(seed))
    content = parameters["vectors"] * jax.nn.softplus(parameters["weights"])[:, None]
    content *= CONTENT / jnp.sqrt(jnp.mean(jnp.sum(content * content, axis=-1)))
    content = jnp.pad(content, ((0, config.vocab_size - len(content)), (0, 0)))  # of no token
    constant = jnp.full((config.vocab_size, CONSTANT), CONSTANT**-0.5)
    backbone.embedding[...] = jnp.concatenate([content, constant], axis=-1)
    content_scale, bias = (SPARSE_CONTENT, SPARSE_BIAS) if is_sparse else (1.0, 0.0)
    scale = jnp.full_like(backbone.final_norm.scale[...], content_scale).at[-CONSTANT:].set(bias)
    backbone.final_norm.scale[...] = scale - 1  # RMSNorm multiplies by 1 + scale
    for _, module in nnx.iter_modules(backbone):
        if isinstance(module, Block):
            for norm in (module.post_attention_norm, module.post_mlp_norm):
                norm.scale[...] = jnp.full_like(norm.scale[...], LAYERS - 1)
    return backbone


def main() -> None:
    """Trains, searches, prints metrics and writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="new folder of the checkpoint")
    parser.add_argument("--run", type=pathlib.Path, help="file of the run, in TREC's format")
    parser.add_argument("--size", default="gemma3_tiny", help="size of the checkpoint's model")
    parser.add_argument("--sparse", action="store_true", help="the start of a sparse retriever")
    parser.add_argument("--tokenizer", default="small")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.tokenizer)
    source = get("msmarco_retrieval", DataOptions())
    files = source.located("train")
    documents = _texts(files.documents, range(len(files.documents)))
    document_tokens = tokens_of(documents, source.task, "document", tokenizer)
    train_queries = np.flatnonzero(files.positives() > 0)
    positives = [int(files.qrels.positives_of(query)[0]) for query in train_queries]
    query_tokens = tokens_of(_texts(files.queries, train_queries), source.task, "query", tokenizer)
    rng = np.random.default_rng(arguments.seed)
    width = GEMMA_CONFIGS[arguments.size].embed_dim - CONSTANT
    parameters = {
        "vectors": jnp.asarray(rng.normal(size=(tokenizer.vocab_size, width)), jnp.float32),
        "weights": jnp.ones(tokenizer.vocab_size),
    }
    start = time.perf_counter()
    if arguments.epochs:
        parameters = train_bag(
            parameters, query_tokens, document_tokens[positives], arguments.epochs, arguments.seed
        )
    seconds = time.perf_counter() - start
    dev = source.located("validation")
    judged = np.flatnonzero(dev.qrels.judged > 0)
    query_ids = [dev.queries.ids[query] for query in judged]
    ids = [dev.documents.ids[index] for index in range(len(dev.documents))]
    dev_tokens = tokens_of(_texts(dev.queries, judged), source.task, "query", tokenizer)
    run = search_collection(parameters, dev_tokens, document_tokens, ids, query_ids)
    metrics = ranking.compute_ranking_metrics(METRICS, dev.qrels.by_id(judged), run)
    values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    terminal.print_result(f"{values} on {len(judged)} queries; trained {seconds:.0f} s")
    if arguments.run:
        write_whole(arguments.run, "".join(ranking.trec_lines(run, "bag")))
    if arguments.output:
        backbone = start_of(parameters, arguments.size, arguments.seed, arguments.sparse)
        save_gemma(backbone, arguments.output, tokenizer)


def _texts(corpus: Corpus, indices: Iterable[int]) -> list[str]:
    return [corpus.text(int(index)) for index in indices]


if __name__ == "__main__":
    main()
