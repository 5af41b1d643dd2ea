"""Pretraining of a small decoder: learning, resuming, its record, and fine-tuning as an encoder."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import gemma_encoder as ge
from gemma_encoder.cli import inspect_data, pretrain, report
from gemma_encoder.data import registry
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.tasks import toy_text
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.encoder import parameter_dict
from gemma_encoder.training import loop
from gemma_encoder.training.build import build
from gemma_encoder.training.checkpoint import Checkpoints
from gemma_encoder.training.metrics_log import read_metrics

FLAGS = [
    "--config.tokenizer=small",
    "--config.model.compute_dtype=float32",
    "--config.model.remat=none",
    "--config.mesh=(-1,1,1)",
    "--config.max_length=64",
    "--config.batch.row_length=64",
    "--config.batch.rows=8",
    "--config.max_train_examples=0",
    "--config.max_eval_examples=100",
]


def main(*arguments: str) -> int:
    """Runs the program; returns its exit code."""
    return pretrain.main(arguments)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "toy.txt"
    path.write_text("".join(text + "\n" for text in toy_text.corpus(300)))
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, micro, texts):
    """(workdir, decoder folder) of a run of the program: the `micro` model on toy text."""
    transformer = micro().model.transformer.to_dict()
    folder = tmp_path_factory.mktemp("decoder")
    arguments = [
        "--config=pretrain_decoder:size=gemma2_tiny,smoke",
        f"--workdir={folder / 'run'}",
        f"--output={folder / 'out'}",
    ]
    steps = [
        f"--config.model.transformer={transformer}",
        "--config.train_for=24 steps",
        "--config.optimizer.learning_rate=0.02",
        "--config.evaluate_every=50 percent",
    ]
    assert main(*arguments, *FLAGS, *steps, f"--config.text.train=('{texts}',)") == 0
    return folder / "run", folder / "out"


def unigram_perplexity(tokenizer, train, validation):
    """Add-one unigram model: every piece counts once more; eos is predicted, bos is not."""
    counts = np.ones(tokenizer.vocab_size)
    for ids in tokenizer.encode(train):
        np.add.at(counts, [*ids, 1], 1)
    predicted = np.concatenate([[*ids, 1] for ids in tokenizer.encode(validation)])
    return float(np.exp(-np.log(counts / counts.sum())[predicted].mean()))


def test_training_beats_a_unigram_model_and_is_recorded(pretrained, texts):
    _, folder = pretrained
    record = json.loads((folder / "record.json").read_text())
    source = registry.get("text", DataOptions(text={"train": (str(texts),)}, max_eval_examples=100))
    tokenizer = ge.Tokenizer.load("small")
    train = list(source.pieces("train"))
    validation = list(source.pieces("validation"))
    unigram = unigram_perplexity(tokenizer, train, validation)
    assert record["validation_perplexity"] < 0.5 * unigram
    assert 1 < record["trigram_perplexity"] < 0.5 * unigram
    num_predicted = sum(len(ids) + 1 for ids in tokenizer.encode(validation))
    assert record["validation_tokens_predicted"] == num_predicted
    assert record["steps"] == 24
    assert record["seed"] == 0
    assert record["train"] == ["toy.txt"]
    assert record["size"] == "gemma2_tiny"
    assert record["training_seconds"] > 0
    curve = record["validation_perplexity_by_step"]
    assert list(curve) == ["12", "24"]
    assert curve["12"] > curve["24"] == round(record["validation_perplexity"], 2)
    assert f"{record['validation_perplexity']:.2f}" in (folder / "README.md").read_text()


def test_losses_and_perplexity_are_logged_per_token(pretrained):
    workdir, folder = pretrained
    record = json.loads((folder / "record.json").read_text())
    lines = read_metrics(workdir)
    final = [line for line in lines if line["split"] == "validation"][-1]
    assert final["perplexity"] == record["validation_perplexity"]
    assert final["perplexity"] == pytest.approx(np.exp(final["nll"]))
    train = [line for line in lines if line["split"] == "train"]
    losses = [line["text/loss"] for line in train]
    assert losses[-1] < losses[0] - 1, "nats per predicted token"
    assert losses[0] > 5, "nats per predicted token"
    shares = [line["loss"] / (line["text/loss"] * line["real_token_share"]) for line in train]
    assert all(0.7 < share < 1 for share in shares), (
        "the step's loss is over the row's tokens: bos predicts a token, eos does not"
    )


def test_the_lowest_perplexity_is_the_best(pretrained):
    workdir, _ = pretrained
    step, value = Checkpoints(workdir, lowest=True).best()
    validation = [
        (line["step"], line["perplexity"])
        for line in read_metrics(workdir)
        if line["split"] == "validation"
    ]
    assert (step, value) == min(validation, key=lambda pair: pair[1])
    assert value > 1


def test_the_decoder_is_the_trained_backbone_and_can_be_tuned(pretrained, micro, tmp_path):
    """The backbone is equal to the bit, and is fine-tuned as a bidirectional encoder."""
    workdir, folder = pretrained
    trees = [
        jax.device_get(parameter_dict(nnx.state(ge.load_backbone(path))))
        for path in (workdir, folder)
    ]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    assert ge.load_tokenizer(folder).model == ge.Tokenizer.load("small").model
    config = micro(
        tasks=("toy_sentiment",),
        model__size="pretrained",
        model__pretrained=str(folder),
        tokenizer="auto",
        train_for="1 steps",
    )
    assert config.model.attention == "bidirectional"
    outcome = loop.train(config, tmp_path / "run")
    assert 0 <= outcome.metrics["toy_sentiment"]["accuracy"] <= 1


def test_programs_read_a_pretraining_run(pretrained, texts, tmp_path):
    """Predictor, export, report and inspection."""
    workdir, _ = pretrained
    predictor = ge.Predictor.load(workdir)
    outputs = predictor.predict(["the acting was not dull .", "dull not was acting the ."])
    assert outputs.shape == (2, 2)
    perplexities = np.exp(outputs[:, 0] / outputs[:, 1])
    assert perplexities[0] < perplexities[1]
    frame = predictor.predict(["the acting was not dull ."], as_frame=True)
    assert list(frame) == ["text", "prediction", "nll", "tokens"]
    assert frame["prediction"][0] == pytest.approx(perplexities[0], rel=1e-5)
    assert predictor.embed(["a text"]).shape == (1, 32)
    assert "language_model" in predictor._repr_html_()
    with pytest.raises(
        InputError,
        match="no module for the head 'text' of kind language_model; heads=False leaves it out",
    ):
        ge.export_huggingface(predictor, tmp_path / "refused")
    exported = ge.export_huggingface(predictor, tmp_path / "exported", heads=False)
    np.testing.assert_allclose(
        ge.Predictor.load(exported).embed(["a text"]), predictor.embed(["a text"]), atol=1e-6
    )
    assert report.main([str(workdir), f"--output={tmp_path / 'report.html'}"]) in (None, 0)
    assert "perplexity" in (tmp_path / "report.html").read_text()
    settings = inspect_data.Settings(
        registry.get("text", DataOptions(text={"train": (str(texts),)})),
        predictor.spec.tokenizer,
        64,
        64,
        8,
    )
    lines = inspect_data.data_report(settings, "train", 1, 20, 0)
    assert "text: language_model, train split" in "\n".join(lines)


def test_resuming_is_exact(micro, texts, tmp_path, monkeypatch):
    fields = {
        "tasks": ("text",),
        "model__attention": "causal",
        "text__train": (str(texts),),
        "train_for": "6 steps",
        "log_every": "1 steps",
    }
    config = micro(**fields, checkpoint_every="2 steps", evaluate_every="0")
    uninterrupted = loop.train(config, tmp_path / "uninterrupted")
    next_batch = loop.TrainStream.__next__
    num_calls = 0

    def interrupt_after_three(self):
        nonlocal num_calls
        num_calls += 1
        if num_calls > 3:
            raise KeyboardInterrupt
        return next_batch(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.TrainStream, "__next__", interrupt_after_three)
        loop.train(config, tmp_path / "killed")
    resumed = loop.train(config, tmp_path / "killed")

    def losses(name):
        lines = read_metrics(tmp_path / name)
        return [line["loss"] for line in lines if line["split"] == "train"]

    assert losses("uninterrupted") == losses("killed")
    assert len(losses("killed")) == 6
    assert uninterrupted.metrics == resumed.metrics


def test_language_modeling_mixes_with_other_kinds(micro, texts, tmp_path):
    config = micro(
        tasks=("toy_sentiment", "text"),
        model__attention="causal",
        text__train=(str(texts),),
        train_for="2 steps",
        mixture__mixing="equal",
    )
    outcome = loop.train(config, tmp_path)
    assert outcome.metrics["text"]["perplexity"] > 1
    assert "accuracy" in outcome.metrics["toy_sentiment"]
    trained = next(line for line in read_metrics(tmp_path) if line["split"] == "train")
    assert {"text/loss", "toy_sentiment/loss"} <= trained.keys()


def test_errors(micro, texts, tmp_path, capsys):
    with pytest.raises(
        InputError,
        match="language-model head 'text'.*needs attention='causal', got 'bidirectional'",
    ):
        build(micro(tasks=("text",), text__train=(str(texts),)))
    (tmp_path / "there").mkdir()
    workdir = f"--workdir={tmp_path / 'w'}"
    output = f"--output={tmp_path / 'o'}"
    tasks = "--config.tasks=('glue_sst2',)"
    for arguments, message in (
        ([workdir], "--output is missing"),
        ([workdir, f"--output={tmp_path / 'there'}"], "there exists; name a new folder"),
        ([workdir, output, tasks], "pretrains on the task 'text' only"),
        ([workdir, output, "--config.prepared=p"], "leave out --config.prepared"),
        ([workdir, output], "text.train is not set"),
    ):
        assert main(*arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
