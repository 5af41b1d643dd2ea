"""Losses of retrieval, against loops over lists in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_encoder.inputs.batch import BatchShape, empty_batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.options import from_mapping
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.model import sharding
from gemma_encoder.model.encoder import EncoderOutput
from gemma_encoder.training import retrieval_losses
from gemma_encoder.training.loss_options import RetrievalLossOptions
from gemma_encoder.training.losses import LOSSES, LossOptions, batch_loss
from gemma_encoder.training.objectives import LossInputs
from gemma_encoder.training.retrieval_losses import VectorLists, flops, info_nce

G, N, E = 5, 3, 4


def lists(seed=0, **changes):
    """Five lists: with two positives, one, one and a missing slot, none, and an empty list."""
    rng = np.random.default_rng(seed)
    real = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    grades = np.array([[2, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]], np.float32)
    values = VectorLists(
        rng.normal(size=(G, E)).astype(np.float32),
        rng.normal(size=(G, N, E)).astype(np.float32),
        np.arange(G),
        100 + np.arange(G * N).reshape(G, N),
        grades,
        rng.normal(size=(G, N)).astype(np.float32),
        real,
    )
    return values._replace(**changes)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def is_same_positive(data, group, other, slot):
    """Returns True if a document of another list is no negative of a query."""
    positives = data.document_ids[group][data.real[group] & (data.grades[group] > 0)]
    same_query = data.query_ids[group] == data.query_ids[other]
    return data.document_ids[other, slot] in positives or (
        same_query and data.grades[other, slot] > 0
    )


def expected_info_nce(data, temperature, margin=0.0):
    values = []
    for g in range(G):
        similarity = np.einsum("e,gne->gn", data.queries[g], data.documents)
        own = [n for n in range(N) if data.real[g, n] and data.grades[g, n] > 0]
        negatives = [
            similarity[h, n]
            for h in range(G)
            for n in range(N)
            if data.real[h, n] and not (h == g and n in own)
            if not is_same_positive(data, g, h, n)
        ]
        if margin and own:
            negatives = [s for s in negatives if s <= max(similarity[g, own]) + margin]
        exponents = np.exp(np.array(negatives) / temperature).sum()
        losses = [
            -np.log(np.exp(similarity[g, n] / temperature))
            + np.log(np.exp(similarity[g, n] / temperature) + exponents)
            for n in own
        ]
        values.append(np.mean(losses) if losses else 0.0)
    return np.array(values)


def expected_reverse(data, temperature):
    """Returns the mean over a list's positives of -log of its query's share among all queries."""
    values = []
    has_query = data.real.any(axis=1)
    for g in range(G):
        losses = []
        for n in np.flatnonzero(data.real[g] & (data.grades[g] > 0)):
            similarity = np.exp(data.queries @ data.documents[g, n] / temperature)
            negatives = [
                similarity[h]
                for h in range(G)
                if has_query[h] and h != g and data.query_ids[h] != data.query_ids[g]
                if data.document_ids[g, n]
                not in data.document_ids[h][data.real[h] & (data.grades[h] > 0)]
            ]
            losses.append(-np.log(similarity[g] / (similarity[g] + sum(negatives))))
        values.append(np.mean(losses) if losses else 0.0)
    return np.array(values)


def check(actual, expected):
    # Exponentials and logarithms of float32.
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)


def test_info_nce_equals_its_equation():
    data = lists()
    check(info_nce(data, RetrievalLossOptions(temperature=0.7)), expected_info_nce(data, 0.7))


def test_other_copies_of_a_positive_are_no_negatives():
    data = lists()
    data.document_ids[1, 2] = data.document_ids[0, 0]  # a positive of list 0
    data.document_ids[2, 0] = data.document_ids[1, 0]
    options = RetrievalLossOptions(temperature=0.7, both_directions=True)
    changed = info_nce(data, options)
    check(changed, (expected_info_nce(data, 0.7) + expected_reverse(data, 0.7)) / 2)
    assert not np.allclose(changed[0], info_nce(lists(), options)[0])


def test_positives_of_the_same_query_are_no_negatives():
    data = lists(query_ids=np.array([7, 7, 1, 2, 3]))
    options = RetrievalLossOptions(temperature=0.7, both_directions=True)
    check(
        info_nce(data, options),
        (expected_info_nce(data, 0.7) + expected_reverse(data, 0.7)) / 2,
    )
    assert not np.allclose(info_nce(data, options), info_nce(lists(), options))


def test_too_similar_negatives_are_left_out():
    data = lists(seed=3)
    options = RetrievalLossOptions(temperature=0.7, false_negative_margin=0.5)
    check(info_nce(data, options), expected_info_nce(data, 0.7, margin=0.5))
    assert not np.allclose(expected_info_nce(data, 0.7, margin=0.5), expected_info_nce(data, 0.7))


@pytest.mark.parametrize("mesh_shape", [None, (2, 2, 1)])
def test_chunks_change_neither_the_loss_nor_its_gradient(monkeypatch, mesh_shape):
    data = lists()
    mesh = mesh_shape and sharding.make_mesh(mesh_shape, jax.devices()[:4])
    options = RetrievalLossOptions(temperature=0.7, both_directions=True)

    def loss(queries, documents):
        changed = jax.tree.map(jnp.asarray, data)._replace(queries=queries, documents=documents)
        return info_nce(changed, options, mesh).sum()

    whole = jax.jit(jax.value_and_grad(loss, (0, 1)))(data.queries, data.documents)
    monkeypatch.setattr(retrieval_losses, "SIMILARITIES", 2 * G)  # one or two anchors a chunk
    chunked = jax.jit(jax.value_and_grad(lambda *a: loss(*a), (0, 1)))(data.queries, data.documents)
    for first, second in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)  # sums in another order
    assert "while" in jax.jit(jax.grad(loss)).lower(data.queries, data.documents).as_text()


def test_an_empty_batch_has_no_loss_and_a_finite_gradient():
    data = lists(real=np.zeros((G, N), bool))
    options = RetrievalLossOptions(both_directions=True, false_negative_margin=0.1)
    value, gradient = jax.value_and_grad(
        lambda queries: info_nce(
            jax.tree.map(jnp.asarray, data)._replace(queries=queries), options
        ).sum()
    )(data.queries)
    assert value == 0
    assert np.isfinite(gradient).all()


def test_margin_mse_compares_all_pairs():
    data = lists()
    scores = np.einsum("ge,gne->gn", data.queries, data.documents)
    expected = []
    for g in range(G):
        pairs = [
            (scores[g, p] - scores[g, n] - data.teacher[g, p] + data.teacher[g, n]) ** 2
            for p in range(N)
            for n in range(N)
            if data.real[g, [p, n]].all() and data.grades[g, p] > 0 and data.grades[g, n] == 0
        ]
        expected.append(np.mean(pairs) if pairs else 0)
    check(
        retrieval_losses.margin_mse(scores, data.grades, data.teacher, data.real),
        np.array(expected),
    )


def test_kl_is_zero_for_the_scores_of_the_teacher():
    data = lists()
    values = retrieval_losses.kl_divergence(data.teacher / 2, data.teacher, data.real, 2.0)
    np.testing.assert_allclose(values, 0, atol=1e-6)
    shifted = data.teacher + np.arange(N, dtype=np.float32)
    values = retrieval_losses.kl_divergence(shifted, data.teacher, data.real, 1.0)
    t = np.exp(data.teacher[2, :2]) / np.exp(data.teacher[2, :2]).sum()
    s = np.exp(shifted[2, :2]) / np.exp(shifted[2, :2]).sum()
    check(values[2], (t * np.log(t / s)).sum())
    assert values[4] == 0


def test_flops_is_the_sum_of_squared_means():
    weights = np.abs(np.random.default_rng(0).normal(size=(4, 6))).astype(np.float32)
    real = np.array([True, True, False, True])
    check(flops(weights, real), np.sum(weights[real].mean(axis=0) ** 2))


def batch_of(data):
    """Returns a batch with each list in a row, its texts in a shuffled order, and the output."""
    batch = empty_batch(BatchShape(G, 8, N + 1, G, N + 1, 1))
    vectors = np.full((G, N + 1, E), 7.0, np.float32)
    rng = np.random.default_rng(1)
    for g in range(G):
        for slot, text in enumerate(rng.permutation(N + 1)):
            if not data.real[g].any() or (text and not data.real[g, text - 1]):
                continue
            batch.group_id[g, slot] = g
            batch.list_slot[g, slot] = text
            batch.weight[g, slot] = 1
            vectors[g, slot] = data.documents[g, text - 1] if text else data.queries[g]
            batch.example_id[g, slot] = data.document_ids[g, text - 1] if text else g
            batch.label[g, slot] = data.grades[g, text - 1] if text else 0
            batch.targets[g, slot] = data.teacher[g, text - 1] if text else 0
    return batch, vectors


def task(kind="retrieval"):
    return Task("t", kind, Template("{document}"))


def objective(name, data, options, kind="retrieval", **inputs):
    batch, vectors = batch_of(data)
    declared = task(kind)
    values = LossInputs(
        EncoderOutput(None, None, {"t": jnp.asarray(vectors)}),
        jax.tree.map(jnp.asarray, batch),
        declared,
        jnp.asarray(batch.weight),
        G,
        N + 1,
        **inputs,
    )
    return LOSSES[kind][name](values, options)


@pytest.mark.parametrize("name", sorted(LOSSES["retrieval"]))
def test_every_loss_counts_lists_and_ignores_empty_slots(name):
    part = objective(name, lists(), RetrievalLossOptions(temperature=0.7))
    assert np.isfinite(part.total)
    assert part.total > 0
    assert part.examples == 4
    learnable = {"point_ce": 4, "kl": 4}.get(name, 3)
    assert part.count == learnable


def test_the_objective_is_the_sum_over_lists():
    data = lists()
    part = objective("info_nce", data, RetrievalLossOptions(temperature=0.7))
    check(part.total, expected_info_nce(data, 0.7).sum())


@pytest.mark.parametrize("is_normalized", [True, False])
def test_matryoshka_adds_the_loss_of_each_width(is_normalized):
    data = lists()
    if is_normalized:
        data = data._replace(queries=unit(data.queries), documents=unit(data.documents))
    options = RetrievalLossOptions(temperature=0.7, widths=(2, 3))
    part = objective("info_nce", data, options, is_normalized=is_normalized)
    expected = expected_info_nce(data, 0.7).sum()
    for width in (2, 3):
        scale = unit if is_normalized else (lambda vectors: vectors)
        short = data._replace(
            queries=scale(data.queries[..., :width]), documents=scale(data.documents[..., :width])
        )
        expected += expected_info_nce(short, 0.7).sum()
    check(part.total, expected)


def test_flops_weights_rise_quadratically():
    data = lists(queries=np.abs(lists().queries), documents=np.abs(lists().documents))
    plain = objective("info_nce", data, RetrievalLossOptions()).total
    options = RetrievalLossOptions(query_flops=0.5, document_flops=0.25, flops_ramp=10)
    queries = data.queries[:4].mean(axis=0)
    documents = data.documents[data.real].mean(axis=0)
    full = 4 * (0.5 * np.sum(queries**2) + 0.25 * np.sum(documents**2))
    for step, share in ((4, 0.25), (9, 1.0), (100, 1.0)):
        part = objective("info_nce", data, options, "sparse_retrieval", step=step)
        check(part.total - plain, share * full)


def test_the_loss_of_a_mixture_reads_the_options_of_retrieval():
    data = lists()
    batch, vectors = batch_of(data)
    config = from_mapping(
        type(LossOptions({}, {}, 1, 1, 1, 1).options), {"retrieval": {"temperature": 0.7}}
    )
    options = LossOptions({}, {"t": 2.0}, 4, 1, G, 17, config, retrieval_list_size=N + 1)
    output = EncoderOutput(None, None, {"t": jnp.asarray(vectors)})
    loss, _ = batch_loss(output, jax.tree.map(jnp.asarray, batch), [task()], options)
    check(loss, 2 * expected_info_nce(data, 0.7).sum() / 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("inf")}, "temperature must be positive"),
        ({"widths": (4, 4)}, "different widths"),
        ({"widths": (0,)}, "different widths"),
        ({"false_negative_margin": -1.0}, "false_negative_margin must be at least 0"),
        ({"flops_ramp": -1}, "flops_ramp must be at least 0"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        RetrievalLossOptions(**options)
