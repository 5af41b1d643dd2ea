"""The program as a user starts it: exit codes, one-line errors, and resuming after SIGKILL."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from gemma_encoder import main
from tests.micro import SMALL

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUICK = "--config=experiments/quickstart.py:smoke"


def command(*arguments):
    return [sys.executable, "-m", "gemma_encoder.main", *map(str, arguments)]


def environment(**changes):
    """Returns this process's environment with changes; None removes a variable."""
    defaults = {"JAX_PLATFORMS": "cpu", "TFDS_DATA_DIR": None, "MSMARCO_DIR": None}
    changed = os.environ | defaults | changes
    return {name: value for name, value in changed.items() if value is not None}


def program(*arguments, **changes):
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**changes),
        check=False,
    )


ERRORS = [
    ((), "--workdir is missing"),
    (("--workdir=W", "stray"), "unexpected argument 'stray'"),
    (("--workdir=W", "--mode=trian"), "train"),
    (("--workdir=W",), "--config is missing"),
    (("--workdir=W", QUICK, "--config.optimizer.learning_rat=1"), "learning_rate"),
    (("--workdir=W", QUICK, "--config.seed=many"), "seed"),
    (
        ("--workdir=W", "--config=experiments/glue.py:sst2,size=gemma2_2bb"),
        "unknown size 'gemma2_2bb'; did you mean 'gemma2_2b'?",
    ),
    (("--workdir=W", "--config=experiments/nothing.py"), "experiments/nothing.py"),
    (("--workdir=W", QUICK, "--config.model.compute_dtype=float16"), "float16 is refused"),
    (
        ("--workdir=W", "--config=experiments/glue.py:sst2", "--config.max_train_examples=1"),
        "TFDS_DATA_DIR",
    ),
    (("--workdir=W", "--config=experiments/msmarco.py"), "MSMARCO_DIR"),
    (("--workdir=W", "--config=experiments/own.py"), "own.train is not set"),
    (
        ("--workdir=W", "--config=experiments/own.py", "--config.own.train=nowhere.csv"),
        "nowhere.csv is not a file",
    ),
    (("--workdir=W", "--mode=predict"), "--input is missing"),
    (("--workdir=W", "--mode=predict", "--input=x.txt"), "W does not exist"),
]


def check_error(code, stderr, message, workdir):
    assert code == 2
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], stderr
    assert not workdir.exists()


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_errors_are_one_line_and_exit_2(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("MSMARCO_DIR", raising=False)
    code = main.main([argument.replace("=W", f"={tmp_path}/W") for argument in arguments])
    check_error(code, capfd.readouterr().err, message, tmp_path / "W")


@pytest.mark.parametrize(("arguments", "message"), [ERRORS[0], ERRORS[6], ERRORS[12]])
def test_libraries_add_no_line_to_an_error(arguments, message, tmp_path):
    arguments = (argument.replace("=W", f"={tmp_path}/W") for argument in arguments)
    result = program(*arguments, TFDS_DATA_DIR=str(tmp_path))
    check_error(result.returncode, result.stderr, message, tmp_path / "W")


def test_help_lists_the_flags():
    result = program("--help")
    assert result.returncode == 0 and not result.stderr
    assert "python -m gemma_encoder.main" in result.stdout
    for flag in ("config", "workdir", "mode=train|eval|predict", "task", "input", "output", "keep"):
        assert f"  --{flag}" in result.stdout
    assert "absl" not in result.stdout and len(result.stdout.splitlines()) < 90


RUN = [
    QUICK,
    "--config.model.size=gemma2_tiny",
    f"--config.model.transformer={SMALL}",
    "--config.tasks=('toy_sentiment','toy_similarity')",
    "--config.model.attention_dropout=0.1",
    "--config.train_for=24 steps",
    "--config.log_every=1",
    "--config.batch.rows=2",
    "--config.checkpoint_every=2",
    "--config.evaluate_every=0",
]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["split"] == "train"]


def kill_after_lines(workdir, count, delay, **changes):
    """Starts the run, and kills it `delay` seconds after its log has `count` lines."""
    metrics = workdir / "metrics.jsonl"
    process = subprocess.Popen(
        command(*RUN, f"--workdir={workdir}"),
        cwd=ROOT,
        env=environment(**changes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count('"step": ') >= count:
            break
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def check_predictions(arguments, folder, capfd):
    """Predicts to stdout and to a file, and refuses a malformed line."""
    predicted = program(*arguments)
    assert predicted.returncode == 0, predicted.stderr
    rows = [json.loads(line) for line in predicted.stdout.splitlines()]
    assert len(rows) == 10 and rows[0].keys() == {"prediction", "probabilities"}
    (folder / "texts.csv").write_text("id,text\n7,a fine film .\n8,a dull one .\n")
    to_file = main.main(
        [
            *arguments[:3],
            f"--input={folder}/texts.csv",
            "--columns=text",
            "--keep=id",
            f"--output={folder}/out.csv",
        ]
    )
    assert to_file == 0, capfd.readouterr().err
    lines = (folder / "out.csv").read_text().splitlines()
    assert lines[0] == "id,prediction,probability_negative,probability_positive"
    assert [line.split(",")[0] for line in lines[1:]] == ["7", "8"]
    (folder / "bad.jsonl").write_text('{"sentence": "fine"}\nnot json\n')
    assert main.main([*arguments, f"--input={folder}/bad.jsonl"]) == 2
    assert "bad.jsonl:2: not a JSON object" in capfd.readouterr().err


def test_a_killed_run_resumes_bit_exactly(tmp_path, monkeypatch, capfd):
    """SIGKILL at three moments, also during saves, with packing, dropout and a mixture."""
    straight = program(*RUN, f"--workdir={tmp_path}/straight")
    assert straight.returncode == 0, straight.stderr
    rng = random.Random(0)
    killed = tmp_path / "killed"
    # Compiled programs go to the user's cache folder, as by default.
    own = {"JAX_COMPILATION_CACHE_DIR": None, "GEMMA_ENCODER_CACHE": str(tmp_path / "cache")}
    for count in (2, 8, 15):
        kill_after_lines(killed, count, rng.uniform(0, 0.2), **own)
        assert count <= len(losses(killed)) < 24
    resumed = program(*RUN, f"--workdir={killed}", **own)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "straight") == losses(killed)
    programs = list((tmp_path / "cache" / "compiled").glob("*-cache"))
    assert programs, "compiled programs are cached"
    assert not (killed / "compilation_cache").exists()
    assert [step for step, _ in losses(killed)] == list(range(1, 25))

    # The output ends with a command that predicts.
    assert "baseline" in resumed.stdout and "checkpoint: " in resumed.stdout
    next_command = resumed.stdout.strip().splitlines()[-1].split()
    at = next_command.index("predict")
    assert next_command[at - 1].endswith(("gemma_encoder", "/gemma-encoder"))
    monkeypatch.chdir(ROOT)
    check_predictions(["--mode=predict", *next_command[at + 1 :]], tmp_path, capfd)

    default_logs = {"TF_CPP_MIN_LOG_LEVEL": None}
    evaluated = program(*RUN, f"--workdir={killed}", "--mode=eval", **default_logs)
    assert evaluated.returncode == 0 and "toy_sentiment" in evaluated.stdout
    lines = [line for line in evaluated.stderr.splitlines() if not re.search(r" …( \d+ s)?$", line)]
    assert not lines, "libraries log nothing on start"
    assert main.main([*RUN, f"--workdir={killed}", "--config.seed=1"]) == 2
    refused = capfd.readouterr().err
    assert "holds a run of another config" in refused
    assert "seed: 0 -> 1" in refused


@pytest.mark.parametrize(
    "recipe",
    [
        "glue.py:stsb",
        "msmarco.py:",
        *(
            pytest.param(f"glue.py:{name}", marks=pytest.mark.slow)
            for name in ("cola", "sst2", "mrpc")
        ),
    ],
)
def test_recipes_have_smoke_runs_on_real_data(recipe, shared_data, tmp_path):
    separator = "" if recipe.endswith(":") else ","
    result = program(
        f"--config=experiments/{recipe}{separator}smoke",
        f"--workdir={tmp_path}",
        "--config.train_for=2 steps",
        "--config.max_eval_examples=8",
        TFDS_DATA_DIR=str(shared_data / "tfds"),
        MSMARCO_DIR=str(shared_data / "cranfield_msmarco"),
    )
    assert result.returncode == 0, result.stderr
    validation = [
        line
        for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        if line["split"] == "validation"
    ]
    assert validation[-1]["step"] == 2
    if recipe == "msmarco.py:":
        check_run(
            tmp_path / "predictions" / "msmarco.validation.trec",
            shared_data / "cranfield_msmarco" / "qrels.dev.tsv",
            validation[-1],
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["superglue.py:copa", "superglue.py:record", "glue.py:mnli", "multitask.py:superglue"]
)
def test_smoke_runs_predict_the_test_splits_of_benchmarks(recipe, prepared, tmp_path):
    for mode in ((), ("--mode=eval", "--config.evaluate_split=test")):
        result = program(
            f"--config=experiments/{recipe},smoke",
            f"--workdir={tmp_path}",
            *mode,
            TFDS_DATA_DIR=str(prepared),
        )
        assert result.returncode == 0, result.stderr
    assert "predictions only: the test split has no labels" in result.stdout
    assert list((tmp_path / "predictions").glob("*.test*.jsonl"))


def check_run(run, qrels, line):
    """Metrics in the log equal those of ir-measures on the run file, over the scored queries."""
    import ir_measures

    scored = list(ir_measures.read_trec_run(str(run)))
    queries = {document.query_id for document in scored}
    judged = [qrel for qrel in ir_measures.read_trec_qrels(str(qrels)) if qrel.query_id in queries]
    values = ir_measures.calc_aggregate(
        [ir_measures.RR @ 10, ir_measures.nDCG @ 10], judged, scored
    )
    assert line["mrr@10"] == values[ir_measures.RR @ 10]
    assert line["ndcg@10"] == values[ir_measures.nDCG @ 10]
