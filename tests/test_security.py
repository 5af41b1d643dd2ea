"""SECURITY.md's promise: no file that is loaded can run code."""

import ast
import pathlib

import pytest

import gemma_encoder

ROOT = pathlib.Path(gemma_encoder.__file__).parent
FOLDERS = {"": "gemma_encoder", "experiments": "experiments", "launch": "launch"}
# Modules and functions by which data becomes code.
MODULES = {
    *("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
    *("runpy", "imp", "code"),
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("torch.load", "pd.read_pickle", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("importlib.import_module", "importlib.machinery.SourceFileLoader"),
}
# Files that run code, and whose it is: of the user's own config or of this project.
ALLOWED = {
    ("gemma_encoder/configs.py", "importlib.machinery.SourceFileLoader"): "--config=FILE.py",
    ("gemma_encoder/training/config.py", "importlib.import_module"): "--modules",
    ("gemma_encoder/__init__.py", "importlib.import_module"): "public names, on first use",
    ("gemma_encoder/runtime.py", "importlib.import_module"): "optional packages, by constant names",
    ("gemma_encoder/cli/__init__.py", "importlib.import_module"): "the program of a command",
    ("gemma_encoder/cli/launch.py", "importlib.import_module"): "the program of a launcher",
    ("gemma_encoder/cli/inspect.py", "importlib.import_module"): "the program of a subject",
    ("experiments/ablations/__init__.py", "importlib.import_module"): "this project's studies",
    ("experiments/benchmarks/fresh.py", "importlib.import_module"): "functions of benchmarks",
    ("experiments/benchmarks/harness.py", "importlib.import_module"): "functions of benchmarks",
    ("experiments/benchmarks/checkpoint.py", "torch.load"): "a file that the benchmark wrote",
}


def uses(tree):
    """Yields the forbidden modules and functions that a module uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name for name in names if name in CALLS or name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in CALLS:
                yield function
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and not is_false:
                    yield keyword.arg


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_that_is_loaded_runs_code(folder):
    actual = {
        (f"{FOLDERS[folder]}/{path.relative_to(ROOT / folder).as_posix()}", use)
        for path in (ROOT / folder).rglob("*.py")
        for use in uses(ast.parse(path.read_text(encoding="utf-8")))
    }
    expected = {key for key in ALLOWED if key[0].startswith(f"{FOLDERS[folder]}/")}
    assert actual == expected


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "eval(x)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)",
        "yaml.load(f)",
        "torch.load(f)",
        "from importlib import import_module",
        "np.load(f, allow_pickle=flag)",
    ],
)
def test_each_way_is_noticed(text):
    assert list(uses(ast.parse(text)))


@pytest.mark.parametrize("text", ["np.load(f)", "np.load(f, allow_pickle=False)", "re.compile(x)"])
def test_safe_calls_are_not(text):
    assert not list(uses(ast.parse(text)))
