"""Structure of the library: short functions and files, and downward imports."""

import ast
import pathlib

import pytest

import gemma_encoder

ROOT = pathlib.Path(gemma_encoder.__file__).parent
PROGRAMS = ("experiments", "launch")  # import the library
MODULES = sorted(
    path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in PROGRAMS
)
FLOORS = (
    (
        *("stopping", "terminal", "runtime", "activity", "distributed", "inputs"),
        *("whole_files", "continued_files", "digests"),
    ),
    ("model", "data"),
    ("weights", "evaluation"),
    (
        *("inference", "embedding", "text_encoder", "explain", "predict_file", "partial_output"),
        *("identity", "progress", "retrieval"),
    ),
    ("training", "report"),
    ("configs", "row_files", "fine_tuning", "prepare"),
    ("cli", "main", "__main__"),
    PROGRAMS,
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# The registration in seqio needs metrics with the tasks, and no other module imports it.
EXCEPTIONS = {"data/seqio_tasks.py": "evaluation"}
APART = {"model", "data"}  # on one floor, but without imports of each other


def imported(tree):
    """Yields the packages and top-level modules of the library that a module imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT.name:
            packages = node.module.split(".")[1:2] or [name.name for name in node.names]
            yield from (package for package in packages if package in FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_files_are_short_and_imports_run_downward(path):
    text = path.read_text()
    relative = path.relative_to(ROOT)
    package = EXCEPTIONS.get(relative.as_posix(), relative.parts[0].removesuffix(".py"))
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert not [
        function.name for function in functions if function.end_lineno - function.lineno >= 60
    ]
    if package in ("__init__", "cli"):
        return  # public names are loaded lazily; programs start other programs
    assert package in FLOOR, "a new package: add it to FLOORS"
    for dependency in imported(tree):
        assert FLOOR[dependency] <= FLOOR[package], (
            f"{package} imports {dependency}, which is above it"
        )
        assert {package, dependency} != APART
