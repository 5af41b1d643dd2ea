"""Fixtures: a repository to launch from, and fake cloud programs that record their arguments."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

import pytest

from gemma_encoder.launch import cluster

FAKE_PROGRAM = """#!{python} -IS
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

FAKE_PLANNER = """import json, pathlib, sys
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
    """Fake cloud programs: `rule` sets their answers, `calls` returns how they were called."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._rules = []
        (folder / "calls").touch()
        (folder / "plan_code").write_text("0")
        for program in ("gcloud", "xpk", "docker", "kubectl"):
            path = folder / "bin" / program
            path.parent.mkdir(exist_ok=True)
            path.write_text(FAKE_PROGRAM.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)

    def rule(self, words: str, *answers: dict) -> None:
        """Sets the answers to calls that contain `words`.

        The answers are given one after another, the last one forever. Later rules take precedence.
        """
        self._rules.insert(0, {"words": words, "answers": list(answers) or [{}]})
        (self._folder / "rules").write_text(json.dumps(self._rules))

    def plan_fails(self, code: int) -> None:
        """Makes the planner exit with a code."""
        (self._folder / "plan_code").write_text(str(code))

    def calls(self, *words: str) -> list[list[str]]:
        """Returns the calls in order; with `words`, only those that contain all as whole words."""
        calls = [json.loads(line) for line in (self._folder / "calls").read_text().splitlines()]
        return [call for call in calls if _contains(call, words)]

    def context(self) -> bytes:
        """Returns the build context that `docker build` read."""
        return (self._folder / "context").read_bytes()


def _contains(call: Sequence[str], words: Sequence[str]) -> bool:
    text = f" {' '.join(call)} "
    return all(f" {word} " in text for word in words)


@pytest.fixture
def cloud(tmp_path, monkeypatch) -> Cloud:
    (tmp_path / "cloud").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'cloud' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return Cloud(tmp_path / "cloud")


@pytest.fixture
def repository(tmp_path, monkeypatch, cloud) -> pathlib.Path:
    """A committed repository with one config, and a planner that finds that the step fits."""
    folder = tmp_path / "repository"
    for name, text in {
        "experiments/tiny.py": CONFIG,
        "gemma_encoder/__init__.py": "",
        "gemma_encoder/__main__.py": FAKE_PLANNER.format(folder=str(tmp_path / "cloud")),
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
    """`launch(program, argv)` runs a launcher and returns its exit code."""
    return lambda program, argv: program.main(argv)


def lists(text: str) -> list[list[str]]:
    """Parses the output of a dry run into argument lists."""
    return [shlex.split(line) for line in text.splitlines()]


def launcher_arguments(*more: str, **changes: str) -> list[str]:
    """Returns a valid command line of a launcher, with some flags changed and more arguments."""
    values = {
        "config": "experiments/tiny.py",
        "workdir": "gs://bucket/runs/first",
        "name": "first",
        "project": "my-project",
        "zone": "us-west4-a",
        "topology": "v5e:4x4",
    } | changes
    flags = [f"--{name}={value}" for name, value in values.items()]
    return [*flags, "--poll_seconds=0", *more]


def request_state(name: str, message: str = "", nodes: tuple[str, ...] = ("first",)) -> dict:
    """Returns gcloud's answer to `queued-resources describe`."""
    failed = {"failedData": {"error": {"message": message}}} if message else {}
    answer = {
        "state": {"state": name, **failed},
        "tpu": {"nodeSpec": [{"nodeId": node} for node in nodes]},
    }
    return {"out": json.dumps(answer)}


def worker_reports(step: str, *codes: int, text: str = "") -> dict:
    """Returns the answer of one worker per code; gcloud exits with the first nonzero code."""
    lines = [f"host-{host}: {text}\n" for host in range(len(codes)) if text]
    lines += [
        f"worker-report: host-{host} {step} ended with {code}.\n" for host, code in enumerate(codes)
    ]
    return {"out": "".join(lines), "code": next(filter(None, codes), 0)}


@pytest.fixture
def healthy_vms(cloud, repository) -> Cloud:
    """A cloud in which everything works, with four hosts."""
    for words in ("queued-resources create", "queued-resources scp", "queued-resources delete"):
        cloud.rule(words)
    cloud.rule(
        "queued-resources describe",
        request_state("WAITING_FOR_RESOURCES"),
        request_state("PROVISIONING"),
        request_state("ACTIVE"),
    )
    cloud.rule("tpu-vm describe", {"out": '{"state": "READY"}'})
    cloud.rule("worker.py install", worker_reports("install", 0, 0, 0, 0))
    cloud.rule("worker.py run", worker_reports("run", 0, 0, 0, 0, text="step 1"))
    return cloud
