"""Model cards: properties, training data, metrics and license of an export."""

import dataclasses
import html
import json
import math

import pytest

import gemma_encoder as ge
from gemma_encoder.inputs.uncertainty import Calibration
from gemma_encoder.weights import card

METRICS = [
    {
        "step": 9,
        "split": "validation",
        "task": "toy_sentiment",
        "accuracy": 0.5,
        "examples": 12,
        "cut_share": 0.0,
    }
]


def record(**model):
    config = {"model": {"pretrained": "", "warm_start": "", **model}}
    return {
        "command": "python -m gemma_encoder.main --config=a|b.py",
        "config": config,
        "examples": {"toy_sentiment": 16_000},
        "metrics": METRICS,
    }


@pytest.fixture(scope="module")
def spec(random_predictor):
    return dataclasses.replace(random_predictor().spec, step=9, record=record())


def test_a_card_of_random_weights(spec):
    text = card.markdown(spec)
    for part in (
        "toy_sentiment",
        "16,000",
        "0.500",
        "--config=a|b.py",
        "at most 64 tokens",
        "random weights",
        "do not derive from Gemma's",
        "negative, positive",
    ):
        assert part in text, part
    assert "license: " not in text and text.startswith('---\nlibrary_name: "sentence-transformers"')


@pytest.mark.parametrize("start", [{"pretrained": "GEMMA3_270M_PT"}, {"warm_start": "runs/mnli"}])
def test_weights_derived_from_gemma_have_its_license(spec, start):
    text = card.markdown(dataclasses.replace(spec, record=record(**start)))
    assert 'license: "gemma"' in text and card.TERMS in text and next(iter(start.values())) in text


def test_metrics_stand_beside_chance_and_classes(spec):
    scores = {"precision": 0.25, "recall": 0.5, "f1": 1 / 3, "support": 6}
    classes = [{"class": name, **scores} for name in ("negative", "positive")]
    values = {"step": 9, "chance": {"accuracy": 0.625}, "classes": classes}
    values["intervals"] = {"accuracy": [0.2469, 0.7531]}
    details = {"details": {"toy_sentiment": {"validation": values}}}
    recorded = dataclasses.replace(spec, record=record() | details)
    text = card.markdown(recorded)
    row = "| toy_sentiment | validation | accuracy | 0.500 | 0.247 to 0.753 | 0.625 | 12 |"
    assert row in text and "| value | 95 % interval | chance |" in text
    assert "### toy_sentiment, validation\n\n| class | precision | recall | f1 | support |" in text
    assert "| positive | 0.250 | 0.500 | 0.333 | 6 |" in text and card.CHANCE_NOTE in text
    page = card.to_html(recorded)
    assert "0.625" in page and "<summary>toy_sentiment, validation</summary>" in page


@pytest.mark.parametrize("first_stage", [{"accuracy": 0.375}, {}])
def test_the_first_stage_has_a_column_where_there_is_one(spec, first_stage):
    values = {"step": 9, "chance": {"accuracy": 0.625}, "first_stage": first_stage}
    details = {"details": {"toy_sentiment": {"validation": values}}}
    recorded = dataclasses.replace(spec, record=record() | details)
    shown = "0.625 | 0.375 | 12" if first_stage else "0.625 | 12"
    row = f"| toy_sentiment | validation | accuracy | 0.500 |  | {shown} |"
    assert row in card.markdown(recorded)
    for text in (card.markdown(recorded), card.to_html(recorded)):
        assert ("first stage" in text) == bool(first_stage)


def test_chance_of_a_part_belongs_to_its_metric():
    values = {
        "validation_matched": {"chance": {"accuracy": 0.3}},
        "validation_mismatched": {"chance": {"accuracy": 0.4}},
        "test": {"chance": {"accuracy": 0.5}},
    }
    assert card.chance_values(values, "validation") == {
        "accuracy_matched": 0.3,
        "accuracy_mismatched": 0.4,
    }


def test_a_card_names_what_is_not_recorded(spec):
    text = card.markdown(dataclasses.replace(spec, record={}, tasks=()))
    assert "is not recorded" in text and "if they derive from Gemma's" in text


def test_cells_cannot_break_the_tables(spec):
    hostile = dataclasses.replace(spec.tasks[0], classes=("a|b", "<b>x</b>\n"))
    altered = dataclasses.replace(spec, tasks=(hostile,))
    assert "a\\|b" in card.markdown(altered)
    assert "<b>x</b>" not in card.to_html(altered) and "&lt;b&gt;" in card.to_html(altered)


def test_a_card_names_the_calibration(spec):
    fitted = Calibration(1.25, (), "validation", 640, 9)
    tasks = tuple(
        dataclasses.replace(task, calibration=fitted) if task.name == "toy_sentiment" else task
        for task in spec.tasks
    )
    calibrated = dataclasses.replace(spec, tasks=tasks)
    origin = "temperature 1.25; fitted on 640 examples of validation at step 9"
    assert "## Calibration\n\n| task | calibration |" in card.markdown(calibrated)
    assert f"| toy_sentiment | {origin} |" in card.markdown(calibrated)
    assert origin in card.to_html(calibrated)
    assert "alibration" not in card.markdown(spec) + card.to_html(spec)


def test_an_export_has_a_card_and_prompts(random_predictor, tmp_path):
    predictor = random_predictor()
    task = dataclasses.replace(predictor.spec.tasks[0], template=ge.Template("review: {sentence}"))
    spec = dataclasses.replace(
        predictor.spec, tasks=(task, *predictor.spec.tasks[1:]), record=record()
    )
    exported = ge.export_huggingface(
        ge.Predictor(spec, predictor.parameters), tmp_path / "out", heads=False
    )
    readme = (exported / "README.md").read_text()
    title = readme.split("## Config")[0].split("\n# ")[1].splitlines()[0]
    assert "toy" not in title
    assert "# A Gemma encoder" in readme
    # Only a task whose template ends with its single field has a prompt; pairs and bare texts have
    # none.
    assert json.loads((exported / "config_sentence_transformers.json").read_text())["prompts"] == {
        "toy_sentiment": "review: "
    }
    assert ge.Predictor.load(exported).spec.record["examples"] == {"toy_sentiment": 16_000}


@pytest.mark.parametrize("value", [None, math.nan])
def test_an_undefined_metric_is_named(spec, value):
    metrics = [{**METRICS[0], "accuracy": value}]
    altered = dataclasses.replace(spec, record={**spec.record, "metrics": metrics})
    assert "| accuracy | undefined |  |  | 12 |" in card.markdown(altered)
    assert "undefined" in card.to_html(altered)


HOSTILE = (
    "<img src=x onerror=alert(1)> [a](http://b) ![c](d) `e` ``` | \\| **f** # g"
    "\n\n---\nlicense: mit"
)


def test_texts_of_the_data_are_never_live(spec):
    """Names, the command and the config are shown as they are in the README and in notebooks."""
    yaml = pytest.importorskip("yaml")
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True})
    task = dataclasses.replace(
        spec.tasks[0],
        name=HOSTILE.replace("/", "").replace("\\", ""),
        classes=(HOSTILE, "b"),
        head="toy_sentiment",
    )
    classes = [{"class": HOSTILE, "precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 6}]
    hostile = record(pretrained=HOSTILE) | {
        "command": f"{HOSTILE}\n```\n# h",
        "metrics": [{"step": 9, "split": HOSTILE, "task": HOSTILE, HOSTILE: 0.5}],
        "details": {HOSTILE: {HOSTILE: {"classes": classes}}},
    }
    altered = dataclasses.replace(spec, tasks=(task,), record=hostile)
    text = card.markdown(altered)
    fields, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(fields)["license"] == "gemma"
    tokens = parser.enable("table").parse(body)
    inner = {child.type for token in tokens for child in token.children or ()}
    assert inner <= {"text", "code_inline", "softbreak"}
    assert "html_block" not in {token.type for token in tokens}
    headings = [token.tag for token in tokens if token.type == "heading_open"]
    assert headings == ["h1", "h2", "h2", "h2", "h3", "h2", "h2", "h2"]
    page = card.to_html(altered)
    assert "<img" not in page and "<b" not in page and html.escape(HOSTILE) in page


@pytest.mark.parametrize("field", ["metrics", "details", "config", "command", "examples"])
@pytest.mark.parametrize("value", [3, "x", [3], {"a": 3}, {"a": {"b": [3]}}, [{"a": []}]])
def test_a_damaged_record_is_a_card_or_one_line(spec, field, value):
    damaged = dataclasses.replace(spec, record=record() | {field: value})
    for make in (card.markdown, card.to_html):
        try:
            assert make(damaged)
        except ge.InputError as error:
            assert "the checkpoint's record is damaged" in str(error)
