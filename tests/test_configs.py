"""Configs: names and files, fields by path, and errors in config files."""

import pathlib

import pytest
from ml_collections import ConfigDict

from gemma_encoder import cli, configs
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import sizes

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1] / "experiments"


def test_names_of_the_packages_configs():
    names = configs.names()
    assert {"own", "glue", "quickstart", "pretrain_decoder", "ablations/attention"} <= set(names)
    assert not {"studies", "sweep", "ablations/__init__"} & set(names)


@pytest.mark.parametrize(
    ("text", "file", "argument"),
    [
        ("own", "own.py", ""),
        ("glue:sst2,smoke", "glue.py", ":sst2,smoke"),
        (
            "ablations/attention:task=sst2,row=causal",
            "ablations/attention.py",
            ":task=sst2,row=causal",
        ),
        ("experiments/own.py:ranking", "own.py", ":ranking"),
        ("experiments/ablations/pooling.py", "ablations/pooling.py", ""),
    ],
)
def test_a_name_is_a_file_of_the_package_in_any_folder(text, file, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, colon, value = configs.resolve(text).partition(":")
    assert pathlib.Path(path).resolve() == EXPERIMENTS / file
    assert colon + value == argument


@pytest.mark.parametrize(
    "text", ["mine.py:a", "experiments/mine.py", "own.py", "/folder/own", "./own"]
)
def test_other_paths_are_unchanged(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.resolve(text) == text


def test_an_existing_file_comes_before_the_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "own.py").touch()
    assert configs.resolve("experiments/own.py:x") == "experiments/own.py:x"


@pytest.mark.parametrize(
    ("text", "near"), [("glu:sst2", "glue"), ("ablation/poolin", "ablations/pooling")]
)
def test_an_unknown_name_names_the_nearest(text, near):
    with pytest.raises(InputError, match=f"did you mean '{near}'.*path of a .py file"):
        configs.resolve(text)


def test_fields_by_path():
    config = ConfigDict({"seed": 0, "batch": {"rows": 8, "segments": 4}, "own_entries": {}})
    fields = {
        "batch": {"rows": 2},
        "batch.segments": 1,
        "own_entries.a": 1,
        "own_entries": {"b": 2},
    }
    paths = configs.by_path(config, fields)
    assert paths == {"batch.rows": 2, "batch.segments": 1, "own_entries": {"a": 1, "b": 2}}
    configs.override(config, paths)
    assert config.to_dict() == {
        "seed": 0,
        "batch": {"rows": 2, "segments": 1},
        "own_entries": {"a": 1, "b": 2},
    }


def test_a_config_is_loaded_with_its_argument(tmp_path):
    assert configs.load_config("own:ranking").own.kind == "ranking"
    (tmp_path / "bare.py").write_text("FIELDS = 3\n")
    with pytest.raises(InputError, match=r"bare.py has no get_config\(\)"):
        configs.load_config(str(tmp_path / "bare.py"))
    with pytest.raises(InputError, match="missing.py is not a file"):
        configs.load_config(str(tmp_path / "missing.py"))


def test_a_registered_size():
    name = "gemma3_micro"
    sizes.register_size(name, sizes.GEMMA_CONFIGS["gemma3_tiny"], small=True)
    try:
        config = configs.load_config(f"own:classification,size={name}")
        assert config.model.size == name and config.tokenizer == "small"
        with pytest.raises(InputError, match="already registered"):
            sizes.register_size(name, sizes.GEMMA_CONFIGS["gemma3_tiny"])
    finally:
        del sizes.GEMMA_CONFIGS[name]
        sizes.SMALL.discard(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", r"mine.py:1: SyntaxError: "),
        ("import nothing_here\n", r"mine.py:1: ModuleNotFoundError: No module"),
        ("def get_config():\n    return 1 / 0\n", r"mine.py:2: ZeroDivisionError: "),
        ("get_config = 5\n", r"has no get_config\(\)"),
        ("def get_config():\n    return None\n", "returns no config with the field 'tasks'"),
    ],
)
def test_an_error_in_a_config_file_is_one_line(text, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError, match=message):
        configs.load_config(str(tmp_path / "mine.py"))
    assert cli.main(["train", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: config ")


def test_fields_on_the_command_line_name_the_nearest(tmp_path, capsys):
    for field, message in (
        ("own.trian=x", "unknown config field 'own.trian'; did you mean 'own.train'?"),
        ("optimizer.lr=1", "unknown config field 'optimizer.lr'. Valid: optimizer.b1"),
        ("seed.x=1", "config field seed is a whole number; it has no 'x'"),
    ):
        arguments = [f"--config.{field}", f"--workdir={tmp_path}/run"]
        assert cli.main(["train", "--config=quickstart", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_an_error_inside_a_library_names_the_line_of_the_config(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from gemma_encoder.training import recipe\n\n\n"
        "def get_config(arg=''):\n"
        "    config = recipe.default_config()\n"
        "    config.missing.seed = 1\n"
        "    return config\n"
    )
    with pytest.raises(InputError, match=r"config .*mine\.py:6: AttributeError"):
        configs.load_config(str(file))
