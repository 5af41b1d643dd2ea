"""Losses: against their equations in numpy, and independent of the packing of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_encoder.inputs.batch import BatchShape, empty_batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.options import from_mapping
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.model.encoder import EncoderOutput
from gemma_encoder.training import losses
from gemma_encoder.training.loss_options import (
    LossOptionsConfig,
    Poly1Options,
    SoftmaxCrossEntropyOptions,
)
from gemma_encoder.training.losses import LossOptions, batch_loss

SCORES = np.array([[0.3, -1.2, 2.0, 0.5], [1.0, 0.0, -3.0, 9.0]], np.float32)
LABELS = np.array([[0, 0, 1, 0], [2, 1, 0, 0]], np.float32)
MASK = np.array([[True, True, True, True], [True, True, True, False]])


def log_softmax(x):
    return x - np.log(np.exp(x).sum())


def equation(name, scores, labels):
    """Returns the value of a list loss for a single list."""
    if name == "point_ce":
        y = np.clip(labels, 0, 1)
        p = 1 / (1 + np.exp(-scores))
        return np.mean(-y * np.log(p) - (1 - y) * np.log(1 - p))
    if name == "pairwise_logistic":
        pairs = [
            np.log1p(np.exp(scores[j] - scores[i]))
            for i in range(len(scores))
            for j in range(len(scores))
            if labels[i] > labels[j]
        ]
        return np.mean(pairs)
    softmax = -(labels * log_softmax(scores)).sum()
    if name == "softmax":
        return softmax
    weights = labels / labels.sum()
    return softmax / labels.sum() + 1 - (weights * np.exp(log_softmax(scores))).sum()


@pytest.mark.parametrize("name", losses.LOSSES["ranking"])
def test_list_losses_equal_their_equations(name):
    loss = losses.listwise_softmax if name == "softmax" else getattr(losses, name)
    values = loss(jnp.asarray(SCORES), jnp.asarray(LABELS), jnp.asarray(MASK))
    expected = [equation(name, SCORES[0], LABELS[0]), equation(name, SCORES[1, :3], LABELS[1, :3])]
    np.testing.assert_allclose(values, expected, rtol=1e-5)  # a few roundings of float32


def test_classification_and_regression_equal_their_equations():
    scores = jnp.asarray(SCORES[None])
    labels = jnp.asarray([[2.0, 0.0]])
    expected = [[-log_softmax(SCORES[0])[2], -log_softmax(SCORES[1])[0]]]
    np.testing.assert_allclose(losses.softmax_cross_entropy(scores, labels), expected, rtol=1e-5)
    np.testing.assert_allclose(
        losses.mean_squared_error(jnp.asarray([[[0.5], [2.0]]]), jnp.asarray([[0.0, 1.0]])),
        [[0.25, 1.0]],
    )


def test_the_loss_of_a_choice_is_its_cross_entropy():
    assert losses.LOSSES["choice"] is losses.LOSSES["ranking"]
    scores = jnp.asarray(SCORES[:1])
    correct = jnp.eye(4)[1:2]
    expected = losses.softmax_cross_entropy(scores[None], jnp.asarray([[1.0]]))[0]
    values = losses.listwise_softmax(scores, correct, jnp.ones((1, 4), bool))
    np.testing.assert_allclose(values, expected, rtol=1e-5)


TASKS = (
    Task("c", "classification", Template("{x}"), ("accuracy",), ("a", "b")),
    Task("r", "regression", Template("{x}"), ("spearman",)),
    Task("l", "ranking", Template("{x}"), ("mrr@10",)),
)
NAMES = {
    "classification": "softmax_cross_entropy",
    "regression": "mean_squared_error",
    "ranking": "softmax",
}


def mixture(rows, segments, order):
    """Returns a batch of eight texts in a given order, and the scores of its heads.

    The texts: 2 of classification, 2 of regression, a list of 3, and a list of 1.
    """
    texts = [
        (0, 1, -1, 0),
        (0, 0, -1, 0),
        (1, 0.25, -1, 0),
        (1, 1.0, -1, 0),
        (2, 0, 0, 0),
        (2, 1, 0, 1),
        (2, 0, 0, 2),
        (2, 1, 1, 0),
    ]
    raw = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
    batch = empty_batch(BatchShape(rows, 4, segments, 3, 4))
    scores = np.full((rows, segments, 2), 7.0, np.float32)
    for index, text in enumerate(order):
        row, slot = divmod(index, segments)
        (
            batch.task_id[row, slot],
            batch.label[row, slot],
            batch.group_id[row, slot],
            batch.list_slot[row, slot],
        ) = texts[text]
        batch.weight[row, slot] = 1
        scores[row, slot] = raw[text]
    heads = {"c": scores, "r": scores[..., :1], "l": scores[..., 1:]}
    return batch, {name: jnp.asarray(value) for name, value in heads.items()}


def loss_of(scores, batch, tasks, constants):
    """Returns the loss of a batch by objectives that use no hidden or pooled states."""

    @jax.jit  # one program instead of dozens
    def compiled(scores, batch):
        return batch_loss(EncoderOutput(None, None, scores), batch, tasks, constants)

    return compiled(scores, batch)


def options(**changes):
    return LossOptions(
        **(
            {
                "names": NAMES,
                "task_weights": {},
                "examples_per_step": 6,
                "tokens_per_step": 32,
                "groups": 3,
                "list_size": 4,
            }
            | changes
        )
    )


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (4, 5)])
def test_the_loss_does_not_depend_on_how_texts_share_rows(shape):
    batch, scores = mixture(8, 1, range(8))
    reference, _ = loss_of(scores, batch, TASKS, options())
    batch, scores = mixture(*shape, np.random.default_rng(1).permutation(8))
    loss, parts = loss_of(scores, batch, TASKS, options())
    np.testing.assert_allclose(loss, reference, rtol=1e-6)  # sums in another order
    assert {name: float(part.count) for name, part in parts.items()} == {"c": 2, "r": 2, "l": 2}


def test_a_list_counts_once_and_the_divisor_is_the_constant():
    batch, scores = mixture(2, 4, range(8))
    _, parts = loss_of(scores, batch, TASKS, options())
    lists = np.asarray(scores["l"][1, :3, 0])
    # The list of a single document has loss 0.
    np.testing.assert_allclose(parts["l"].total, -log_softmax(lists)[1] + 0.0, rtol=1e-5)
    half, _ = loss_of(scores, batch, TASKS, options(examples_per_step=12))
    whole, _ = loss_of(scores, batch, TASKS, options())
    np.testing.assert_allclose(half * 2, whole, rtol=1e-6)


def test_a_language_models_loss_is_divided_by_tokens_per_step():
    """Scores are (negative log-likelihood, tokens) of each text; the mean loss is per token."""
    batch, _ = mixture(2, 4, range(6))
    batch = batch._replace(task_id=np.zeros_like(batch.task_id))
    scores = np.arange(16, dtype=np.float32).reshape(2, 4, 2)
    task = Task("t", "language_model", Template("{x}"), ("perplexity",))
    names = {"language_model": "negative_log_likelihood"}
    constants = options(names=names, task_weights={"t": 2.0})
    loss, parts = loss_of({"t": jnp.asarray(scores)}, batch, [task], constants)
    real = scores[batch.weight > 0]
    assert real.shape == (6, 2)
    assert (float(parts["t"].total), float(parts["t"].count), float(parts["t"].examples)) == (
        *real.sum(axis=0),
        6,
    )
    np.testing.assert_allclose(loss, 2 * real[:, 0].sum() / 32, rtol=1e-6)


def test_task_weights_scale_their_part():
    batch, scores = mixture(2, 4, range(8))
    plain, parts = loss_of(scores, batch, TASKS, options())
    weighted, _ = loss_of(scores, batch, TASKS, options(task_weights={"r": 3.0}))
    np.testing.assert_allclose(weighted - plain, 2 * parts["r"].total / 6, rtol=1e-5)


@pytest.mark.parametrize("name", losses.LOSSES["ranking"])
def test_empty_lists_give_no_loss_and_finite_gradients(name):
    batch, scores = mixture(2, 4, range(5))  # lists 1 and 2 are empty, list 0 holds one document

    def loss(values):
        return loss_of(
            {**scores, "l": values}, batch, TASKS, options(names=NAMES | {"ranking": name})
        )[0]

    value, gradient = jax.value_and_grad(loss)(scores["l"])
    assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0], 0)  # other tasks' texts
    assert not np.asarray(gradient)[1, 1:].any()  # empty slots


def test_each_segment_is_scored_by_its_own_tasks_head():
    batch, scores = mixture(2, 4, range(8))
    gradients = jax.grad(lambda heads: loss_of(heads, batch, TASKS, options())[0])(scores)
    for task_id, task in enumerate(TASKS):
        has_gradient = np.abs(np.asarray(gradients[task.name])).sum(axis=-1) > 0
        assert not (has_gradient & (batch.task_id != task_id)).any()
        assert has_gradient.any()


def loss_options(values):
    return from_mapping(LossOptionsConfig, values, "loss_options")


def test_unknown_losses_and_options_name_the_nearest():
    ranking = TASKS[2:]
    with pytest.raises(InputError, match="did you mean 'softmax'"):
        options(names=NAMES | {"ranking": "sofmax"}).check(ranking)
    with pytest.raises(InputError, match=r"poly1.epsilom'; did you mean 'loss_options.poly1.eps"):
        loss_options({"poly1": {"epsilom": 1.0}})
    with pytest.raises(InputError, match=r"loss_options.poly2'; did you mean 'loss_options.poly1'"):
        loss_options({"poly2": {}})
    weights = loss_options({"softmax_cross_entropy": {"class_weights": (1.0, 2.0, 3.0)}})
    with pytest.raises(InputError, match=r"softmax_cross_entropy.class_weights has 3 weights"):
        options(options=weights).check(TASKS[:1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"focal_gamma": -1.0}, "focal_gamma must be at least 0"),
        ({"focal_gamma": float("nan")}, "focal_gamma must be at least 0"),
        ({"class_weights": (-1.0, 1.0)}, "class_weights must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(fields, message):
    with pytest.raises(InputError, match=rf"loss_options.softmax_cross_entropy\.{message}"):
        loss_options({"softmax_cross_entropy": fields})


# --- Options of classification ---


def cross_entropy(**fields):
    scores = jnp.asarray(SCORES[None])
    labels = jnp.asarray([[2.0, 0.0]])
    values = losses.softmax_cross_entropy(scores, labels, SoftmaxCrossEntropyOptions(**fields))
    return np.asarray(values)[0]


LOG = np.stack([log_softmax(row) for row in SCORES])
CLASSES = np.array([2, 0])


def test_class_weights_scale_the_loss_of_their_class():
    plain = -LOG[[0, 1], CLASSES]
    values = cross_entropy(class_weights=(0.5, 1.0, 3.0, 1.0))
    np.testing.assert_allclose(values, plain * [3.0, 0.5], rtol=1e-5)


def test_label_smoothing_smooths_the_target():
    target = 0.9 * np.eye(4)[CLASSES] + 0.1 / 4
    np.testing.assert_allclose(
        cross_entropy(label_smoothing=0.1), -(target * LOG).sum(axis=-1), rtol=1e-5
    )


def test_the_focal_weight_reduces_the_loss_of_sure_labels():
    probability = np.exp(LOG[[0, 1], CLASSES])
    expected = (1 - probability) ** 2 * -np.log(probability)
    np.testing.assert_allclose(cross_entropy(focal_gamma=2.0), expected, rtol=1e-4)


def test_a_sure_label_has_a_finite_focal_gradient():
    """The slope of (1 - p) ** γ at p = 1 is infinite for γ below one."""
    scores = jnp.asarray([[[60.0, 0.0]]])
    labels = jnp.zeros((1, 1))
    options = SoftmaxCrossEntropyOptions(focal_gamma=0.5)
    gradient = jax.grad(lambda s: losses.softmax_cross_entropy(s, labels, options).sum())(scores)
    assert np.isfinite(gradient).all()


def test_default_options_add_no_computation():
    scores = jnp.asarray(SCORES[None])
    labels = jnp.asarray([[2.0, 0.0]])

    def program(options):
        def loss(scores):
            return losses.softmax_cross_entropy(scores, labels, options)

        return str(jax.make_jaxpr(loss)(scores))

    assert program(None) == program(SoftmaxCrossEntropyOptions())
    assert program(None) != program(SoftmaxCrossEntropyOptions(label_smoothing=0.1))


def test_poly1_takes_its_epsilon():
    arguments = [jnp.asarray(values) for values in (SCORES, LABELS > 0, MASK)]
    arguments[1] = arguments[1] / arguments[1].sum(axis=-1, keepdims=True)
    zero = losses.poly1(*arguments, Poly1Options(0.0))
    np.testing.assert_allclose(zero, losses.listwise_softmax(*arguments), rtol=1e-6)
    single = losses.poly1(*arguments, Poly1Options(1.0))
    double = losses.poly1(*arguments, Poly1Options(2.0))
    np.testing.assert_allclose(double - zero, 2 * (single - zero), rtol=1e-4)


def poly1_of(grades, scores=SCORES[0], epsilon=1.5):
    values = losses.poly1(
        jnp.asarray(scores)[None],
        jnp.asarray(grades, jnp.float32)[None],
        jnp.ones((1, len(grades)), bool),
        Poly1Options(epsilon),
    )
    return values[0]


def test_poly1_of_one_positive_is_the_papers():
    log_p = log_softmax(SCORES[0])[2]
    expected = -log_p + 1.5 * (1 - np.exp(log_p))
    for grade in (1, 3):
        np.testing.assert_allclose(poly1_of([0, 0, grade, 0]), expected, rtol=1e-5)


@pytest.mark.parametrize(("grades", "weights"), [([1, 0, 1, 0], [1, 1]), ([3, 0, 1, 0], [3, 1])])
def test_poly1_of_several_positives_is_their_weighted_mean(grades, weights):
    """Both terms: each positive's own Poly-1, weighted by its grade."""
    single = [poly1_of(np.eye(4)[i]) for i in (0, 2)]
    expected = np.average(single, weights=weights)
    np.testing.assert_allclose(poly1_of(grades), expected, rtol=1e-5)
    np.testing.assert_allclose(poly1_of(np.multiply(grades, 7)), expected, rtol=1e-5)


def test_the_gradient_of_poly1_is_that_of_its_equation():
    def equation(scores, grades, real):
        p = jnp.where(real, jnp.exp(scores), 0) / jnp.sum(jnp.exp(scores) * real)
        weights = grades / grades.sum()
        terms = -jnp.log(jnp.where(real, p, 1)) + 1.5 * (1 - p)
        return jnp.sum(jnp.where(real, weights * terms, 0))

    def loss(scores):
        return losses.poly1(scores, jnp.asarray(LABELS), jnp.asarray(MASK), Poly1Options(1.5)).sum()

    gradients = jax.grad(loss)(jnp.asarray(SCORES))
    for row, gradient in enumerate(gradients):
        arguments = [jnp.asarray(values[row]) for values in (SCORES, LABELS, MASK)]
        expected = jax.grad(equation)(*arguments)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def graded_lists(*lists):
    """Returns a batch with a list of documents in each row, by grades, and their scores."""
    batch = empty_batch(BatchShape(len(lists), 4, 3, len(lists), 3))
    for row, grades in enumerate(lists):
        size = len(grades)
        batch.label[row, :size] = grades
        batch.group_id[row, :size] = row
        batch.list_slot[row, :size] = range(size)
        batch.weight[row, :size] = 1
    scores = np.random.default_rng(0).standard_normal((len(lists), 3, 1)).astype(np.float32)
    return batch, {"l": jnp.asarray(scores)}


@pytest.mark.parametrize(
    ("name", "count"),
    [("softmax", 2), ("poly1", 2), ("pairwise_logistic", 1), ("point_ce", 4)],
)
def test_lists_without_a_positive_are_not_in_the_mean(name, count):
    """Of pairs, those without documents of different grades; PointCE learns from all."""
    lists = [[1, 0, 0], [0, 0, 0], [2, 2], [0]]
    constants = options(names={"ranking": name}, examples_per_step=4, groups=4, list_size=3)
    batch, scores = graded_lists(*lists)
    loss, parts = loss_of(scores, batch, TASKS[2:], constants)
    part = parts["l"]
    assert (float(part.count), float(part.examples)) == (count, 4)
    np.testing.assert_allclose(loss, part.total / 4, rtol=1e-6)  # the divisor is the constant
    if name != "point_ce":  # the sum is that of the lists that count
        alone = graded_lists(*lists[: 3 if count == 2 else 1])
        _, others = loss_of(alone[1], alone[0], TASKS[2:], constants._replace(groups=3))
        np.testing.assert_allclose(part.total, others["l"].total, rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "poly1", "pairwise_logistic"])
def test_a_batch_without_a_positive_has_no_loss(name):
    batch, scores = graded_lists([0, 0, 0], [0, 0])
    constants = options(names={"ranking": name}, groups=2, list_size=3)

    def loss(values):
        return loss_of({"l": values}, batch, TASKS[2:], constants)[0]

    value, gradient = jax.value_and_grad(loss)(scores["l"])
    assert value == 0 and not np.asarray(gradient).any()


# --- Multi-label and ordinal classification ---


def test_multi_label_losses_are_binary_cross_entropies():
    targets = np.array([[1, 0, 1, 1], [0, 0, 0, 0]], np.float32)
    p = 1 / (1 + np.exp(-SCORES.astype(np.float64)))
    expected = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean(axis=-1)
    values = losses.sigmoid_cross_entropy(jnp.asarray(SCORES[None]), jnp.asarray(targets[None]))
    np.testing.assert_allclose(values[0], expected, rtol=2e-5)  # float32 exponentials


ORDINAL = Task("o", "ordinal", Template("{x}"), classes=("a", "b", "c", "d", "e"))


def test_the_cumulative_link_is_the_negative_log_probability():
    probabilities = ORDINAL.kind.postprocess(ORDINAL, SCORES)
    for label in range(5):
        values = losses.cumulative_link(jnp.asarray(SCORES[None]), jnp.full((1, 2), float(label)))
        np.testing.assert_allclose(values[0], -np.log(probabilities[:, label]), rtol=1e-4)


def test_the_cumulative_link_stays_finite_far_from_the_label():
    scores = jnp.asarray([[[200.0, -300.0, 0.0, 50.0], [-200.0, -90.0, -90.0, -90.0]]])
    for label in range(5):
        labels = jnp.full((1, 2), float(label))

        def total(s, labels=labels):
            return losses.cumulative_link(s, labels).sum()

        value, gradient = jax.value_and_grad(total)(scores)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_an_objective_may_add_a_term_over_the_batch(monkeypatch):
    """A custom loss that adds to the loss of each text a term of the spread of pooled states."""
    monkeypatch.setitem(losses.LOSSES, "classification", dict(losses.LOSSES["classification"]))

    def spread(inputs, options):
        own = losses.LOSSES["classification"]["softmax_cross_entropy"](inputs, options)
        real = (inputs.weight > 0)[..., None]
        apart = jnp.var(inputs.output.pooled, axis=(0, 1), where=real).sum()
        return own._replace(total=own.total - 0.1 * apart)

    losses.register_loss("classification", "spread", spread)
    batch, scores = mixture(2, 4, range(8))
    pooled = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 3)), jnp.float32)
    output = EncoderOutput(None, pooled, scores)
    plain, _ = batch_loss(output, batch, TASKS, options())
    both, parts = batch_loss(
        output, batch, TASKS, options(names=NAMES | {"classification": "spread"})
    )
    apart = np.var(np.asarray(pooled)[np.asarray(batch.task_id == 0) & (batch.weight > 0)], axis=0)
    np.testing.assert_allclose(plain - both, 0.1 * apart.sum() / 6, rtol=1e-4)
    assert float(parts["c"].examples) == 2
    with pytest.raises(InputError, match="loss 'spread' of kind classification is already"):
        losses.register_loss("classification", "spread", spread)
    with pytest.raises(InputError, match="kind 'clasification'; did you mean 'classification'"):
        losses.register_loss("clasification", "spread", spread)
    assert "clasification" not in losses.LOSSES
