"""Files are written by `whole_files`, and texts are read and written as UTF-8, in all of the code.

Exceptions are listed with their reasons.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("gemma_encoder", "launch", "experiments")
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
    and "benchmarks" not in path.parts  # they measure, in scratch folders
)

WRITERS = {  # methods and functions that write, rename or replace files
    *("write_text", "write_bytes", "tofile", "save", "savez", "savez_compressed", "savefig"),
    *("NamedTemporaryFile", "ZipFile", "OSFile", "ParquetWriter", "rename", "renames"),
}
# Functions that write: the reason why they do not use `whole_files`.
ALLOWED = {
    "gemma_encoder/whole_files.py": "is the mechanism",
    "gemma_encoder/continued_files.py:begin": "bytes that are committed by a digest",
    "gemma_encoder/digests.py:update": "a temporary file of whole_file",
    "gemma_encoder/evaluation/tables.py:write_csv": "a temporary file of whole_file",
    "gemma_encoder/evaluation/tables.py:write_parquet": "a temporary file of whole_file",
    "gemma_encoder/evaluation/tables.py:check": "in memory",
    "gemma_encoder/evaluation/submission.py": "in memory",
    "gemma_encoder/training/failure.py:report_failure": "in memory",
    "gemma_encoder/stopping.py:_open_streams": "standard streams",
    "experiments/studies/plots.py:_save": "a temporary file of whole_file",
    "gemma_encoder/retrieval/blocks.py:write_block": "in memory",
    "gemma_encoder/retrieval/bm25.py:write_bm25": "in a folder that appears as a whole",
    "gemma_encoder/retrieval/mining.py:mine": "a temporary file of whole_file",
    "gemma_encoder/retrieval/search_file.py:search_file": "a temporary file of whole_file",
    "gemma_encoder/training/metrics_log.py:write": "an appended log",
    "gemma_encoder/training/event_file.py": "an appended log",
    "launch/command.py:stream": "an appended log",
    "launch/worker.py:_start": "an appended log",
    "launch/worker.py": "runs without the package, which is not installed yet",
    "gemma_encoder/training/run.py": "Checkpoints.save",
    "gemma_encoder/training/standard_hooks.py": "Run.save",
    "gemma_encoder/training/checkpoint.py": "in a folder that appears as a whole",
    "gemma_encoder/weights/array_store.py": "in a folder that appears as a whole",
    "gemma_encoder/weights/ocdbt.py": "in a folder that appears as a whole",
    "gemma_encoder/weights/direct_file.py": "in a folder that appears as a whole",
    "gemma_encoder/weights/new_folders.py": "in a folder that appears as a whole",
    "gemma_encoder/weights/backbone.py": "gemma.save",
    "gemma_encoder/weights/export.py": "in a folder that appears as a whole",
    "gemma_encoder/weights/exported_modules.py": "in a folder that appears as a whole",
    "gemma_encoder/data/cache.py": "in a folder that is renamed: concurrent builders do not wait",
    "gemma_encoder/data/table.py": "in a folder of the cache, or a temporary file of whole_file",
    "gemma_encoder/data/files/corpus.py": "in a folder of the cache",
    "gemma_encoder/data/files/runs.py": "in a folder of the cache",
    "launch/table.py:_run_planner": "a temporary file",
}


def name_of(call):
    """Returns the last name of a call: `open` of `path.open(…)`."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def mode_of(call):
    """Returns the mode of a call of `open`: of the function its second argument, else its first."""
    position = 1 if isinstance(call.func, ast.Name) or is_os(call, "gzip", "io") else 0
    mode = next((word.value for word in call.keywords if word.arg == "mode"), None)
    if mode is None and len(call.args) > position:
        mode = call.args[position]
    return getattr(mode, "value", "?") if mode is not None else "r"


def is_os(call, *modules):
    """Returns True for calls of functions of a module, such as `os.open`."""
    return isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in modules


def calls(text):
    """Yields (name of the innermost function, call)."""

    def walk(node, function):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            yield function, node
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(ast.parse(text), "")


def writes(call):
    name = name_of(call)
    if name == "open" and not is_os(call, "os", "tarfile", "ipc", "tensorstore"):
        return set(str(mode_of(call))) & set("wax+")
    if name == "replace":  # os.replace, or that of a path; text.replace has two arguments
        return is_os(call, "os") or (len(call.args) == 1 and not call.keywords)
    if name == "fdopen":
        return True
    return name in WRITERS and not (name == "save" and is_os(call, "safetensors", "numpy"))


def lacks_encoding(call):
    if any(word.arg == "encoding" for word in call.keywords):
        return False
    name = name_of(call)
    if name == "open" and not is_os(call, "os", "tarfile", "ipc", "gzip", "archive", "tensorstore"):
        return "b" not in str(mode_of(call)) and "x" not in str(mode_of(call))
    if any(word.arg in ("text", "universal_newlines") for word in call.keywords):
        return name in ("run", "Popen", "check_output")
    is_path = isinstance(call.func, ast.Attribute) and len(call.args) <= (name == "write_text")
    return name in ("read_text", "write_text") and is_path


def faults_in(text, path="gemma_encoder/x.py"):
    """Yields the faults of a file, each as "PATH:LINE: what"."""
    for function, call in calls(text):
        where = f"{path}:{call.lineno}: {function}() calls {name_of(call)}"
        if writes(call) and not {path, f"{path}:{function}"} & ALLOWED.keys():
            yield f"{where}: write with gemma_encoder.whole_files, or add the reason to ALLOWED"
        if lacks_encoding(call):
            yield f"{where} without encoding='utf-8'"


@pytest.mark.parametrize("folder", FOLDERS)
def test_writers_use_whole_files_and_texts_are_utf8(folder):
    faults = [
        fault
        for path in FILES
        if path.startswith(f"{folder}/")
        for fault in faults_in((ROOT / path).read_text(encoding="utf-8"), path)
    ]
    assert not faults, "\n".join(faults)


def test_every_exception_is_used():
    used = set()
    for path in FILES:
        for function, call in calls((ROOT / path).read_text(encoding="utf-8")):
            if writes(call):
                used |= {path, f"{path}:{function}"}
    assert ALLOWED.keys() <= used


@pytest.mark.parametrize(
    "code",
    [
        "path.write_text('x', encoding='utf-8')",
        "path.write_bytes(b'x')",
        "path.open('w', encoding='utf-8')",
        "open(path, 'ab')",
        "open(path, mode='r+b')",
        "os.replace(a, b)",
        "temporary.replace(path)",
        "np.savez(path, a=1)",
        "path.read_text()",
        "epath.Path(path).read_text()",
        "path.open()",
        "open(path)",
        "subprocess.run(x, text=True)",
    ],
)
def test_a_plain_call_is_noticed(code):
    assert len(list(faults_in(f"def f():\n    {code}"))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "write_whole(path, 'x')",
        "path.open('rb')",
        "path.read_text(encoding='utf-8')",
        "text.replace('a', 'b')",
        "dataclasses.replace(x, a=1)",
        "cells.read_text(values, name, where)",
    ],
)
def test_others_are_not(code):
    assert not list(faults_in(f"def f():\n    {code}"))
