"""The shape of the library: short functions and files, imports that run downward."""

import ast
import pathlib

import pytest

import gemma_encoder

ROOT = pathlib.Path(gemma_encoder.__file__).parent
PROGRAMS = ("experiments", "launch")  # stand on the library
MODULES = sorted(
    path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in PROGRAMS
)
FLOORS = (
    ("runtime", "distributed", "inputs"),
    ("model", "data"),
    ("weights", "evaluation"),
    ("inference", "text_encoder", "explain", "predict_file"),
    ("training", "report"),
    ("configs", "row_files", "fine_tuning", "prepare"),
    ("cli", "main", "__main__"),
    PROGRAMS,
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# The registration in seqio hands our metrics over with our tasks, and nothing imports it.
DOORS = {"data/seqio_tasks.py": "evaluation"}
APART = {"model", "data"}  # side by side, and never see each other


def imported(tree):
    """The rooms of the library that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT.name:
            rooms = node.module.split(".")[1:2] or [name.name for name in node.names]
            yield from (room for room in rooms if room in FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_files_are_short_and_imports_run_downward(path):
    text, relative = path.read_text(), path.relative_to(ROOT)
    room = DOORS.get(relative.as_posix(), relative.parts[0].removesuffix(".py"))
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert not [one.name for one in functions if one.end_lineno - one.lineno >= 60]
    if room == "__init__" or room == "cli":
        return  # the public names are loaded when they are used; programs start programs
    assert room in FLOOR, "a new room: give it a floor"
    for other in imported(tree):
        assert FLOOR[other] <= FLOOR[room], f"{room} imports {other}, which stands above it"
        assert {room, other} != APART
