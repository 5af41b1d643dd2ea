"""The code's language: the words of names, first lines of docstrings, one thought a line.

The table of words: field terms instead of house terms, one meaning for one name.
"""

import ast
import collections
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("gemma_encoder", "experiments", "launch", "tests")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)

# Words that meant many things, and house terms for which the field has its own.
FORBIDDEN_WORDS = {
    *("place", "places", "placed", "said", "found", "wanted", "kept", "known", "chosen"),
    *("skeleton", "judgement", "judgements", "obstacle", "visible", "sees", "bundle"),
}
FORBIDDEN_NAMES = {
    *("number", "numbers", "max_train", "max_eval", "head_hidden", "keep_compiled", "is_first"),
    *("to_outputs", "Notice", "Call", "Unit", "Texts", "fold", "adapt"),
}
ALLOWED = {
    ("gemma_encoder/inference.py", "bundle"),  # the former name of `Predictor.spec`
    ("gemma_encoder/training/metrics_log.py", "model_flop_utilisation"),  # in logs on disk
    ("gemma_encoder/inputs/kind.py", "is_unlabelled"),  # refused, with the new name
    ("tests/inputs/test_kinds.py", "is_unlabelled"),
    ("tests/training/test_config.py", "max_train"),  # a former name that is accepted
    ("experiments/studies/reranking.py", "fold"),  # of a cross-validation
}
QUESTION_WORDS = {"What", "Whether", "How", "Why", "Where", "Who", "Which", "From", "When", "That"}
BRITISH = re.compile(
    r"\w*((token|normal|optim|quant|initial|regular|material|serial|recogn|organ|summar|general"
    r"|parallel|penal|maxim|minim|util|standard)is(e|ed|es|er|ing|ation)\b|behaviour|colour"
    r"|\bcentre|neighbour|judgement|labell|favour|artefact|whilst|\blearnt\b|\bspelt\b)\w*",
    re.IGNORECASE,
)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def bound_names(tree):
    """Yields (name, line) of every identifier that a module binds."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, line
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, line
        elif isinstance(node, ast.arg):
            yield node.arg, line
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, line
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, line
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name, line


def words_of(name):
    """The words of snake_case and CamelCase, in lower case."""
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def depth(node, kinds):
    """Returns the largest number of nodes of these kinds that are nested in each other."""
    inner = max((depth(child, kinds) for child in ast.iter_child_nodes(node)), default=0)
    return inner + isinstance(node, kinds)


def findings(text, path="gemma_encoder/x.py"):
    """The faults of a file, each as "LINE: what"."""
    tree = ast.parse(text)
    test = path.startswith("tests/")
    for name, line in bound_names(tree):
        forbidden = words_of(name) & FORBIDDEN_WORDS or name.strip("_") in FORBIDDEN_NAMES
        if forbidden and (path, name) not in ALLOWED:
            yield f"{line}: the name {name}"
        if test and name.startswith("test_") and len(name) >= 60:
            yield f"{line}: the test name {name} has {len(name)} characters"
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            first = (ast.get_docstring(node) or "").split(" ")[0].strip(",:")
            if first in QUESTION_WORDS:
                yield f"{line}: a docstring begins with {first}"
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 60:
            yield f"{line}: {node.name} has more than 60 lines"
        if isinstance(node, ast.Lambda) and (node.args.defaults or any(node.args.kw_defaults)):
            yield f"{line}: a lambda has default arguments"
        if isinstance(node, COMPREHENSIONS) and depth(node, COMPREHENSIONS) > 2:
            yield f"{line}: comprehensions are nested more than two deep"
        if isinstance(node, ast.IfExp) and depth(node, ast.IfExp) > 1:
            yield f"{line}: a conditional lies within a conditional"
    for line, content in enumerate(text.splitlines(), 1):
        match = BRITISH.search(content)
        if match and (path, match[0]) not in ALLOWED:
            yield f"{line}: British spelling {match[0]}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_has_a_forbidden_word_or_form(folder):
    faults = [
        f"{relative}:{fault}"
        for path in FILES
        if (relative := path.relative_to(ROOT).as_posix()).startswith(folder)
        and path != pathlib.Path(__file__)
        for fault in findings(path.read_text(encoding="utf-8"), relative)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("def f(place): pass", "the name place"),
        ("best_known = 1", "the name best_known"),
        ("class FoundRow: pass", "the name FoundRow"),
        ("for number in []: pass", "the name number"),
        ("x.kept = 1", "the name kept"),
        ("def f():\n  'What it is.'", "a docstring begins with What"),
        ("f = lambda x, y=1: x", "a lambda has default arguments"),
        ("[[[x for x in y] for y in z] for z in w]", "comprehensions are nested"),
        ("a if b else c if d else e", "a conditional lies within a conditional"),
        ("x = 1  # normalised", "British spelling"),
        ("def f():\n" + "  x = 1\n" * 61, "f has more than 60 lines"),
    ],
)
def test_each_form_is_noticed(text, fault):
    assert any(fault in finding for finding in findings(text))


def test_a_long_test_name_is_noticed():
    name = "test_" + "x" * 55
    assert list(findings(f"def {name}(): pass", "tests/test_x.py"))
    assert not list(findings(f"def {name[:-1]}(): pass", "tests/test_x.py"))


def test_public_names_of_modules_are_unique():
    """A name stands for one thing; names that every module of a kind has are exempt."""
    shared = {"main", "get_config"}  # programs and recipes
    registries = {"get", "register", "names"}  # used as registry.get, kinds.get
    modules = collections.defaultdict(list)
    for path in FILES:
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith(("tests/", "experiments/benchmarks/")):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                modules[node.name].append(relative)
    repeated = {
        name: files
        for name, files in modules.items()
        if len(files) > 1 and name not in shared | registries
    }
    assert not repeated


def test_the_linter_enforces_100_columns():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "line-length = 100" in settings
    assert "max-line-length" not in settings
    code = "x = '" + "a b " * 30 + "'\n"
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select=E501",
        "--stdin-filename=gemma_encoder/x.py",
        "-",
    ]
    run = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1 and "E501" in run.stdout
