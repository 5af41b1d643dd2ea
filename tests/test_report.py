"""The HTML report: escaped, self-contained, and correct against values computed by hand."""

import dataclasses
import html.parser
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from gemma_encoder import report
from gemma_encoder.cli import report as program
from gemma_encoder.evaluation import details
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.report import plots
from gemma_encoder.report.runs import RunFiles, unique_names
from gemma_encoder.report.scoring import score
from gemma_encoder.weights.native import FORMAT_VERSION

MOOD = Task(
    "mood",
    "classification",
    Template("{text}"),
    metrics=("accuracy", "f1"),
    classes=("sad", "glad"),
)
DEGREE = Task(
    "degree", "regression", Template("{text}"), metrics=("spearman",), label_range=(0.0, 5.0)
)
SEARCH = Task("search", "ranking", Template("{query} {document}"), metrics=("mrr@10",))
EXAM = Task(
    "exam",
    "classification",
    Template("{text}"),
    metrics=("exact_match",),
    classes=("wrong", "right"),
)


def table(examples):
    examples_table = ExampleTable()
    for example in examples:
        examples_table.add(example)
    return examples_table


def write_run(workdir, predictions, config=None, command="python -m it", steps=(10, 20)):
    """Writes a workdir as training leaves it, without the checkpoint's parameters."""
    write_inference_spec(workdir, predictions, command, steps[-1])
    config = config or {"seed": 0, "model": {"size": "tiny"}}
    (workdir / "config.json").write_text(json.dumps(config))
    lines = [training_line(step) for step in steps]
    for split_predictions in predictions:
        lines.append(evaluation_line(split_predictions, steps[-1]))
        split_predictions.write(workdir / "predictions")
        name, split = split_predictions.task.name, split_predictions.split
        values = details.describe(split_predictions, steps[-1], split_predictions.metrics())
        details.write_details(workdir / "predictions", name, split, values)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def write_inference_spec(workdir, predictions, command, step):
    folder = workdir / "checkpoints" / str(step) / "inference"
    folder.mkdir(parents=True)
    tasks = {
        split_predictions.task.name: split_predictions.task for split_predictions in predictions
    }
    description = {
        "format_version": FORMAT_VERSION,
        "tasks": [task.to_dict() for task in tasks.values()],
        "record": {"command": command},
    }
    (folder / "inference.json").write_text(json.dumps(description))


def training_line(step):
    return {
        "step": step,
        "split": "train",
        "loss": 1 / step,
        "learning_rate": 0.1,
        "texts_per_second": 100.0 * step,
        "waiting_for_data_share": 0.5,
    }


def evaluation_line(predictions, step):
    split, _, part = predictions.split.partition("_")
    suffix = f"_{part}" if part else ""
    metrics = {f"{name}{suffix}": value for name, value in predictions.metrics().items()}
    return {
        "step": step,
        "split": split,
        "task": predictions.task.name,
        **metrics,
        "examples": len(predictions.table.labels),
        "cut_share": 0.0,
    }


def moods(labels, probabilities, split="validation", texts=None):
    texts = texts or [f"text {i}" for i in range(len(labels))]
    examples = [
        Example({"text": text}, float(label)) for text, label in zip(texts, labels, strict=True)
    ]
    both_classes = np.stack([1 - np.array(probabilities), probabilities], axis=1)
    return Predictions(MOOD, split, both_classes, table(examples))


def searches(orders, first_stage=True):
    """Ranks three documents for each query, of which document 0 is relevant.

    The first stage returns them in the order 1, 0, 2.

    Args:
        orders: scores of documents 0, 1 and 2 for each query.
        first_stage: whether to include the first stage.
    """
    first_stage_order = (1, 0, 2)
    examples = [
        Example({"query": f"what {q}", "document": str(d)}, float(d == 0), f"q{q}", f"d{d}")
        for q in range(len(orders))
        for d in first_stage_order
    ]
    scores = np.array([[order[d] for d in first_stage_order] for order in orders], np.float32)
    return Predictions(
        SEARCH, "validation", scores.ravel(), table(examples), first_stage=first_stage
    )


class Page(html.parser.HTMLParser):
    """Text, tags and attributes of a page; asserts that tags are balanced."""

    VOID = ("meta", "br", "line", "circle", "rect", "polyline")

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.attributes = []
        self.text = ""
        self._open = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert tag in self.VOID or self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text += data


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_page_shows_results_and_no_external_resources(tmp_path, rng):
    labels = rng.integers(0, 2, 60)
    degrees = [Example({"text": f"degree {i}"}, float(i % 6)) for i in range(60)]
    predictions = [
        moods(labels, np.clip(labels * 0.6 + 0.2 + rng.normal(0, 0.3, 60), 0.01, 0.99)),
        Predictions(DEGREE, "validation", np.arange(60) % 6 + rng.normal(0, 1, 60), table(degrees)),
        searches([(3, 2, 1), (1, 3, 2), (2, 3, 1), (1, 2, 3)]),
    ]
    page = Page(report.render_report([write_run(tmp_path / "one", predictions)]))
    for word in (
        "python -m it",
        "20 steps",
        "sad",
        "glad",
        "mood",
        "degree",
        "spearman",
        "mrr@10",
        "texts/s",
        "2,000",
        "50.00%",
        "loss",
    ):
        assert word in page.text, word
    assert page.tags.count("svg") >= 6
    assert not {"script", "link", "img"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    value = predictions[0].metrics()["accuracy"]
    assert f"{value:.3f}" in page.text
    # The first stage ranks the relevant document second; the run ranks it first for one query,
    # second for one, and third for two.
    assert "1 queries won, 1 tied, 2 lost" in page.text
    assert page.text.count("what 0") == 1


def test_queries_with_blanks_in_their_ids_are_reported(tmp_path):
    ids = ["query 0", "My File 0.pdf", "a%20b", "100%"]
    examples = [
        Example({"query": f"what {i}", "document": str(d)}, float(d == 0), query, f"doc {d} %")
        for i, query in enumerate(ids)
        for d in range(3)
    ]
    predictions = Predictions(
        SEARCH, "validation", np.arange(12.0), table(examples), first_stage=True
    )
    run = write_run(tmp_path / "run", [predictions])
    assert score(RunFiles.load(run, "run"))[0].units == ids
    page = Page(report.render_report([run]))
    assert all(query in page.text for query in ids) and "what 0" in page.text
    trec = run / "predictions" / "search.validation.trec"
    trec.write_text(trec.read_text().replace("query%200", "query 0"))
    (run / "predictions" / "digests.json").unlink()
    with pytest.raises(InputError, match=r"search.validation.trec:1: expected 6 columns, got 7"):
        report.render_report([run])


def test_undefined_metrics_are_reported(tmp_path):
    run = write_run(tmp_path / "run", [moods([0, 1], [0.2, 0.8])])
    path = run / "metrics.jsonl"
    path.write_text(re.sub(r'"f1": [\d.]+', '"f1": null', path.read_text()))
    assert "undefined" in Page(report.render_report([run])).text


def test_metrics_stand_beside_chance_and_classes_have_scores(tmp_path):
    examples = [Example({"text": str(i)}, float(i % 6)) for i in range(12)]
    degree = dataclasses.replace(DEGREE, metrics=("mae",))
    predictions = [
        moods([0, 0, 0, 1], [0.1, 0.1, 0.9, 0.9]),
        Predictions(degree, "validation", np.arange(12) % 6 + 0.5, table(examples), constant=1.0),
    ]
    page = report.render_report([write_run(tmp_path / "one", predictions)])
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in page.split("<tr>")]
    shown = {row[2]: (row[4], row[6]) for row in rows if len(row) == 8}
    assert shown["accuracy"] == ("0.750", "0.750") and shown["f1"] == ("0.667", "0.000")
    assert shown["mae ↓"] == ("0.500", "1.833")
    assert ["sad", "1.000", "0.667", "0.800", "3"] in rows
    assert ["glad", "0.500", "1.000", "0.667", "1"] in rows


@pytest.mark.parametrize("first_stage", [True, False])
def test_ranking_has_a_random_order_and_a_first_stage(tmp_path, first_stage):
    predictions = searches([(3, 2, 1), (1, 3, 2)], first_stage)
    page = report.render_report([write_run(tmp_path / "one", [predictions])])
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in page.split("<tr>")]
    (head,) = [row for row in rows if "95 % interval" in row]
    (values,) = [row for row in rows if row[:3] == ["search", "validation", "mrr@10"]]
    shown = dict(zip(head, values, strict=True))
    assert shown["value"] == "0.667" and shown["chance"] == f"{(1 + 1 / 2 + 1 / 3) / 3:.3f}"
    assert shown.get("first stage") == ("0.500" if first_stage else None)


def test_many_classes_are_cut_to_the_worst(tmp_path):
    names = tuple(f"class {index}" for index in range(300))
    task = dataclasses.replace(MOOD, metrics=("accuracy",), classes=names)
    examples = [Example({"text": str(i)}, float(i)) for i in range(300)]
    outputs = np.eye(300)[np.maximum(np.arange(300) - 1, 0)]
    predictions = Predictions(task, "validation", outputs, table(examples))
    text = Page(report.render_report([write_run(tmp_path / "one", [predictions])])).text
    assert "the 20 of lowest F1; 280 more in predictions/mood.validation.metrics.json" in text
    assert "The most frequent confusions. 279 more pairs." in text
    assert text.count("class 150") == 1  # among the task's classes


def test_html_in_texts_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    task = dataclasses.replace(MOOD, classes=(evil, "</td>"))
    examples = [Example({"text": f"{evil} & \"'"}, float(i % 2)) for i in range(4)]
    predictions = Predictions(task, "validation", np.array([[0.9, 0.1]] * 4), table(examples))
    runs = [
        write_run(tmp_path / name, [predictions], {"note": evil + name}, evil)
        for name in ("a", "b")
    ]
    page = Page(report.render_report(runs))
    assert "script" not in page.tags
    assert page.text.count(evil) >= 6


def test_names_in_no_encoding_are_shown_as_escapes(tmp_path):
    workdir = tmp_path / os.fsdecode(b"run\xff")
    write_run(workdir, [moods([0, 1], [0.2, 0.8])])
    assert r"run\udcff" in report.render_report([workdir])


def test_runs_are_compared_with_the_first(tmp_path, rng):
    labels = rng.integers(0, 2, 200)
    good = np.where(rng.random(200) < 0.9, labels, 1 - labels) * 0.8 + 0.1
    bad = np.where(rng.random(200) < 0.6, labels, 1 - labels) * 0.8 + 0.1
    runs = [
        write_run(tmp_path / name, [moods(labels, p)], {"seed": seed})
        for seed, (name, p) in enumerate([("good", good), ("same", good), ("bad", bad)])
    ]
    text = Page(report.render_report(runs)).text
    assert re.search(r"\+0\.000 \(-0\.0[12]\d to \+0\.0[12]\d\)", text), "equal predictions differ"
    worse = re.search(r"-0\.\d+ \((-0\.\d+) to (-0\.\d+)\)", text)
    assert worse, "a significant difference is missing"
    assert "seed" in text
    assert "model" not in text.split("What differs")[1].split("Curves")[0]


def test_grouped_examples_are_resampled_together(tmp_path):
    """Exact match over questions of two answers each is resampled by question, with repetition."""
    examples = [Example({"text": str(i)}, 1.0, f"question {i // 2}") for i in range(40)]
    probabilities = np.where(np.arange(40) % 8 == 0, 0.2, 0.8)
    both_classes = np.stack([1 - probabilities, probabilities], axis=1)
    predictions = Predictions(EXAM, "validation", both_classes, table(examples))
    run = RunFiles.load(write_run(tmp_path / "one", [predictions]), "one")
    (scored,) = score(run)
    measure = scored.metrics["exact_match"]
    assert len(scored.units) == 20
    assert measure(np.arange(20)) == predictions.metrics()["exact_match"] == 0.75
    assert measure(np.array([0, 0, 0, 1])) == 0.25
    assert measure(np.array([1, 1])) == 1.0


def test_parts_of_a_split_are_reported_separately(tmp_path):
    predictions = [
        moods([0, 1, 1], [0.1, 0.9, 0.2], "validation_matched"),
        moods([0, 1, 1], [0.1, 0.9, 0.8], "validation_mismatched"),
    ]
    text = Page(report.render_report([write_run(tmp_path / "one", predictions)])).text
    assert "accuracy_matched" in text
    assert "accuracy_mismatched" in text
    assert "mood, validation_matched" in text


@pytest.mark.parametrize("right", [True, False])
def test_no_interval_of_the_report_collapses(tmp_path, right):
    """80 of 80 right, or wrong, by every kind of unit: examples, questions and queries."""
    labels = np.arange(80) % 2
    examples = [Example({"text": str(i)}, 1.0, f"question {i // 2}") for i in range(80)]
    both_classes = np.tile([1.0 - right, float(right)], (80, 1))
    predictions = [
        moods(labels, np.abs(labels - (not right)).astype(float)),
        Predictions(EXAM, "validation", both_classes, table(examples)),
        searches([(3, 2, 1) if right else (0, 0, 0)] * 80),
    ]
    if not right:  # MRR@10 of a relevant document that is missing from the run
        predictions[2].qrels = {f"q{q}": {"d9": 1.0} for q in range(80)}
    runs = [write_run(tmp_path / name, predictions) for name in ("one", "two")]
    text = Page(report.render_report(runs)).text
    bounds = re.findall(r"([+-]?\d\.\d{3}) to ([+-]?\d\.\d{3})", text)
    assert len(bounds) == 4 * 2 + 4
    for low, high in bounds:
        assert 0.01 < float(high) - float(low) < 0.25


def test_perplexity_of_one_text_has_no_interval(tmp_path):
    task = Task("story", "language_model", Template("{text}"), metrics=("perplexity",))
    outputs = np.array([[6.0, 3.0]])
    predictions = Predictions(task, "validation", outputs, table([Example({"text": "x"}, 0.0)]))
    text = Page(report.render_report([write_run(tmp_path / "one", [predictions])])).text
    assert "7.389" in text and "7.389 to 7.389" not in text


def test_mistakes_are_sorted_worst_first():
    predictions = moods([0, 1, 0, 1, 0], [0.6, 0.9, 0.95, 0.3, 0.1])
    assert predictions.mistakes() == [2, 3, 0]
    assert predictions.mistakes(1) == [2]
    degrees = Predictions(
        DEGREE, "validation", np.array([1.0, 5.0, 2.5]), table([Example({"text": "x"}, 2.0)] * 3)
    )
    assert degrees.mistakes() == [1, 0, 2]
    unlabeled = moods([-1, -1], [0.6, 0.2], "test")
    assert unlabeled.mistakes() == []


def test_table_stores_at_most_max_texts(monkeypatch):
    monkeypatch.setattr(ExampleTable, "MAX_TEXTS", 3)
    predictions = moods([0] * 5, [0.9, 0.8, 0.99, 0.99, 0.99])
    assert len(predictions.table.fields) == 3
    assert predictions.mistakes() == [2, 0, 1]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.93, 0.97), (-3, 220), (1e-6, 2e-6), (5, 5)])
def test_ticks_are_round_and_near_the_range(low, high):
    ticks = plots.ticks(low, high)
    assert 2 <= len(ticks) <= 12
    span = (high - low) or 1
    for tick in ticks:
        assert low - span * 0.51 <= tick <= high + span * 0.51
        assert len(plots.short(tick)) <= 7
        assert float(plots.short(tick)) == pytest.approx(tick, rel=1e-2, abs=1e-12)


def test_bad_workdirs_are_rejected_in_one_line(tmp_path, capsys):
    good = write_run(tmp_path / "good", [moods([0, 1], [0.2, 0.8])])
    assert program.main([str(good), f"--output={tmp_path / 'r.html'}"]) == 0
    assert (tmp_path / "r.html").exists()
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    young = write_run(tmp_path / "young", [moods([0, 1], [0.2, 0.8])])
    (young / "metrics.jsonl").write_text("")
    broken = write_run(tmp_path / "broken", [moods([0, 1], [0.2, 0.8])])
    (broken / "predictions" / "mood.validation.jsonl").write_text(
        '{"label": 0, "prediction": 0, "probabilities": [1, 0]}\nnot json\n'
    )
    (broken / "predictions" / "digests.json").unlink()  # of a former version
    torn = write_run(tmp_path / "torn", [moods([0, 1], [0.2, 0.8])])
    (torn / "config.json").write_text("{")
    for arguments, message in [
        ([tmp_path / "none"], "none does not exist; give the workdir of a run"),
        ([tmp_path / "empty"], "empty has no config.json"),
        ([young], "has no line in metrics.jsonl yet"),
        ([broken], "mood.validation.jsonl:2: not a JSON object"),
        ([torn], "config.json cannot be read"),
        ([good, good], "a workdir is given twice"),
        ([good, f"--output={tmp_path / 'no' / 'r.html'}"], "cannot be written"),
    ]:
        assert program.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error


def test_missing_predictions_and_metrics_are_noted(tmp_path):
    run = write_run(tmp_path / "one", [moods([0, 1], [0.2, 0.8])])
    for path in (run / "predictions").iterdir():
        path.unlink()
    text = Page(report.render_report([run])).text
    assert "1.000" in text
    assert "run gemma-encoder evaluate" in text
    (run / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.0}\n')
    assert "Nothing was evaluated yet" in Page(report.render_report([run])).text


def test_runs_with_equal_folder_names_are_distinguished(tmp_path):
    runs = [
        write_run(tmp_path / folder / "run", [moods([0, 1], [0.2, 0.8])]) for folder in ("a", "b")
    ]
    assert unique_names(runs) == ["a/run", "b/run"]
    with pytest.raises(InputError, match="given twice"):
        unique_names([runs[0], runs[0]])


def test_import_loads_no_tensorflow():
    code = (
        "import sys, gemma_encoder.report; "
        "assert not [m for m in ('tensorflow', 'seqio', 'matplotlib') if m in sys.modules]"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_config_that_is_no_object_is_one_line(tmp_path):
    run = write_run(tmp_path / "run", [moods([0, 1], [0.6, 0.2])])
    (run / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json holds no JSON object"):
        report.render_report([run])
