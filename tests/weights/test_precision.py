"""Precision at loading: int8 and bfloat16, checkpoints in int8, and what refuses them."""

import json
import pathlib

import jax
import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder import cli, explain
from gemma_encoder.data.tasks.toy_text import sentiment
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import LoraConfig
from gemma_encoder.model.encoder import parameter_paths
from gemma_encoder.model.lora import INPUT_AXES
from gemma_encoder.training import loop
from gemma_encoder.weights import native, precision

TEXTS = ["a fine film .", "a dull one .", "the plot is thin , and the jokes are thinner ."]
SENTENCES = [fields["sentence"] for fields, _ in sentiment("validation", 500)]


@pytest.fixture(scope="module")
def exported(random_predictor, tmp_path_factory):
    """A Hugging Face folder of random weights."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    return ge.export_huggingface(random_predictor(), folder, heads=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, micro):
    """A workdir of the toy sentiment task, trained until some texts are told apart."""
    workdir = tmp_path_factory.mktemp("run")
    config = micro(tasks=("toy_sentiment",), train_for="40 steps", optimizer__learning_rate=1e-2)
    loop.train(config, workdir)
    return config, workdir


@pytest.fixture(scope="module")
def int8_folder(trained, tmp_path_factory):
    """An int8 checkpoint of the trained model, written by the command."""
    folder = tmp_path_factory.mktemp("int8") / "model"
    words = ["export", f"--workdir={trained[1]}", f"--output={folder}", "--format=int8"]
    assert cli.main(words) == 0
    return folder


def saved(predictor, folder):
    return precision.save_for_inference(predictor.spec, predictor.parameters, folder)


def folder_bytes(folder):
    return sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*") if path.is_file())


def test_weights_are_stored_in_int8(trained):
    """Matrices of layers and the embedding table; norms, poolers and heads in float32."""
    predictor = ge.Predictor.load(trained[1], quantization="int8")
    encoder = predictor.spec.encoder
    assert (encoder.quantization, encoder.weights) == ("int8", "int8")
    for path, leaf in parameter_paths(predictor.parameters).items():
        is_matrix = path.rsplit("/")[-1] in (*INPUT_AXES, "embedding")
        expected = np.int8 if is_matrix else np.float32
        if path.endswith("_sum"):
            expected = np.int32
        assert leaf.dtype == expected, path


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"weights": "bfloat16"}])
def test_decisions_are_those_of_float32(options, trained):
    exact, rounded = (
        ge.Predictor.load(trained[1], **options).predict(SENTENCES, "toy_sentiment")
        for options in ({}, options)
    )
    assert 0.2 < np.mean(exact[:, 1] > 0.5) < 0.8  # both classes, or nothing is tested
    assert np.mean(exact.argmax(1) == rounded.argmax(1)) >= 0.99
    np.testing.assert_allclose(rounded, exact, atol=0.2)  # where float32 is undecided


def test_an_int8_checkpoint_predicts_the_same_bits(trained, int8_folder):
    quantized = ge.Predictor.load(trained[1], quantization="int8")
    expected = quantized.predict(SENTENCES, "toy_sentiment")
    for options in ({}, {"quantization": "int8"}):
        stored = ge.Predictor.load(int8_folder, **options)
        np.testing.assert_array_equal(stored.predict(SENTENCES, "toy_sentiment"), expected)
    assert (int8_folder / "digests.json").exists()


def test_an_int8_checkpoint_is_a_quarter_of_the_size(random_predictor, tmp_path):
    predictor = random_predictor()
    float32 = precision.save_for_inference(
        predictor.spec, predictor.parameters, tmp_path / "float32"
    )
    predictor = ge.Predictor.load(float32, quantization="int8")
    int8 = saved(predictor, tmp_path / "int8")
    parameters = [folder_bytes(folder / "parameters") for folder in (int8, float32)]
    assert parameters[0] < 0.4 * parameters[1]  # of a model this small; 0.26 of gemma3_270m


def test_exports_of_other_formats_load_in_int8(exported):
    exact, rounded = (
        ge.Predictor.load(exported, **options).embed(TEXTS)
        for options in ({}, {"quantization": "int8"})
    )
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.1


def test_another_dtype_than_declared_is_refused(int8_folder, tmp_path):
    predictor = ge.Predictor.load(int8_folder)
    backbone = predictor.parameters["backbone"]
    backbone["embedding"] = backbone["embedding"].astype(np.float32)
    folder = precision.save_for_inference(
        predictor.spec, predictor.parameters, tmp_path / "damaged"
    )
    with pytest.raises(InputError, match="embedding is float32, the description declares int8"):
        ge.Predictor.load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "none"}, "the checkpoint holds int8 weights"),
        ({"weights": "float32"}, "the checkpoint holds int8 weights"),
        ({"weights": "bfloat16"}, "the checkpoint holds int8 weights"),
    ],
)
def test_int8_is_not_restored_to_floats(options, message, int8_folder):
    with pytest.raises(InputError, match=message):
        ge.Predictor.load(int8_folder, **options)


def test_only_predictions_take_int8(int8_folder, tmp_path):
    message = "with which a model can only predict and embed"
    predictor = ge.Predictor.load(int8_folder)
    for use in (
        lambda: ge.export_huggingface(predictor, tmp_path / "out"),
        lambda: ge.load_backbone(int8_folder),
        lambda: explain.attention_maps(predictor, TEXTS[0], "toy_sentiment"),
    ):
        with pytest.raises(InputError, match=message):
            use()
    assert not (tmp_path / "out").exists()


def test_int8_cannot_be_trained_on(int8_folder, micro, tmp_path):
    config = micro(model__size="pretrained", model__transformer={})
    config.model.warm_start = str(int8_folder)
    with pytest.raises(InputError, match="holds int8 weights"):
        loop.train(config, tmp_path / "run")


def test_adapters_are_refused(random_predictor, tmp_path):
    predictor = random_predictor(lora=LoraConfig(2))
    folder = saved(predictor, tmp_path / "lora")
    with pytest.raises(InputError, match="not for adapters"):
        ge.Predictor.load(folder, quantization="int8")


def test_evaluation_in_int8_leaves_the_run_as_it_is(trained, capsys):
    config, workdir = trained
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    result = loop.evaluate(config, workdir, quantization="int8")
    assert {path: path.read_bytes() for path in before} == before
    exact = loop.evaluate(config, workdir)
    for task, metrics in exact.metrics.items():
        assert result.metrics[task].keys() == metrics.keys()
        accuracy = metrics.get("accuracy")
        assert accuracy is None or abs(result.metrics[task]["accuracy"] - accuracy) < 0.02
    with pytest.raises(InputError, match="leave out calibrate or quantization"):
        loop.evaluate(config, workdir, calibrate=True, quantization="int8")


def test_training_for_int8_is_inference_in_int8(micro, tmp_path):
    """Evaluation during training gives the bits of int8 weights; the description says so."""
    config = micro(tasks=("toy_sentiment",), model__quantization="int8")
    outcome = loop.train(config, tmp_path)
    predictor = ge.Predictor.load(tmp_path)
    assert native.load_inference_spec(outcome.checkpoint).encoder.quantization == "int8"
    assert (predictor.spec.encoder.quantization, predictor.spec.encoder.weights) == ("int8", "int8")
    again = loop.evaluate(config, tmp_path)
    assert again.metrics == outcome.metrics
    jax.tree.map(
        np.testing.assert_array_equal,
        [split.scores for split in again.predictions["toy_sentiment"]],
        [split.scores for split in outcome.predictions["toy_sentiment"]],
    )


def test_training_for_int8_refuses_adapters(micro, tmp_path):
    config = micro(model__quantization="int8", model__lora__rank=2)
    with pytest.raises(InputError, match="merge them first"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_flags_of_commands(trained, tmp_path, capsys):
    _, workdir = trained
    (tmp_path / "texts.txt").write_text("a fine film .\na dull one .\n")
    words = ["predict", f"--workdir={workdir}", f"--input={tmp_path / 'texts.txt'}"]
    words += ["--task=toy_sentiment", "--quantization=int8"]
    assert cli.main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = ge.Predictor.load(workdir, quantization="int8").predict(
        ["a fine film .", "a dull one ."], "toy_sentiment"
    )
    probabilities = [list(line["probabilities"].values()) for line in lines]
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
