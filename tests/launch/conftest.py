"""A repository to launch from, and stand-ins for the cloud's programs that record their arguments and answer as told."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from gemma_encoder.launch import cluster

STAND_IN = """#!{python} -IS
import json, os, pathlib, sys, time
folder = pathlib.Path({folder!r})
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with (folder / "calls").open("a") as file:
    file.write(json.dumps(call) + "\\n")
if call[0] == "docker" and call[-1] == "-":
    (folder / "context").write_bytes(sys.stdin.buffer.read())
rules = json.loads((folder / "rules").read_text())
for rule in rules:
    if rule["words"] in " ".join(call):
        answer = rule["answers"].pop(0) if len(rule["answers"]) > 1 else rule["answers"][0]
        (folder / "rules").write_text(json.dumps(rules))
        print(answer.get("out", ""), end="", flush=True)
        print(answer.get("err", ""), end="", file=sys.stderr, flush=True)
        if "signal" in answer:
            os.kill(os.getppid(), answer["signal"])
            time.sleep(answer["wait"])
        sys.exit(answer.get("code", 0))
sys.exit("no rule for " + " ".join(call))
"""

PLAN = """import json, pathlib, sys
with (pathlib.Path({folder!r}) / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(int((pathlib.Path({folder!r}) / "plan_code").read_text()))
"""

CONFIG = """from gemma_encoder.training import recipe

def get_config(arg=""):
    config = recipe.default_config()
    config.batch.readers = int(arg or 4)
    return config
"""


class Cloud:
    """The stand-ins: `rule` says how they answer, `calls` what they were asked."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self._rules = folder, []
        (folder / "calls").touch()
        (folder / "plan_code").write_text("0")
        for program in ("gcloud", "xpk", "docker", "kubectl"):
            path = folder / "bin" / program
            path.parent.mkdir(exist_ok=True)
            path.write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)

    def rule(self, words: str, *answers: dict) -> None:
        """To a call that holds `words`: one answer after the other, the last one for ever. Later rules come first."""
        self._rules.insert(0, {"words": words, "answers": list(answers) or [{}]})
        (self._folder / "rules").write_text(json.dumps(self._rules))

    def plan_fails(self, code: int) -> None:
        (self._folder / "plan_code").write_text(str(code))

    def calls(self, *words: str) -> list[list[str]]:
        """The calls, in order; with `words`, those that hold all of them as whole words."""
        calls = [json.loads(line) for line in (self._folder / "calls").read_text().splitlines()]
        return [
            call for call in calls if all(f" {word} " in f" {' '.join(call)} " for word in words)
        ]

    def context(self) -> bytes:
        return (self._folder / "context").read_bytes()


@pytest.fixture
def cloud(tmp_path, monkeypatch) -> Cloud:
    (tmp_path / "cloud").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'cloud' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return Cloud(tmp_path / "cloud")


@pytest.fixture
def repository(tmp_path, monkeypatch, cloud) -> pathlib.Path:
    """A committed repository with one config and a planner that says yes."""
    folder = tmp_path / "repository"
    for name, text in {
        "experiments/tiny.py": CONFIG,
        "gemma_encoder/__init__.py": "",
        "gemma_encoder/__main__.py": PLAN.format(folder=str(tmp_path / "cloud")),
        "launch/worker.py": "",
        "launch/Dockerfile": "FROM scratch\n",
        ".gitignore": "runs/\n__pycache__/\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git = ["git", "-C", str(folder), "-c", "user.name=Test", "-c", "user.email=test@example.com"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=All"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(cluster, "ROOT", folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def launch():
    """`launch(program, argv)`: the exit code of a launcher."""
    return lambda program, argv: program.main(argv)


def lists(text: str) -> list[list[str]]:
    """What a dry run prints, as argument lists."""
    return [shlex.split(line) for line in text.splitlines()]
