"""`fine_tune`: kinds, tasks and configs on data in memory or in files, and errors."""

import dataclasses
import json
import shlex

import numpy as np
import pandas as pd
import pytest

import gemma_encoder as ge
from gemma_encoder import fine_tuning
from gemma_encoder.inputs.uncertainty import Calibration
from gemma_encoder.row_files import to_jsonl
from gemma_encoder.training import loop

SMALL = {
    "model.size": "gemma2_tiny",
    "model.transformer": {
        "num_layers": 2,
        "embed_dim": 32,
        "hidden_dim": 64,
        "head_dim": 8,
        "query_scale": 8**-0.5,
    },
    "max_length": 64,
    "batch": {"row_length": 64, "rows": 8, "segments": 4},
    "train_for": "4 steps",
}
ROWS = [
    {"text": f"it was {word}, number {i}", "label": word}
    for i in range(20)
    for word in ("good", "bad")
]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


class Dataset:
    """Iterable of rows, like those of the `datasets` library."""

    def __iter__(self):
        return iter(ROWS)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["split"] == "train"]


def test_all_forms_of_data_train_as_the_command_line_does(tmp_path, capfd, caplog):
    import gemma_encoder.main

    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parts = [tmp_path / f"part-{i}.jsonl" for i in range(2)]
    for part, rows in zip(parts, (ROWS[:15], ROWS[15:]), strict=True):
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "path": file,
        "parts": parts,
        "frame": pd.DataFrame(ROWS),
        "columns": COLUMNS | {"label": np.array(COLUMNS["label"])},
        "records": (row for row in ROWS),
        "dataset": Dataset(),
    }
    for name, data in given.items():
        predictor = ge.fine_tune(
            "classification",
            train=data,
            workdir=tmp_path / name,
            overrides=SMALL | {"log_every": "1 step"},
        )
        assert predictor.classes == ("bad", "good")
        assert predictor.predict(["it was good"]).shape == (1, 2)
        if name not in ("path", "parts"):
            stored = tmp_path / name / "data" / "train.jsonl"
            assert [json.loads(line) for line in stored.read_text().splitlines()] == ROWS
    assert not [record for record in caplog.records if "seqio" in record.pathname]
    # The checkpoint stores the equivalent command.
    command = shlex.split(predictor.spec.record["command"])
    assert command[:3] == ["gemma-encoder", "train", "--config=own:classification"]
    assert command[-1] == f"--workdir={tmp_path / name}"
    again = [*command[2:-1], f"--workdir={tmp_path / 'command'}"]
    assert gemma_encoder.main.main(["--mode=train", *again]) == 0
    runs = [losses(tmp_path / name) for name in (*given, "command")]
    assert all(run == runs[0] for run in runs) and runs[0]
    assert "own" in capfd.readouterr().out  # the command's summary


def test_a_task_declared_in_python(tmp_path):
    task = ge.Task(
        "tone",
        "ordinal",
        ge.Template("Stars of: {text}"),
        metrics=("quadratic_weighted_kappa",),
        classes=("bad", "good"),
    )
    frame = pd.DataFrame(ROWS)
    predictor = ge.fine_tune(
        task,
        train=frame,
        validation=frame[:6],
        workdir=tmp_path,
        overrides=SMALL | {"task_weights": {"tone": 2.0}},
    )
    assert predictor.task() == task
    (line,) = predictor.spec.record["metrics"]
    assert line["task"] == "tone" and "quadratic_weighted_kappa" in line
    assert predictor.predict(["it was good"]).shape == (1, 2)


def test_ranking_from_memory(tmp_path):
    records = [
        {"query": f"find {wish}", "document": f"a {color} thing", "label": int(wish == color)}
        for wish in ("red", "green", "blue", "grey", "pink")
        for color in ("red", "green", "blue", "grey", "pink")
    ]
    predictor = ge.fine_tune(
        "ranking",
        train=records,
        validation=records[:10],
        workdir=tmp_path,
        overrides=SMALL | {"batch.rows": 16},
    )
    best = predictor.rank("find red", ["a red thing", "a blue thing", "a grey thing"], top_k=2)
    assert len(best) == 2 and best[0][1] >= best[1][1]


def test_a_config_by_name_and_as_an_object(micro, tmp_path):
    predictor = ge.fine_tune("quickstart:smoke", workdir=tmp_path / "name", overrides=SMALL)
    again = ge.fine_tune(micro(), workdir=tmp_path / "config")
    assert losses(tmp_path / "name") == losses(tmp_path / "config")
    assert list(predictor.tasks) == list(again.tasks)
    assert "quickstart" in predictor.spec.record["command"]


def test_an_interrupted_run_resumes(tmp_path):
    class Interrupt(ge.Hook):
        def is_due(self, run, step):
            return step == 3

        def on_due(self, run, step):
            raise KeyboardInterrupt

    data = pd.DataFrame(ROWS)
    overrides = SMALL | {"checkpoint_every": "1 step", "log_every": 1}
    straight = tmp_path / "straight"
    resumed = tmp_path / "resumed"

    def train(workdir, data=data, hooks=()):
        return ge.fine_tune(
            "classification", data, workdir=workdir, overrides=overrides, hooks=hooks
        )

    first = train(straight)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, hooks=[Interrupt()])
    second = train(resumed)
    assert second.spec.step == first.spec.step == 4
    text = ["it was good"]
    np.testing.assert_array_equal(second.predict(text), first.predict(text))
    with pytest.raises(ge.InputError, match="holds a run on other train data"):
        train(resumed, data[:-1])
    assert len((resumed / "data" / "train.jsonl").read_text().splitlines()) == len(ROWS)


def test_preemption_exits_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(
        loop,
        "train",
        lambda *arguments: loop.TrainingResult(1, {}, {}, tmp_path, 0.0, preempted=True),
    )
    with pytest.raises(SystemExit) as stopped:
        ge.fine_tune("classification", COLUMNS, workdir=tmp_path)
    assert stopped.value.code == 75


PLAIN = ge.Template("{text}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("clasification", COLUMNS),
            "unknown kind or config 'clasification'; did you mean 'classification'",
        ),
        ((3, COLUMNS), "expected a kind, a Task or a config, got int"),
        (("classification", 3), "train is int; expected a path, a list of paths"),
        (("classification", ["it was good"]), "own.train: it was good is not a file"),
        (("classification", []), "train has no records"),
        (("classification", {}), "train has no records"),
        (("classification", {"text": "a b", "label": "c"}), "column 'text' is str, not a list"),
        (("classification", {"text": ["a", "b"], "label": ["c"]}), "the columns differ in length"),
        (
            ("classification", [{"text": object(), "label": 1}]),
            "record 0: column .text. has type object",
        ),
        (
            ("classification", [{"text": "a", "label": None}] * 3),
            "train.jsonl:1: column 'label' is null",
        ),
        (
            ("regression", {"text": ["a"] * 3, "label": [1.0, 2.0, float("nan")]}),
            "train.jsonl:3: column 'label' is null",
        ),
        (("classification", {"text": ["a", "\udc80"], "label": [0, 1]}), "not valid Unicode"),
        (("classification",), "own.train is not set"),
        (("quickstart", COLUMNS), "the task 'own'; leave out train"),
        (
            (ge.Task("a", "classification", PLAIN, classes=("x", "y"), head="b"), COLUMNS),
            "leave out head, chance and role_templates",
        ),
        ((ge.Task("a", "language_model", PLAIN), COLUMNS), "do not fit in a table"),
        (
            (ge.Task("a b", "classification", PLAIN, classes=("bad", "good")), COLUMNS),
            "own.name must consist of letters",
        ),
        (
            (ge.Task("glue_sst2", "classification", PLAIN, classes=("bad", "good")), COLUMNS),
            "'glue_sst2' is the name of another task",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    with pytest.raises(ge.InputError, match=message) as error:
        ge.fine_tune(*arguments, workdir=tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train_fro": "4 steps"}, "train_fro.*did you mean 'train_for'"),
        ({"batch": {"row": 8}}, "batch.row.*did you mean 'batch.rows'"),
        ({"seed.first": 1}, "seed must be a whole number"),
        ({"seed": "one"}, "seed must be a whole number"),
        ({"own.train": "a.csv"}, "own.train is given as an argument, too"),
        ({"own.name": "tone"}, "not on the given data|unknown task"),
    ],
)
def test_bad_overrides_are_one_line(overrides, message, tmp_path):
    with pytest.raises(ge.InputError, match=message):
        ge.fine_tune("classification", COLUMNS, workdir=tmp_path, overrides=overrides)
    assert not (tmp_path / "config.json").exists()


def test_rows_in_memory_need_a_local_workdir():
    with pytest.raises(ge.InputError, match="not a local folder"):
        ge.fine_tune("classification", COLUMNS, workdir="gs://bucket/run")


def test_columns_are_distinguished_from_paths(tmp_path):
    with pytest.raises(ge.InputError, match="missing.csv is not a file"):
        fine_tuning.fine_tune("classification", "missing.csv", workdir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": ["seed"]}, "overrides must be a dictionary"),
        ({"overrides": {1: 2}}, "overrides must be a dictionary"),
        ({"overrides": {"batch.": 2}}, "overrides must be a dictionary"),
        ({"workdir": ""}, "workdir must be the path of a folder, got ''"),
        ({"workdir": 5}, "workdir must be the path of a folder, got 5"),
        ({"workdir": "a\0b"}, "cannot be written: embedded null byte"),
        ({"overrides": {"seed": -1}}, r"seed must be at least 0 and below 2\^31, got -1"),
        ({"overrides": {"losses.nope": "x"}}, "unknown kind in losses: 'nope'"),
        (
            {"overrides": {"optimizer.learning_rate": float("nan")}},
            "learning_rate must be at least",
        ),
        ({"overrides": {"task_weights": {"own": -1.0}}}, "task_weights.own must be at least 0"),
        ({"overrides": {"train_for": "1e14 steps"}}, r"it must be below 2\^31"),
        ({"overrides": {"modules": ("no_such_module",)}}, "'no_such_module' cannot be imported"),
        ({"hooks": ge.Hook()}, "hooks must be a list of hooks, got Hook"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path):
    with pytest.raises(ge.InputError, match=message):
        ge.fine_tune("classification", COLUMNS, **{"workdir": tmp_path / "run", **arguments})


def test_rows_are_written_as_json_or_refused():
    assert to_jsonl([{"a": {"y", "x"}, "b": np.float32(1.5), "c": (1, None)}], "train") == (
        '{"a": ["x", "y"], "b": 1.5, "c": [1, null]}\n'
    )
    for record, message in (
        ({1: "x", "1": "y"}, "record 0 has two columns named '1'"),
        ({"a": float("inf")}, "column 'a' has type float"),
        ({"a": 10**5000}, "column 'a' has type int"),
        ({"a": pd.Timestamp("2020-01-01")}, "column 'a' has type Timestamp"),
    ):
        with pytest.raises(ge.InputError, match=message):
            to_jsonl([record], "train")
    with pytest.raises(ge.InputError, match="train is ndarray"):
        to_jsonl(np.array(5), "train")
    with pytest.raises(ge.InputError, match="duplicate column names: text, 1, 1"):
        to_jsonl(pd.DataFrame([["x", "y", "z"]], columns=["text", 1, 1]), "train")


def test_a_damaged_config_in_a_workdir_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "1" / "file").touch()
    with pytest.raises(ge.InputError, match="config.json cannot be read .*; restore it"):
        ge.fine_tune("quickstart:smoke", workdir=tmp_path, overrides=SMALL)


def test_a_task_may_come_from_a_calibrated_checkpoint():
    task = ge.Task("tone", "classification", PLAIN, classes=("bad", "good"))
    calibrated = dataclasses.replace(task, calibration=Calibration(2.0, (), "validation", 9, 1))
    assert fine_tuning._task_fields(calibrated) == fine_tuning._task_fields(task)
