"""Mixtures: their tasks and rates."""

import numpy as np
import pytest

from gemma_encoder.data import mixtures, registry
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.data.tasks import glue
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

TRAINING = StreamOptions(
    BatchShape(rows=2, row_length=128, segments=4, groups=2, list_size=4), max_length=64
)
TASK = Task("t", "classification", Template("{x}"), ("accuracy",), ("a", "b"))


def memory(count):
    return MemorySource(
        TASK,
        DataOptions(),
        lambda split: [[Example({"x": f"text {i}"}, i % 2)] for i in range(count)],
    )


def test_mixtures_are_named_lists_of_registered_tasks():
    assert mixtures.expand_mixtures(("glue", "toy_ranking")) == (*glue.TASKS, "toy_ranking")
    assert all(set(tasks) <= set(registry.names()) for tasks in mixtures.MIXTURES.values())
    assert not set(mixtures.MIXTURES) & set(registry.names())


def test_rates():
    sources = [memory(100), memory(300)]
    np.testing.assert_allclose(mixtures.rates(sources, "equal"), [0.5, 0.5])
    np.testing.assert_allclose(mixtures.rates(sources, "proportional"), [0.25, 0.75])
    # T5's temperature 2: the square roots of the sizes, 10 : 17.32.
    np.testing.assert_allclose(
        mixtures.rates(sources, "temperature", 2.0), [0.3660254, 0.6339746], rtol=1e-6
    )
    with pytest.raises(InputError, match="did you mean 'proportional'"):
        mixtures.rates(sources, "proportionl")
    with pytest.raises(InputError, match="temperature"):
        mixtures.rates(sources, "temperature", 0.0)


def test_tasks_without_train_split_need_a_trained_head(benchmarks):
    sources = [registry.get(name) for name in ("glue_mnli", "glue_ax", "superglue_copa")]
    for mixing in mixtures.RATES:
        np.testing.assert_allclose(
            mixtures.rates(sources, mixing), [0.5, 0, 0.5]
        )  # eight records each
    with pytest.raises(
        InputError,
        match="'glue_ax' has no train split, and no other task trains its head 'glue_mnli'",
    ):
        mixtures.rates(sources[1:], "equal")
    with pytest.raises(InputError, match="no task has a train split to learn from: glue_ax"):
        mixtures.rates(sources[1:2], "proportional")
    with pytest.raises(InputError, match="task 'glue_ax' has no train split; it has test"):
        sources[1].size("train")


def test_a_stream_skips_tasks_with_a_rate_of_zero(tokenizer, benchmarks):
    sources = [registry.get(name) for name in ("superglue_axb", "superglue_rte", "superglue_axg")]
    stream = TrainStream(sources, mixtures.rates(sources, "equal"), tokenizer, TRAINING, prefetch=1)
    batch = next(stream)
    state = stream.state()
    expected = next(stream)
    stream.close()
    assert set(batch.task_id[batch.weight > 0]) == {1}
    resumed = TrainStream(
        sources, mixtures.rates(sources, "equal"), tokenizer, TRAINING, prefetch=1
    )
    resumed.restore(state)
    np.testing.assert_array_equal(next(resumed).tokens, expected.tokens)
    resumed.close()
