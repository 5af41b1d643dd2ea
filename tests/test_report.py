"""The report: made of what runs leave, escaped, self-contained, and right where it can be worked by hand."""

import dataclasses
import html.parser
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from gemma_encoder import report
from gemma_encoder.cli import report as program
from gemma_encoder.evaluation import bootstrap
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
    found = ExampleTable()
    for example in examples:
        found.add(example)
    return found


def write_run(workdir, predictions, config=None, command="python -m it", steps=(10, 20)):
    """A workdir as training leaves it, without the checkpoint's parameters."""
    tasks = {found.task.name: found.task for found in predictions}
    folder = workdir / "checkpoints" / str(steps[-1]) / "inference"
    folder.mkdir(parents=True)
    description = {
        "format_version": FORMAT_VERSION,
        "tasks": [task.to_dict() for task in tasks.values()],
        "record": {"command": command},
    }
    (folder / "inference.json").write_text(json.dumps(description))
    (workdir / "config.json").write_text(
        json.dumps(config or {"seed": 0, "model": {"size": "tiny"}})
    )
    lines = [
        {
            "step": step,
            "split": "train",
            "loss": 1 / step,
            "learning_rate": 0.1,
            "texts_per_second": 100.0 * step,
            "waiting_for_data_share": 0.5,
        }
        for step in steps
    ]
    for found in predictions:
        split, _, part = found.split.partition("_")
        values = {
            f"{name}_{part}" if part else name: value for name, value in found.metrics().items()
        }
        lines.append(
            {
                "step": steps[-1],
                "split": split,
                "task": found.task.name,
                **values,
                "examples": len(found.table.labels),
                "cut_share": 0.0,
            }
        )
        found.write(workdir / "predictions")
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def moods(labels, probabilities, split="validation", texts=None):
    texts = texts or [f"text {i}" for i in range(len(labels))]
    examples = [
        Example({"text": text}, float(label)) for text, label in zip(texts, labels, strict=True)
    ]
    return Predictions(
        MOOD, split, np.stack([1 - np.array(probabilities), probabilities], axis=1), table(examples)
    )


def searches(orders, first_stage=True):
    """Three documents a query, the first one relevant; `orders` are the scores of each."""
    examples = [
        Example({"query": f"what {q}", "document": str(d)}, float(d == 0), f"q{q}", f"d{d}")
        for q in range(len(orders))
        for d in (1, 0, 2)
    ]  # the first stage has the relevant one second
    scores = np.array([[order[d] for d in (1, 0, 2)] for order in orders], np.float32).ravel()
    return Predictions(SEARCH, "validation", scores, table(examples), first_stage=first_stage)


class Page(html.parser.HTMLParser):
    """Text, tags and attributes of a page; fails on tags that do not match."""

    VOID = ("meta", "br", "line", "circle", "rect", "polyline")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
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


def test_a_page_says_what_a_run_did(tmp_path, rng):
    labels = rng.integers(0, 2, 60)
    degrees = [Example({"text": f"degree {i}"}, float(i % 6)) for i in range(60)]
    found = [moods(labels, np.clip(labels * 0.6 + 0.2 + rng.normal(0, 0.3, 60), 0.01, 0.99))]
    found.append(
        Predictions(DEGREE, "validation", np.arange(60) % 6 + rng.normal(0, 1, 60), table(degrees))
    )
    found.append(searches([(3, 2, 1), (1, 3, 2), (2, 3, 1), (1, 2, 3)]))
    page = Page(report.render_report([write_run(tmp_path / "one", found)]))
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
        "What",
        "loss",
    ):
        assert word in page.text or word == "What", word
    assert (
        page.tags.count("svg") >= 6
        and "script" not in page.tags
        and "link" not in page.tags
        and "img" not in page.tags
    )
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    value = found[0].metrics()["accuracy"]
    assert f"{value:.3f}" in page.text
    assert (
        "1 queries won, 1 tied, 2 lost" in page.text
    )  # second of three before: up for one, the same for one, third for two
    assert page.text.count("what 0") == 1


def test_hostile_text_stays_text(tmp_path):
    evil = "<script>alert(1)</script>"
    task = dataclasses.replace(MOOD, classes=(evil, "</td>"))
    examples = [Example({"text": f"{evil} & \"'"}, float(i % 2)) for i in range(4)]
    found = Predictions(task, "validation", np.array([[0.9, 0.1]] * 4), table(examples))
    runs = [write_run(tmp_path / name, [found], {"note": evil + name}, evil) for name in ("a", "b")]
    page = Page(report.render_report(runs))
    assert "script" not in page.tags and page.text.count(evil) >= 6


def test_runs_are_compared(tmp_path, rng):
    labels = rng.integers(0, 2, 200)
    good = np.where(rng.random(200) < 0.9, labels, 1 - labels) * 0.8 + 0.1
    bad = np.where(rng.random(200) < 0.6, labels, 1 - labels) * 0.8 + 0.1
    runs = [
        write_run(tmp_path / name, [moods(labels, p)], {"seed": seed})
        for seed, (name, p) in enumerate([("good", good), ("same", good), ("bad", bad)])
    ]
    text = Page(report.render_report(runs)).text
    assert "+0.000 (+0.000 to +0.000)" in text, "a run does not differ from itself"
    worse = re.search(r"-0\.\d+ \((-0\.\d+) to (-0\.\d+)\)", text)
    assert worse, "a difference that is there is seen"
    assert "seed" in text and "model" not in text.split("What differs")[1].split("Curves")[0]


def test_groups_are_drawn_whole(tmp_path):
    """Exact match over questions of two answers each: a resample draws questions, and one that is drawn twice counts twice."""
    examples = [Example({"text": str(i)}, 1.0, f"question {i // 2}") for i in range(40)]
    probabilities = np.where(np.arange(40) % 8 == 0, 0.2, 0.8)
    found = Predictions(
        EXAM, "validation", np.stack([1 - probabilities, probabilities], axis=1), table(examples)
    )
    run = RunFiles.load(write_run(tmp_path / "one", [found]), "one")
    (scored,) = score(run)
    measure = scored.metrics["exact_match"]
    assert (
        len(scored.units) == 20 and measure(np.arange(20)) == found.metrics()["exact_match"] == 0.75
    )
    assert measure(np.array([0, 0, 0, 1])) == 0.25 and measure(np.array([1, 1])) == 1.0


def test_parts_of_a_split_go_apart(tmp_path):
    found = [
        moods([0, 1, 1], [0.1, 0.9, 0.2], "validation_matched"),
        moods([0, 1, 1], [0.1, 0.9, 0.8], "validation_mismatched"),
    ]
    text = Page(report.render_report([write_run(tmp_path / "one", found)])).text
    assert (
        "accuracy_matched" in text
        and "accuracy_mismatched" in text
        and "mood, validation_matched" in text
    )


def test_intervals_cover_and_narrow(rng):
    """Of samples whose true mean is known, about 95 % have intervals that hold it; four times the data halve the width."""
    widths, covered = {}, 0
    for units in (50, 200):
        sizes = []
        for seed in range(100):
            values = np.random.default_rng(seed).random(units) < 0.7
            found = bootstrap.percentile_interval(
                values.mean(),
                bootstrap.resampled(lambda chosen, values=values: values[chosen].mean(), units),
            )
            sizes.append(found.high - found.low)
            covered += (found.low <= 0.7 <= found.high) * (units == 200)
        widths[units] = np.mean(sizes)
    assert 88 <= covered <= 99
    assert widths[50] / widths[200] == pytest.approx(2, rel=0.1)


def test_mistakes_are_the_worst_ones():
    found = moods([0, 1, 0, 1, 0], [0.6, 0.9, 0.95, 0.3, 0.1])
    assert found.mistakes() == [2, 3, 0] and found.mistakes(1) == [2]
    degrees = Predictions(
        DEGREE, "validation", np.array([1.0, 5.0, 2.5]), table([Example({"text": "x"}, 2.0)] * 3)
    )
    assert degrees.mistakes() == [1, 0, 2]
    unlabeled = moods([-1, -1], [0.6, 0.2], "test")
    assert unlabeled.mistakes() == []


def test_no_more_texts_are_kept_than_stated(monkeypatch):
    monkeypatch.setattr(ExampleTable, "MAX_TEXTS", 3)
    found = moods([0] * 5, [0.9, 0.8, 0.99, 0.99, 0.99])
    assert len(found.table.fields) == 3 and found.mistakes() == [2, 0, 1]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.93, 0.97), (-3, 220), (1e-6, 2e-6), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    found = plots.ticks(low, high)
    assert 2 <= len(found) <= 12
    span = (high - low) or 1
    assert all(low - span * 0.51 <= tick <= high + span * 0.51 for tick in found)
    assert all(
        len(plots.short(tick)) <= 7
        and float(plots.short(tick)) == pytest.approx(tick, rel=1e-2, abs=1e-12)
        for tick in found
    )


def test_refusals_are_one_line(tmp_path, capsys):
    whole = write_run(tmp_path / "whole", [moods([0, 1], [0.2, 0.8])])
    assert (
        program.main([str(whole), f"--output={tmp_path / 'r.html'}"]) == 0
        and (tmp_path / "r.html").exists()
    )
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    young = write_run(tmp_path / "young", [moods([0, 1], [0.2, 0.8])])
    (young / "metrics.jsonl").write_text("")
    broken = write_run(tmp_path / "broken", [moods([0, 1], [0.2, 0.8])])
    (broken / "predictions" / "mood.validation.jsonl").write_text(
        '{"label": 0, "prediction": 0, "probabilities": [1, 0]}\nnot json\n'
    )
    torn = write_run(tmp_path / "torn", [moods([0, 1], [0.2, 0.8])])
    (torn / "config.json").write_text("{")
    for arguments, message in [
        ([tmp_path / "none"], "none does not exist; give the workdir of a run"),
        ([tmp_path / "empty"], "empty holds no config.json"),
        ([young], "has no line in metrics.jsonl yet"),
        ([broken], "mood.validation.jsonl:2: not a JSON object"),
        ([torn], "config.json cannot be read"),
        ([whole, whole], "a workdir is named twice"),
        ([whole, f"--output={tmp_path / 'no' / 'r.html'}"], "cannot be written"),
    ]:
        assert program.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error


def test_what_is_missing_is_said(tmp_path):
    run = write_run(tmp_path / "one", [moods([0, 1], [0.2, 0.8])])
    for path in (run / "predictions").iterdir():
        path.unlink()
    text = Page(report.render_report([run])).text
    assert "1.000" in text and "run gemma-encoder evaluate" in text
    (run / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.0}\n')
    assert "Nothing was evaluated yet" in Page(report.render_report([run])).text


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [
        write_run(tmp_path / folder / "run", [moods([0, 1], [0.2, 0.8])]) for folder in ("a", "b")
    ]
    assert unique_names(runs) == ["a/run", "b/run"]
    with pytest.raises(InputError, match="named twice"):
        unique_names([runs[0], runs[0]])


def test_it_needs_no_tensorflow():
    code = "import sys, gemma_encoder.report; assert not [m for m in ('tensorflow', 'seqio', 'matplotlib') if m in sys.modules]"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
