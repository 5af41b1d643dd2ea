"""A decoder pretrained in small: it learns, resumes, says how good it is, and is fine-tuned as an encoder."""

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
]
FLAGS += [
    "--config.batch.row_length=64",
    "--config.batch.rows=8",
    "--config.max_train_examples=0",
    "--config.max_eval_examples=100",
]


def main(*arguments: str) -> int:
    """The exit code of the program."""
    return pretrain.main(arguments)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "toy.txt"
    path.write_text("".join(text + "\n" for text in toy_text.corpus(300)))
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, micro, texts):
    """(workdir, folder) of the program's run of the `micro` model on toy text."""
    transformer = micro().model.transformer.to_dict()
    folder = tmp_path_factory.mktemp("decoder")
    arguments = [
        "--config=pretrain_decoder:size=gemma2_tiny,smoke",
        f"--workdir={folder / 'run'}",
        f"--output={folder / 'out'}",
    ]
    steps = [
        f"--config.model.transformer={transformer}",
        "--config.train_for=60 steps",
        "--config.optimizer.learning_rate=0.01",
        "--config.evaluate_every=50 percent",
    ]
    assert main(*arguments, *FLAGS, *steps, f"--config.text.train=('{texts}',)") == 0
    return folder / "run", folder / "out"


def unigram_perplexity(tokenizer, train, validation):
    """With one count more for every piece, bos apart, eos included."""
    counts = np.ones(tokenizer.vocab_size)
    for ids in tokenizer.encode(train):
        np.add.at(counts, [*ids, 1], 1)
    said = np.concatenate([[*ids, 1] for ids in tokenizer.encode(validation)])
    return float(np.exp(-np.log(counts / counts.sum())[said].mean()))


def test_it_learns_and_says_how_good_it_is(pretrained, texts):
    workdir, folder = pretrained
    record = json.loads((folder / "record.json").read_text())
    found = registry.get("text", DataOptions(text={"train": (str(texts),)}, max_eval_examples=100))
    tokenizer = ge.Tokenizer.load("small")
    unigram = unigram_perplexity(tokenizer, *map(list, map(found.pieces, ("train", "validation"))))
    assert record["validation_perplexity"] < 0.5 * unigram
    assert 1 < record["trigram_perplexity"] < 0.5 * unigram
    assert record["validation_tokens_predicted"] == sum(
        len(ids) + 1 for ids in tokenizer.encode(list(found.pieces("validation")))
    )
    assert (record["steps"], record["seed"], record["train"], record["size"]) == (
        60,
        0,
        ["toy.txt"],
        "gemma2_tiny",
    ) and record["training_seconds"] > 0
    curve = record["validation_perplexity_by_step"]
    assert list(curve) == ["30", "60"] and curve["30"] > curve["60"] == round(
        record["validation_perplexity"], 2
    )
    assert f"{record['validation_perplexity']:.2f}" in (folder / "README.md").read_text()
    lines = read_metrics(workdir)
    final = [line for line in lines if line["split"] == "validation"][-1]
    assert (
        final["perplexity"]
        == record["validation_perplexity"]
        == pytest.approx(np.exp(final["nll"]))
    )
    losses = [line["text/loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < losses[0] - 1 and losses[0] > 5, "of a predicted token, in nats"
    shares = [
        line["loss"] / (line["text/loss"] * line["real_token_share"])
        for line in lines
        if line["split"] == "train"
    ]
    assert all(0.7 < share < 1 for share in shares), (
        "the step's loss is that of the row's tokens: bos predicts, eos does not"
    )


def test_the_lowest_perplexity_is_the_best(pretrained, tmp_path):
    workdir, _ = pretrained
    step, value = Checkpoints(workdir, lowest=True).best()
    assert (
        value
        == min(
            line["perplexity"] for line in read_metrics(workdir) if line["split"] == "validation"
        )
        > 1
    )
    assert (step, value) == min(
        (
            (line["step"], line["perplexity"])
            for line in read_metrics(workdir)
            if line["split"] == "validation"
        ),
        key=lambda pair: pair[1],
    )


def test_the_folder_is_the_trained_backbone_to_the_bit_and_is_fine_tuned_as_an_encoder(
    pretrained, micro, tmp_path
):
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


def test_what_reads_a_run_reads_this_one(pretrained, texts, tmp_path):
    workdir, _ = pretrained
    predictor = ge.Predictor.load(workdir)
    said = predictor.predict(["the acting was not dull .", "dull not was acting the ."])
    perplexities = np.exp(said[:, 0] / said[:, 1])
    assert said.shape == (2, 2) and perplexities[0] < perplexities[1]
    frame = predictor.predict(["the acting was not dull ."], as_frame=True)
    assert list(frame) == ["text", "prediction", "nll", "tokens"] and frame["prediction"][
        0
    ] == pytest.approx(perplexities[0], rel=1e-5)
    assert (
        predictor.embed(["a text"]).shape == (1, 32) and "language_model" in predictor._repr_html_()
    )
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
    assert "text: language_model, train split" in "\n".join(
        inspect_data.data_report(settings, "train", 1, 20, 0)
    )


def test_it_resumes_to_the_bit(micro, texts, tmp_path, monkeypatch):
    fields = {
        "tasks": ("text",),
        "model__attention": "causal",
        "text__train": (str(texts),),
        "train_for": "6 steps",
        "log_every": "1 steps",
    }
    config = micro(**fields, checkpoint_every="2 steps", evaluate_every="0")
    straight = loop.train(config, tmp_path / "straight")
    original, left = loop.TrainStream.__next__, [3]

    def counted(self):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.TrainStream, "__next__", counted)
        loop.train(config, tmp_path / "killed")
    resumed = loop.train(config, tmp_path / "killed")
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name) if line["split"] == "train"]
        for name in ("straight", "killed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert straight.metrics == resumed.metrics


def test_it_trains_beside_other_kinds_under_one_causal_mask(micro, texts, tmp_path):
    config = micro(
        tasks=("toy_sentiment", "text"),
        model__attention="causal",
        text__train=(str(texts),),
        train_for="2 steps",
        mixture__mixing="equal",
    )
    outcome = loop.train(config, tmp_path)
    assert (
        outcome.metrics["text"]["perplexity"] > 1 and "accuracy" in outcome.metrics["toy_sentiment"]
    )
    trained = next(line for line in read_metrics(tmp_path) if line["split"] == "train")
    assert {"text/loss", "toy_sentiment/loss"} <= trained.keys()


def test_refusals(micro, texts, tmp_path, capsys):
    with pytest.raises(
        InputError,
        match="head 'text' is a language model's.*needs attention='causal', got 'bidirectional'",
    ):
        build(micro(tasks=("text",), text__train=(str(texts),)))
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ([f"--workdir={tmp_path / 'w'}"], "--output is missing"),
        (
            [f"--workdir={tmp_path / 'w'}", f"--output={tmp_path / 'there'}"],
            "there exists; name a new folder",
        ),
        (
            [
                f"--workdir={tmp_path / 'w'}",
                f"--output={tmp_path / 'o'}",
                "--config.tasks=('glue_sst2',)",
            ],
            "pretrains on the task 'text' alone",
        ),
        (
            [f"--workdir={tmp_path / 'w'}", f"--output={tmp_path / 'o'}", "--config.prepared=p"],
            "leave out --config.prepared",
        ),
        ([f"--workdir={tmp_path / 'w'}", f"--output={tmp_path / 'o'}"], "text.train is not set"),
    ):
        assert main(*arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
