"""Checkpoint format versions: earlier ones still load, newer ones are refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import HeadConfig
from gemma_encoder.training import checkpoint, loop
from gemma_encoder.training.hooks import Hook
from gemma_encoder.weights import native

FIRST = pathlib.Path(__file__).parent / "format_1"  # written by version 0.1 of the first format
EXPECTED = json.loads((FIRST / "predictions.json").read_text())


def test_a_checkpoint_of_the_first_format_predicts_the_same():
    predictor = ge.Predictor.load(FIRST)
    assert predictor.spec.encoder.heads == {
        "toy_sentiment": HeadConfig(2, hidden_dims=(8,)),
        "toy_similarity": HeadConfig(1, hidden_dims=(8,)),
        "toy_ranking": HeadConfig(1, hidden_dims=(8,)),
    }
    documents = [(EXPECTED["query"], document) for document in EXPECTED["documents"]]
    predictions = {
        "toy_sentiment": predictor.predict(EXPECTED["texts"], "toy_sentiment"),
        "toy_similarity": predictor.predict(EXPECTED["pairs"], "toy_similarity"),
        "toy_ranking": predictor.predict(documents, "toy_ranking"),
        "embed": predictor.embed(EXPECTED["texts"]),
    }
    for name, values in predictions.items():
        # Tests compile without XLA's optimizations: float32 sums in another order.
        np.testing.assert_allclose(values, EXPECTED["predictions"][name], rtol=1e-4, atol=1e-5)


def test_a_language_model_of_the_first_format_has_its_head():
    description = json.loads((FIRST / "checkpoints/4/inference/inference.json").read_text())
    encoder = description["encoder"] | {
        "heads": {"text": 2},
        "language_heads": ["text"],
        "attention": "causal",
    }
    spec = native.InferenceSpec.from_description(
        description | {"encoder": encoder, "tasks": []}, ge.Tokenizer.load("small").model, FIRST
    )
    assert spec.encoder.heads == {"text": HeadConfig(2, "language_model")}


def test_a_description_is_read_back_and_upgraded():
    spec = ge.Predictor.load(FIRST).spec
    description = json.loads(json.dumps(spec.description()))
    assert description["format_version"] == native.FORMAT_VERSION == 3
    again = native.InferenceSpec.from_description(description, spec.tokenizer.model, FIRST)
    assert again.description() == spec.description()


@pytest.fixture
def damaged(tmp_path):
    """`damaged(change)`: copies the checkpoint and applies `change` to its description."""

    def make(change):
        copy = tmp_path / "copy"
        shutil.copytree(FIRST, copy)
        path = copy / "checkpoints/4/inference/inference.json"
        description = ge.Predictor.load(FIRST).spec.description()
        change(description)
        path.write_text(json.dumps(description))
        return copy

    return make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(format_version=4),
            "has format version 4, this library reads versions 1 to 3",
        ),
        (lambda d: d.update(distilled_from="x"), "a checkpoint has the field 'distilled_from'"),
        (lambda d: d["encoder"].update(experts=8), "an encoder has the field 'experts'"),
        (
            lambda d: d["encoder"]["transformer"].update(per_layer=1),
            "a transformer has the field 'per_layer'",
        ),
        (lambda d: d["tasks"][0].update(kind="token_class"), "unknown task kind 'token_class'"),
        (
            lambda d: d["encoder"]["heads"]["toy_ranking"].update(kind="sparce"),
            "unknown head kind 'sparce'",
        ),
    ],
)
def test_a_newer_description_is_refused_in_one_line(damaged, change, message):
    with pytest.raises(InputError, match=message) as error:
        ge.Predictor.load(damaged(change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [], "description of a checkpoint is list; it is damaged"),
        (lambda d: d | {"tasks": "x"}, "tasks are not a list"),
        (lambda d: d | {"tasks": ["x"]}, "description of a task is str"),
        (lambda d: {k: v for k, v in d.items() if k != "encoder"}, "lacks the field 'encoder'"),
        (
            lambda d: d | {"tasks": [{k: v for k, v in d["tasks"][0].items() if k != "template"}]},
            "description of a task lacks the field 'template'",
        ),
        (lambda d: d | {"tasks": [d["tasks"][0] | {"template": "x"}]}, "a template is str"),
        (lambda d: d | {"tasks": [d["tasks"][0] | {"head": "x"}]}, "the encoder has none"),
        (
            lambda d: d | {"tasks": [d["tasks"][0] | {"classes": ["a", "b", "c"]}]},
            "of 3 outputs, the encoder has 2",
        ),
        (lambda d: d | {"format_version": "2"}, "has format version '2'"),
        (lambda d: d | {"tasks": [d["tasks"][0] | {"kind": "ordnal"}]}, "did you mean 'ordinal'"),
    ],
)
def test_a_damaged_description_is_refused_in_one_line(change, message):
    spec = ge.Predictor.load(FIRST).spec
    description = change(json.loads(json.dumps(spec.description())))
    with pytest.raises(InputError, match=message) as error:
        native.InferenceSpec.from_description(description, spec.tokenizer.model, FIRST)
    assert str(error.value).startswith(str(FIRST)) and "\n" not in str(error.value)


def test_training_starts_from_a_checkpoint_of_the_first_format(micro, tmp_path):
    config = micro(
        model__size="pretrained",
        model__transformer={},
        model__warm_start=str(FIRST),
        tokenizer="auto",
        train_for="2 steps",
        max_eval_examples=8,
    )
    assert loop.train(config, tmp_path).step == 2


class StopAtTwo(Hook):
    def is_due(self, run, step):
        return step == 2

    def on_due(self, run, step):
        run.request_stop("stopped by the test", preempted=True)


def test_a_run_of_the_second_format_resumes(micro, tmp_path, monkeypatch):
    """Format 2 stored the remainder layers' parameters and optimizer state as `rest`."""
    layers = {
        "num_layers": 3,
        "embed_dim": 32,
        "hidden_dim": 64,
        "head_dim": 8,
        "query_scale": 8**-0.5,
    }
    config = micro(model__transformer=layers, max_eval_examples=8)
    whole = loop.train(config, tmp_path / "whole")
    save = checkpoint.Checkpoints.save

    def save_format_2(self, state, *arguments):
        former = native.rename_remainder(state, "remainder", "rest")
        assert "rest" in former.parameters["backbone"]
        save(self, former, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(native, "FORMAT_VERSION", 2)
        patch.setattr(checkpoint.Checkpoints, "save", save_format_2)
        stopped = loop.train(config, tmp_path / "former", hooks=[StopAtTwo()])
        assert stopped.preempted and stopped.step == 2
    texts = ["a fine film", "a dull one"]
    assert np.isfinite(ge.Predictor.load(tmp_path / "former").embed(texts)).all()
    resumed = loop.train(config, tmp_path / "former")
    assert resumed.step == whole.step == 4
    np.testing.assert_array_equal(
        ge.Predictor.load(tmp_path / "former").embed(texts),
        ge.Predictor.load(tmp_path / "whole").embed(texts),
    )


def test_the_format_is_read_anew_each_time(tmp_path):
    """A folder may be replaced by a checkpoint of another format in the same process."""
    shutil.copytree(FIRST, tmp_path / "copy")
    folder = native.find(tmp_path / "copy")
    assert native.has_former_names(folder)
    path = folder / "inference" / "inference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 3}))
    assert not native.has_former_names(folder)
