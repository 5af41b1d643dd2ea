"""Damaged files are read as if whole, or refused in one line; and the fuzzer notices the rest."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from gemma_encoder.inputs.errors import InputError
from tests.fuzz import __main__ as program
from tests.fuzz import cases, damages
from tests.fuzz.cases import Fuzzer, Target

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*arguments, **environment):
    """Runs `python -m tests.fuzz` and returns its exit code and what it prints."""
    command = [sys.executable, "-m", "tests.fuzz", "--workers=1", *map(str, arguments)]
    process = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process.returncode, process.stdout


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder in which the first run makes the whole files."""
    return tmp_path_factory.mktemp("fuzz") / "originals"


def test_five_hundred_damages_are_noticed(originals):
    code, output = run("--count=500", f"--originals={originals}")
    print(output)  # the table, and how to repeat a fault
    assert code == 0, output


def test_without_digests_damages_are_silent(originals):
    arguments = ("--count=40", "--targets=export", f"--originals={originals}")
    code, output = run(*arguments, GEMMA_ENCODER_CHECK_DIGESTS="0")
    assert code == 1 and "-> silent" in output


@pytest.fixture
def files(tmp_path):
    """Some whole files in TMP/originals/files."""
    folder = tmp_path / "originals" / "files"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text("1 one\n2 two\n3 three\n")
    (folder / "inner" / "b.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "inner" / "a.txt").write_text("4 four\n")
    return folder


def read_nothing(copy):
    return "the same"


def read_everything(copy):
    return [np.frombuffer(path.read_bytes(), np.uint8) for path in damages.files(copy)]


def refuse(copy):
    raise InputError(f"{copy / 'a.txt'} is damaged")


def fail(copy):
    raise KeyError("from the depth of a library")


def refuse_in_two_lines(copy):
    raise InputError(f"{copy / 'a.txt'} is damaged:\nthere is more to say")


def refuse_without_a_name(copy):
    raise InputError("something is damaged")


def wait(copy):
    time.sleep(3)


def allocate(copy):
    return len(np.ones(80 << 20, np.uint8))  # more than an allocator keeps


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (read_nothing, "right"),
        (refuse, "one line"),
        (read_everything, "silent"),
        (fail, "traceback"),
        (refuse_in_two_lines, "message"),
        (refuse_without_a_name, "message"),
        (wait, "hang"),
        (allocate, "memory"),
    ],
)
def test_each_outcome_is_told_apart(files, read, outcome, monkeypatch):
    monkeypatch.setattr(cases, "LIMIT", 0.1 if outcome == "hang" else 60)
    monkeypatch.setattr(cases, "MEMORY", 40 << 20 if outcome == "memory" else 1 << 30)

    calls = []

    def read_damaged(copy):
        """Reads damaged files as the test says; whole ones, which come first, are no problem."""
        calls.append(copy)
        return read(copy) if len(calls) > 2 or outcome in ("right", "silent") else "whole"

    fuzzer = Fuzzer([Target("t", "files", read_damaged)], files.parent, files.parent.parent)
    case = fuzzer.run(3)
    assert case.outcome == outcome, case
    assert case.is_fault == (outcome not in ("right", "one line"))
    text = cases.table([case])
    assert f"{'t':3}       1" in text
    assert bool(cases.kinds_of_faults([case])) == case.is_fault


def test_a_seed_repeats_its_damage(files):
    made = []
    for _ in range(2):
        fuzzer = Fuzzer([Target("t", "files", read_nothing)], files.parent, files.parent.parent)
        made.append([vars(fuzzer.run(seed)) | {"seconds": 0} for seed in range(60)])
    assert made[0] == made[1]
    assert len({case["damage"].split()[-1] for case in made[0]}) > 8


def test_every_damage_is_drawn_and_changes_something(files, tmp_path):
    drawn = set()
    for seed in range(400):
        copy = tmp_path / f"copy{seed}"
        shutil.copytree(files, copy)
        _, text = damages.damage(copy, random.Random(seed))
        assert content(copy) != content(files), text
        drawn.add(" ".join(word for word in text.split() if word.isalpha()))
    assert len(drawn) >= 15


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("announced", [True, False])
def test_a_worker_that_dies_is_a_crash(announced):
    begun = cases.Case(7, "t", "a.txt", "deleted", "crash")
    answer = f"print({json.dumps(vars(begun))!r}, flush=True);" if announced else ""
    dying = subprocess.Popen(
        [sys.executable, "-c", f"import os; input(); {answer} os.abort()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    case = program._run(dying, 7)
    dying.wait()
    assert (case.seed, case.outcome) == (7, "crash")
    assert case.target == ("t" if announced else program.NO_TARGET)
