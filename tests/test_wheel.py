"""The installed wheel: a single top-level package with its data, and working programs."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ("gemma_encoder", "experiments", "launch")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder into which the wheel is installed, built from a copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    folder = tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "mini_results", "notebooks")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={source}/wheel", "."]
    subprocess.run(build, cwd=source, check=True)
    (wheel,) = (source / "wheel").iterdir()
    install = [*pip, "install", "--no-deps", "--no-index", f"--target={folder}", str(wheel)]
    subprocess.run(install, check=True)
    return folder


@pytest.fixture
def run(installed, tmp_path, monkeypatch):
    """`run(*arguments)` runs the installed `gemma-encoder` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}

    def start(*arguments, program=("-m", "gemma_encoder")):
        command = [sys.executable, *program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return start


def test_the_wheel_holds_one_package_with_its_data(installed):
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names - {"bin", "__pycache__"} == {"gemma_encoder"}
    package = installed / "gemma_encoder"
    assert not [path for path in package.rglob("*") if path.is_symlink()]
    for name in (
        "py.typed",
        "assets/small.model",
        "experiments/own.py",
        "experiments/ablations/attention.py",
        "experiments/decoders/mini/tokenizer.model",
        "launch/plan.py",
    ):
        assert (package / name).is_file(), name
    for name in ("experiments/mini_results", "experiments/RESULTS.md", "experiments/notebooks"):
        assert not (package / name).exists()


def test_the_installed_programs_run(run, installed, tmp_path):
    for program in (("-m", "gemma_encoder"), (str(installed / "bin" / "gemma-encoder"),)):
        listed = run("--help", program=program)
        assert listed.returncode == 0 and "  train " in listed.stdout, listed.stderr
    rows = "".join(f"the film {i} was {('fine', 'dull')[i % 2]},{'ab'[i % 2]}\n" for i in range(40))
    (tmp_path / "train.csv").write_text(f"text,label\n{rows}")
    config = ("--config=own:classification,smoke", "--config.own.train=train.csv")
    trained = run("train", *config, "--config.train_for=2 steps", "--workdir=runs/mine")
    assert trained.returncode == 0, trained.stderr
    assert " predict --workdir=" in trained.stdout
    (tmp_path / "texts.txt").write_text("a fine film\n")
    predicted = run("predict", "--workdir=runs/mine", "--input=texts.txt", "--output=scores.jsonl")
    assert predicted.returncode == 0, predicted.stderr
    assert json.loads((tmp_path / "scores.jsonl").read_text())["prediction"] in ("a", "b")
    report = run("report", "runs/mine", "--output=report.html")
    assert report.returncode == 0 and (tmp_path / "report.html").exists(), report.stderr
    planned = run("sweep", "--study=attention", "--seeds=1", "--dry_run")
    assert "gemma-encoder train --config=ablations/attention:task=sst2" in planned.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--config=owm", "--workdir=W"), "did you mean 'own'?"),
        (("train", "--config=own", "--workdir=W"), "own.train is not set"),
        (("launch", "tpu_vm", "--config=quickstart"), "is not a Git repository"),
    ],
)
def test_errors_are_one_line_and_exit_2(run, arguments, message):
    refused = run(*arguments)
    assert refused.returncode == 2 and not refused.stdout
    assert message in refused.stderr and refused.stderr.count("\n") == 1


def test_the_decoder_of_the_studies_is_in_the_package(run, installed):
    code = "from gemma_encoder.experiments.studies.study import DECODER; print(DECODER)"
    folder = pathlib.Path(run("-c", code, program=()).stdout.strip())
    assert folder.is_relative_to(installed) and (folder / "tokenizer.model").is_file()
