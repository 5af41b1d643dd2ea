"""The notebooks run from top to bottom, and their committed outputs are complete."""

import os
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "experiments" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Workdir as `make quickstart` leaves it, with fewer training steps and one evaluation."""
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    command = [
        sys.executable,
        "-m",
        "gemma_encoder.main",
        "--config=experiments/quickstart.py:smoke",
        f"--workdir={workdir}",
        "--config.max_eval_examples=0",
        "--config.evaluate_every=100 percent",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize(
    "name",
    [
        name if name == "quickstart" else pytest.param(name, marks=pytest.mark.slow)
        for name in NOTEBOOKS
    ],
)
def test_notebooks_run(name, quickstart, monkeypatch):
    settings = {
        "JAX_PLATFORMS": "cpu",
        "QUICKSTART": str(quickstart),
        "RUNS": str(quickstart.parent),
        "STEPS": "2",
        "ROWS": "64",
    }
    monkeypatch.delenv("MPLBACKEND", raising=False)  # plots must be inline
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no plot was drawn"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_of_a_single_run(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    notebook = nbformat.reads(text, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [
        output
        for cell in code
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert str(pathlib.Path.home()) not in text and "/tmp/" not in text, "a local path"


def test_there_are_notebooks():
    assert NOTEBOOKS == ["finetune_your_own", "inside_the_switch", "quickstart"]
