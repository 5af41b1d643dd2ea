"""The command `gemma-encoder`: subcommands, help without heavy imports, errors, exit codes."""

import contextlib
import importlib
import pathlib
import subprocess
import sys

import pytest

from gemma_encoder import cli, runtime
from gemma_encoder.cli import commandline, launch

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEAVY = ("jax", "flax", "tensorflow", "seqio", "orbax", "optax", "pyarrow", "sklearn")


def imported(code: str) -> tuple[str, set[str]]:
    """Runs code in a new Python; returns its output and the modules that it imported."""
    code = f"import sys\n{code}\nprint('imported', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    *lines, last = done.stdout.splitlines()
    assert last.startswith("imported ") and not done.stderr
    return "\n".join(lines), set(last.split())


def test_help_lists_every_command_without_heavy_imports():
    text, modules = imported("from gemma_encoder.cli import main\nassert main(['--help']) == 0")
    for name, line in cli.COMMANDS.items():
        assert any(name in words.split() and line in words for words in text.splitlines())
    assert not modules & {*HEAVY, "absl", "ml_collections", "numpy"}


def test_every_command_has_help_without_heavy_imports():
    calls = [[name] for name in cli.COMMANDS] + [["launch", name] for name in launch.LAUNCHERS]
    calls += [["inspect", "--sizes"], ["submit", "make"], ["submit", "check"]]
    text, modules = imported(
        f"""
from gemma_encoder.cli import main
for words in {calls}:
    print("##", *words)
    try:
        code = main([*words, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert not code, words
"""
    )
    assert not modules & set(HEAVY)
    for words, part in zip(calls, text.split("## ")[1:], strict=True):
        assert f"gemma-encoder {' '.join(words)}" in part, part
        assert max(map(len, part.splitlines())) <= 120 and len(part.splitlines()) < 90


def test_every_module_is_a_command_or_a_helper():
    helpers = {"commandline", "summary", "inspect_data", "inspect_checkpoint"}
    modules = {path.stem for path in pathlib.Path(cli.__file__).parent.glob("[a-z]*.py")}
    assert modules == {*cli.COMMANDS, *helpers}
    for name in cli.COMMANDS:
        assert callable(importlib.import_module(f"gemma_encoder.cli.{name}").main)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["launch", "tpu-vm"], "unknown launcher 'tpu-vm'; did you mean 'tpu_vm'?"),
        (["launch"], "unknown launcher ''"),
        (["train"], "--workdir is missing"),
        (["train", "--workdir=W"], "--config is missing: name an experiment"),
        (
            ["train", "--workdir=W", "--config=owm:ranking"],
            "unknown config 'owm'; did you mean 'own'",
        ),
        (["train", "--workdir=W", "--config"], "config"),
        (["train", "--config=quickstart", "--workdir=W", "--mode=eval"], "mode"),
        (["evaluate", "--config=quickstart", "--workdir=W"], "W holds no checkpoint to evaluate"),
        (["predict", "--workdir=W"], "--input is missing"),
        (["predict", "--input=x.txt"], "--workdir is missing"),
        (["predict", "--workdir=W", "--input=x.txt"], "W does not exist"),
        (["predict", "--workdir=W", "--input=x.txt", "--blank=skip"], "blank"),
        (["export", "--workdir=W"], "--output is missing"),
        (["export", "--output=x", "--workdir=W"], "W does not exist"),
        (["export", "--output=x", "--workdir=W", "--format=gema"], "huggingface"),
        (["plan", "--config=quickstart"], "--config and --topology are needed"),
        (["pretrain", "--workdir=W"], "--output is missing"),
        (["report", "W"], "W does not exist"),
        (["inspect", "W"], "W does not exist; give a checkpoint's folder"),
        (["submit", "check", "W"], "W does not exist"),
    ],
)
def test_refusals_are_one_line_and_exit_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err and not captured.out
    assert not (tmp_path / "W").exists()


def test_usage_is_printed_without_a_command(capsys):
    assert cli.main([]) == 2
    assert "usage: gemma-encoder COMMAND" in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "gemma_encoder", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "0.1.0"


@pytest.mark.parametrize("command", ["train", "evaluate", "pretrain", "sweep", "report", "tables"])
def test_missing_training_packages_are_a_one_line_error(command, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "TRAINING", ("no_such_package",))
    words = {"sweep": ["--study=attention"], "report": ["W"], "tables": ["W"]}
    assert cli.main([command, *words.get(command, ["--config=quickstart", "--workdir=W"])]) == 2
    error = capsys.readouterr().err
    assert "pip install 'gemma_encoder[train]'" in error and error.count("\n") == 1


def test_help_config_lists_the_fields(capsys):
    assert cli.main(["train", "--help_config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for field in ("seed", "model.pooling.name", "optimizer.learning_rate", "compilation_cache"):
        (line,) = (line for line in lines if line.split()[0] == field)
        assert len(line.split()) > 4


def test_long_running_commands_use_huge_pages_except_for_help(monkeypatch):
    starts = []
    monkeypatch.setattr(runtime, "use_huge_pages", lambda: starts.append(sys.argv[1:]))
    for words in (["train"], ["train", "--help"], ["export"], ["predict"]):
        monkeypatch.setattr(sys, "argv", ["gemma-encoder", *words])
        with contextlib.suppress(SystemExit):
            cli.main()
    assert starts == [["train"], ["predict"]]


def test_an_interrupt_exits_with_130(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    assert commandline.run_program(interrupted) == 130
    assert "rerun the command to resume" in capsys.readouterr().err


def test_flags_and_configs_do_not_leak_between_calls():

    def parse(*words):
        flags = commandline.Flags("")
        flags.config()
        flags.text("name", "A name.")
        return flags.parse(words), flags["name"]

    config, name = parse("--config=quickstart", "--config.seed=7", "--name=a")
    assert (config.seed, name) == (7, "a")
    config, name = parse("--config", "quickstart:smoke")
    assert (config.seed, config.train_for, name) == (0, "6 steps", None)
