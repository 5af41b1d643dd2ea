"""Predictor: equals training's evaluation, keeps the order of texts, refuses misuse in one line."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder import text_encoder
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.evaluation.forward import compile_forward, shard_batch
from gemma_encoder.evaluation.predictions import score_split
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable
from gemma_encoder.inputs.uncertainty import Calibration
from gemma_encoder.training import loop
from gemma_encoder.training.build import build
from gemma_encoder.weights import native

RECIPE = {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, micro):
    """Trains the three toy tasks for a few steps; returns the workdir and the outcome."""
    workdir = tmp_path_factory.mktemp("run")
    RECIPE.update(config=micro(), workdir=workdir)
    outcome = loop.train(RECIPE["config"], workdir, "the command")
    return workdir, outcome


@pytest.fixture(scope="module")
def predictor(trained):
    return ge.Predictor.load(trained[0])


@pytest.fixture(scope="module")
def predictors(trained):
    return functools.cache(lambda mesh: ge.Predictor.load(trained[0], mesh=mesh))


def evaluation_batches(task_id):
    """Returns the batches of a task in training's evaluation."""
    recipe = build(RECIPE["config"])
    shape = dataclasses.replace(recipe.stream.shape, groups=recipe.stream.readers, list_size=1)
    options = dataclasses.replace(recipe.stream, shape=shape, micro_batches=1)
    return evaluation_stream(
        recipe.sources[task_id], task_id, "validation", recipe.tokenizer, options, ExampleTable()
    )


def test_same_rows_give_the_same_bits_as_evaluation(trained, predictors):
    """The same batches on the same mesh give the predictions that training recorded, to the bit."""
    _, outcome = trained
    spread = predictors((-1, 1, 1))

    def forward(batch):
        output = jax.device_get(
            spread._encoder._forward(spread.parameters, shard_batch(batch, spread.mesh))
        )
        return output.scores, output.example_id, output.weight

    for task_id, (name, (predictions,)) in enumerate(outcome.predictions.items()):
        assert spread.mesh.size == 8
        task = spread.tasks[name]
        scores = score_split(task, evaluation_batches(task_id), forward)
        np.testing.assert_array_equal(task.kind.postprocess(task, scores), predictions.outputs)


def test_predictions_equal_the_evaluations_in_any_packing(trained, predictor):
    _, outcome = trained
    for task_id, (task, (predictions,)) in enumerate(outcome.predictions.items()):
        texts = predictions.table.fields[:10]
        # Rows are packed differently here: float32 sums differ in their last digits.
        np.testing.assert_allclose(
            predictor.predict(texts, task), predictions.outputs[: len(texts)], rtol=1e-5, atol=1e-5
        )
        pooled = {}
        for batch in evaluation_batches(task_id):
            output = predictor._encoder._forward(
                predictor.parameters, shard_batch(batch, predictor.mesh)
            )
            is_real = batch.weight > 0
            vectors = np.asarray(output.pooled)[is_real]
            pooled |= dict(zip(batch.example_id[is_real], vectors, strict=True))
        np.testing.assert_allclose(
            predictor.embed(texts, task),
            [pooled[index] for index in range(len(texts))],
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("mesh", [(-1, 1, 1), (1, -1, 1), (2, 2, 2)])
def test_several_devices_give_the_same_outputs(predictor, predictors, mesh):
    texts = [f"the plot was {'very ' * (i % 7)}dull ." for i in range(70)]
    spread = predictors(mesh)
    np.testing.assert_allclose(
        spread.predict(texts, "toy_sentiment"),
        predictor.predict(texts, "toy_sentiment"),
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        spread.embed(texts[:1]), predictor.embed(texts[:1]), rtol=1e-5, atol=1e-5
    )
    if mesh[1] != 1:
        assert not spread.parameters["backbone"]["embedding"].is_fully_replicated
    with pytest.raises(InputError, match="does not fit 8 devices"):
        ge.Predictor.load(RECIPE["workdir"], mesh=(3, 1, 1))


def test_frames_have_the_same_values_as_arrays(predictor):
    texts = ["a fine film .", "a dull one ."]
    frame = predictor.predict(texts, "toy_sentiment", as_frame=True)
    plain = predictor.predict(texts, "toy_sentiment")
    assert list(frame) == ["sentence", "prediction", "probability_negative", "probability_positive"]
    assert list(frame["sentence"]) == texts
    labels = [("negative", "positive")[index] for index in plain.argmax(axis=1)]
    assert list(frame["prediction"]) == labels
    np.testing.assert_array_equal(frame["probability_positive"], plain[:, 1])
    # A frame with the task's columns is valid input, too.
    np.testing.assert_array_equal(predictor.predict(frame, "toy_sentiment"), plain)
    documents = ["a red box .", "wool ."]
    ranked = predictor.rank("wool", documents, as_frame=True)
    pairs = list(zip(ranked["index"], ranked["score"], strict=True))
    assert pairs == predictor.rank("wool", documents)
    np.testing.assert_array_equal(
        predictor.embed(texts, as_frame=True).to_numpy(), predictor.embed(texts)
    )


def test_similarity_is_the_cosine(predictor):
    texts = ["a fine film .", "a dull one .", "a fine film ."]
    vectors = predictor.embed(texts)
    expected = [
        [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in vectors] for a in vectors
    ]
    np.testing.assert_allclose(predictor.similarity(texts), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        predictor.similarity(texts[:2], vectors), np.array(expected)[:2], rtol=1e-5, atol=1e-5
    )


def test_the_notebook_card_has_the_facts_and_is_escaped(predictor):
    card = predictor._repr_html_()
    for word in (
        "toy_sentiment",
        "bidirectional",
        "mean",
        "negative, positive",
        "accuracy",
        "random weights",
        "4 steps",
    ):
        assert word in card, word
    hostile = dataclasses.replace(
        predictor.spec, record={**predictor.spec.record, "command": "<script>alert(1)</script>"}
    )
    assert "<script>" not in ge.Predictor(hostile, predictor.parameters)._repr_html_()


def test_a_checkpoint_records_its_origin_and_metrics(trained, predictor):
    record = predictor.spec.record
    assert record["command"] == "the command" and record["config"]["train_for"] == "4 steps"
    assert record["examples"]["toy_sentiment"] == 64
    lines = {(line["task"], line["split"]): line for line in record["metrics"]}
    line = lines["toy_sentiment", "validation"]
    assert line["accuracy"] == trained[1].metrics["toy_sentiment"]["accuracy"]
    assert line["step"] == 4


def test_progress_is_shown_on_long_work_only(predictor, capsys, monkeypatch):
    predictor.embed(["a"], progress=True)
    assert not capsys.readouterr().err
    monkeypatch.setattr(text_encoder, "PROGRESS_DELAY", 0.0)
    predictor.embed(["a"] * 50, progress=True)
    assert "encoding" in capsys.readouterr().err


def test_outputs_do_not_depend_on_order_and_batch(predictor):
    texts = [f"the plot was {'very ' * (i % 7)}dull ." for i in range(150)]
    together = predictor.predict(texts, "toy_sentiment")
    assert together.shape == (150, 2)
    np.testing.assert_allclose(together.sum(axis=1), 1, rtol=1e-5)
    alone = np.concatenate([predictor.predict([text], "toy_sentiment") for text in texts[:7]])
    np.testing.assert_allclose(together[:7], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(together[7:14].argmax(axis=1), alone.argmax(axis=1))


def test_rank_sorts_the_scores(predictor):
    documents = ["a red box near the shop .", "someone sells wool .", "a red box near the shop ."]
    ranked = predictor.rank("red box near the shop", documents)
    scores = predictor.predict(
        [("red box near the shop", document) for document in documents], "toy_ranking"
    )
    assert [index for index, _ in ranked] == list(np.argsort(-scores, kind="stable"))
    assert [score for _, score in ranked] == sorted(
        (float(score) for score in scores), reverse=True
    )
    np.testing.assert_allclose(dict(ranked)[0], dict(ranked)[2], atol=1e-5)


def test_top_k_returns_the_best_documents(predictor):
    documents = [f"the box number {index} is red ." for index in range(7)]
    ranked = predictor.rank("red box", documents)
    assert predictor.rank("red box", documents, top_k=3) == ranked[:3]
    assert predictor.rank("red box", documents, top_k=99) == ranked
    frame = predictor.rank("red box", documents, top_k=2, as_frame=True)
    assert frame["index"].tolist() == [index for index, _ in ranked[:2]]
    with pytest.raises(InputError, match="top_k must be at least 1"):
        predictor.rank("red box", documents, top_k=0)


def test_classes_are_those_of_the_only_classification_task(predictor):
    assert predictor.classes == ("negative", "positive")
    bare = ge.Predictor(
        dataclasses.replace(predictor.spec, tasks=predictor.spec.tasks[1:]),
        predictor.parameters,
    )
    with pytest.raises(InputError, match="no task has classes"):
        _ = bare.classes


def test_warm_up_compiles_every_program_that_texts_need(predictor):
    """Nothing is compiled afterwards, eager operations included."""
    long = dataclasses.replace(predictor.spec, row_length=256, max_length=256)
    fresh = ge.Predictor(long, predictor.parameters)
    assert fresh.warm_up(max_rows=1) == 3  # a row of 256, 128 or 64 tokens
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            event.endswith("backend_compile_duration") and compiled.append(event)
        )
    )
    fresh.predict(["a film"], "toy_sentiment")
    fresh.predict(["a film " * 60], "toy_sentiment")
    fresh.predict(["a film " * 120], "toy_sentiment", as_frame=True)
    assert not compiled
    assert fresh.warm_up() == 5  # and 8 rows
    assert compiled
    compiled.clear()
    for count in (1, 12):
        fresh.embed(["a text of some words ."] * 10 * count)
        fresh.predict(["a text " * 60] * count, "toy_sentiment")
    fresh.rank("a film", ["good", "bad " * 100])
    assert not compiled


def test_inputs_of_the_wrong_form_are_refused_in_words(predictor):
    with pytest.raises(InputError, match="text 0: expected a string, .* got bytes"):
        predictor.predict([b"a film"], "toy_sentiment")
    frame = pytest.importorskip("pandas").DataFrame({"sentence": ["a film"]})
    with pytest.raises(InputError, match='such as a DataFrame\'s, need task=.*frame."text".'):
        predictor.embed(frame)
    assert predictor.embed(frame, task="toy_sentiment").shape == (1, 32)


def test_embeddings_are_pooled_states(predictor):
    bare = predictor.embed(["a fine film", "a dull one"])
    assert bare.shape == (2, 32) and bare.dtype == np.float32
    framed = predictor.embed([("a fine film", "a dull one")], task="toy_similarity")
    assert framed.shape == (1, 32) and not np.allclose(framed, bare[:1])


def test_fields_may_be_strings_tuples_or_dictionaries(predictor):
    pair = {"sentence1": "one .", "sentence2": "two ."}
    np.testing.assert_array_equal(
        predictor.predict([pair], "toy_similarity"),
        predictor.predict([("one .", "two .")], "toy_similarity"),
    )
    np.testing.assert_array_equal(
        predictor.predict([{"sentence": "one ."}], "toy_sentiment"),
        predictor.predict(["one ."], "toy_sentiment"),
    )


def test_long_and_unusual_texts_are_predicted(predictor, caplog):
    texts = ["word " * 20_000, "😀 日本語 \x07 ▁", "a"]
    result = predictor.predict(texts, "toy_sentiment")
    assert np.isfinite(result).all()
    assert "1 of 3 texts exceed max_length=64 tokens and were truncated" in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.predict(["x"], "glue_sst2"), "not trained on it.*'glue_sst2'.*toy_sentiment"),
        (
            lambda p: p.predict(["x"]),
            r"name a task: the checkpoint has toy_sentiment \(classification\), toy_similarity",
        ),
        (lambda p: p.predict([], "toy_sentiment"), "no text"),
        (lambda p: p.predict("x", "toy_sentiment"), "must be a list"),
        (lambda p: p.embed("x"), "must be a list"),
        (lambda p: p.predict([" "], "toy_sentiment"), "text 0: the text is empty"),
        (
            lambda p: p.predict(["x"], "toy_similarity"),
            r"text 0: task 'toy_similarity' needs 2 fields \(sentence1, sentence2\), got 1",
        ),
        (
            lambda p: p.predict([{"text": "x"}], "toy_sentiment"),
            "text 0: the template .* needs the field 'sentence'",
        ),
        (lambda p: p.predict([3], "toy_sentiment"), "text 0"),
        (lambda p: p.rank("x", ["y"], "toy_sentiment"), "a ranking task is needed"),
        (lambda p: p.rank("x", "y"), "documents must be a list"),
        (lambda p: p.embed(7), "texts must be a list, got int"),
        (lambda p: p.embed([]), "no text"),
        (lambda p: p.embed([3]), "text 0: the template .* needs the field 'text' as text; got int"),
        (
            lambda p: p.similarity(np.ones((2, 3), np.float32)),
            r"embeddings must be \[N, 32\], got \[2, 3\]",
        ),
        (
            lambda p: p.predict(
                [{"sentence": "a"}, {"sentense": "b"}],
                "toy_sentiment",
                names=["f.csv:2", "f.csv:3"],
            ),
            "f.csv:3: .*got only 'sentense'",
        ),
    ],
)
def test_misuse_is_refused_in_one_line(predictor, call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(predictor)
    assert "\n" not in str(caught.value)


def test_a_query_longer_than_the_row_is_cut_and_counted(predictor, caplog):
    """It neither ends the call nor changes the scores of the other texts."""
    assert len(predictor.rank("q " * 200, ["y", "z"])) == 2
    assert "2 of 2 texts exceed max_length=" in caplog.text
    rows = [{"query": query, "document": "y"} for query in ("a", "q " * 200, "b")]
    scores = predictor.predict(rows, "toy_ranking")
    np.testing.assert_allclose(
        scores[[0, 2]], predictor.predict([rows[0], rows[2]], "toy_ranking"), atol=1e-5
    )


def test_folders_without_a_valid_checkpoint_are_refused(trained, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        ge.Predictor.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a checkpoint: expected"):
        ge.Predictor.load(tmp_path)
    checkpoint = native.find(trained[0])
    assert ge.Predictor.load(checkpoint).spec.step == ge.Predictor.load(trained[0]).spec.step
    copy = tmp_path / "copy" / "inference"
    copy.mkdir(parents=True)
    description = json.loads((checkpoint / "inference" / "inference.json").read_text())
    (copy / "tokenizer.model").write_bytes(
        (checkpoint / "inference" / "tokenizer.model").read_bytes()
    )
    (copy / "inference.json").write_text(json.dumps(description | {"format_version": 0}))
    with pytest.raises(InputError, match="format version 0, this library reads versions 1 to 3"):
        ge.Predictor.load(copy.parent)
    (copy / "inference.json").write_text("{")
    with pytest.raises(InputError, match="inference.json cannot be read .* it is damaged"):
        ge.Predictor.load(copy.parent)


def test_a_bounded_number_of_programs_is_compiled(predictor):
    compile_forward.cache_clear()  # predictors share their programs
    fresh = ge.Predictor(predictor.spec, predictor.parameters)
    for count in (1, 3, 20, 100, 400, 401):
        fresh.embed([f"text number {i} " * (1 + i % 5) ** (i % 5) for i in range(count)])
    assert fresh._encoder._forward._cache_size() <= 2  # of 1 or 8 rows


@pytest.mark.parametrize(
    ("lengths", "rows", "row_length"),
    [
        ([5], 1, 64),
        ([64, 5], 1, 128),
        ([128], 1, 128),
        ([129, 5], 1, 256),
        ([128] * 4, 1, 128),
        ([128] * 5, 8, 128),
        ([200] * 9, 1, 256),
        ([200] * 15, 8, 512),
        ([300] * 9, 8, 512),
        ([20] * 10_000, 8, 128),
    ],
)
def test_rows_are_as_short_as_the_longest_text_allows(predictor, lengths, rows, row_length):
    long = ge.Predictor(dataclasses.replace(predictor.spec, row_length=512), predictor.parameters)
    shape = long._encoder._shape(lengths)
    assert (shape.rows, shape.row_length) == (rows, row_length)
    long._encoder._on_cpu = False
    assert long._encoder._shape([20] * 10_000).rows == 32
    assert long._encoder._shape([5]).row_length == 128
    odd = ge.Predictor(dataclasses.replace(predictor.spec, row_length=1_000), predictor.parameters)
    assert odd._encoder._lengths() == [1000, 512, 256, 128]
    assert odd._encoder._lengths(fewest=False) == [1000, 256, 128]


def test_outputs_do_not_depend_on_the_row_length(predictor):
    texts = [f"the plot was {'very ' * (i % 20)}dull ." for i in range(40)]
    long = ge.Predictor(dataclasses.replace(predictor.spec, row_length=256), predictor.parameters)
    np.testing.assert_allclose(
        long.predict(texts, "toy_sentiment"),
        predictor.predict(texts, "toy_sentiment"),
        rtol=1e-5,
        atol=1e-5,
    )


INFERENCE_PROGRAM = """
import sys, time
start = time.perf_counter()
import gemma_encoder as ge
seconds = time.perf_counter() - start
assert "tensorflow" not in sys.modules and "jax" not in sys.modules, "import is not light"
predictor = ge.Predictor.load(sys.argv[1])
print(predictor.predict(["a fine film ."], "toy_sentiment").shape)
training = ("tensorflow", "seqio", "tensorflow_datasets")
training += ("gemma_encoder.training", "gemma_encoder.data")
imported = [name for name in training if name in sys.modules]
assert not imported, imported
print(seconds)
"""


def test_import_is_light_and_inference_needs_no_tensorflow(trained):
    result = subprocess.run(
        [sys.executable, "-c", INFERENCE_PROGRAM, str(trained[0])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("(1, 2)")
    assert float(result.stdout.split()[-1]) < 3


# --- Calibration ---


@pytest.fixture(scope="module")
def calibrated(random_predictor):
    """Returns a predictor whose tasks are calibrated, with thresholds of 0.6, and a plain one."""
    plain = random_predictor()
    calibration = Calibration(2.0, (0.6,) * 50, "validation", 200, 20)
    tasks = tuple(
        dataclasses.replace(task, calibration=calibration) if task.kind.conformal_columns else task
        for task in plain.spec.tasks
    )
    spec = dataclasses.replace(plain.spec, tasks=tasks)
    return ge.Predictor(spec, plain.parameters), plain


def test_the_temperature_divides_the_scores(calibrated):
    predictor, plain = calibrated
    texts = ["a good film .", "a dull one ."]
    outputs = predictor.predict(texts, "toy_sentiment")
    before = plain.predict(texts, "toy_sentiment")
    np.testing.assert_allclose(
        np.log(outputs[:, 1] / outputs[:, 0]), np.log(before[:, 1] / before[:, 0]) / 2, rtol=1e-4
    )


def test_conformal_columns_are_in_the_frame(calibrated):
    predictor, plain = calibrated
    texts = ["a good film .", "a dull one ."]
    frame = predictor.predict(texts, "toy_sentiment", as_frame=True, conformal=0.9)
    outputs = predictor.predict(texts, "toy_sentiment")
    sets = predictor.task("toy_sentiment").conformal(outputs, 0.9)["prediction_set"]
    assert list(frame["prediction_set"]) == sets
    pairs = [("one .", "two ."), ("three .", "three .")]
    frame = predictor.predict(pairs, "toy_similarity", as_frame=True, conformal=0.9)
    np.testing.assert_allclose(frame["high"] - frame["prediction"], 0.6, rtol=1e-6)
    np.testing.assert_allclose(frame["prediction"] - frame["low"], 0.6, rtol=1e-6)
    with pytest.raises(InputError, match="set as_frame=True"):
        predictor.predict(texts, "toy_sentiment", conformal=0.9)
    with pytest.raises(InputError, match="holds no conformal calibration"):
        plain.predict(texts, "toy_sentiment", as_frame=True, conformal=0.9)
