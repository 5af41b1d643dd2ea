"""Cloud TPU VM launcher: exact argument lists, and rejected input."""

import shlex
import sys

import pytest

from gemma_encoder.launch import tpu_vm
from tests.launch.conftest import launcher_arguments, lists

ZONE = ["--project=my-project", "--zone=us-west4-a"]
ALL_WORKERS = ["--node=all", "--worker=all", "--batch-size=all"]
ALIVE = ["--ssh-flag=-o ServerAliveInterval=30", "--ssh-flag=-o ServerAliveCountMax=10"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]


def test_dry_run_prints_all_commands_and_starts_nothing(cloud, repository, capsys, launch):
    override = "--config.train_for=10 steps"
    more = ("--spot", "--dry_run", "--env=TFDS_DATA_DIR=gs://bucket/tfds", override)
    assert launch(tpu_vm, launcher_arguments(*more)) == 0
    archive = str(repository / "runs/launch/first.tar.gz")
    worker = str(repository / "launch/worker.py")
    plan = ["-m", "gemma_encoder", "plan", "--config=experiments/tiny.py", override]
    program = [
        "env",
        "TFDS_DATA_DIR=gs://bucket/tfds",
        "../env/bin/python",
        "-m",
        "gemma_encoder",
        "train",
        "--config=experiments/tiny.py",
        override,
        "--workdir=gs://bucket/runs/first",
    ]
    kind = [
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=first",
        "--spot",
    ]
    ssh = [*QUEUED, "ssh", "first", *ZONE, *ALL_WORKERS, *ALIVE, "--quiet"]
    plan_file = repository / "runs/launch/first.plan.json"
    assert lists(capsys.readouterr().out) == [
        [sys.executable, *plan, "--topology=v5e:4x4", f"--json={plan_file}"],
        ["git", "-C", str(repository), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"],
        [*QUEUED, "create", "first", *ZONE, *kind, "--async", "--quiet"],
        [*QUEUED, "describe", "first", *ZONE, "--format=json"],
        [*QUEUED, "scp", archive, worker, "first:", *ZONE, *ALL_WORKERS, "--quiet"],
        [*ssh, "--command=python3 worker.py install first"],
        [*ssh, f"--command={shlex.join(['python3', 'worker.py', 'run', 'first', *program])}"],
        [*QUEUED, "delete", "first", *ZONE, "--force", "--quiet"],
    ]
    assert cloud.calls() == []
    assert not (repository / "runs").exists()


def test_slices_share_one_request(cloud, repository, capsys, launch):
    email = "trainer@my-project.iam.gserviceaccount.com"
    more = (
        "--slices=2",
        "--reserved",
        f"--service_account={email}",
        "--runtime_version=v2-other",
        "--skip_plan",
        "--dry_run",
    )
    assert launch(tpu_vm, launcher_arguments(*more, config="experiments/tiny.py:8")) == 0
    kind = [
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-other",
        "--node-count=2",
        "--node-prefix=first",
        "--reserved",
        f"--service-account={email}",
    ]
    steps = lists(capsys.readouterr().out)
    assert steps[1] == [*QUEUED, "create", "first", *ZONE, *kind, "--async", "--quiet"]


INJECTION = 'a\'; touch /tmp/owned; $(id) `id` && "x" | #'


def test_user_text_stays_one_argument(healthy_vms, launch):
    """Holds for gcloud's arguments and for the shell on the worker."""
    template = f"--config.own.template={INJECTION}"
    assert launch(tpu_vm, launcher_arguments(template, f"--env=A={INJECTION}")) == 0
    (call,) = healthy_vms.calls("worker.py run")
    (remote,) = [argument for argument in call if argument.startswith("--command=")]
    words = shlex.split(remote.removeprefix("--command="))
    assert words[4:6] == ["env", f"A={INJECTION}"]
    assert template in words
    (plan,) = healthy_vms.calls("plan")
    assert template in plan


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"name": "first;rm"}, (), "--name='first;rm' is invalid; expected lowercase letters"),
        ({"name": "--quiet"}, (), "--name='--quiet' is invalid"),
        ({"name": "First"}, (), "--name='First'"),
        ({"name": "a" * 41}, (), "at most 40"),
        (
            {"project": "my project"},
            (),
            "--project='my project' is invalid; expected a project ID",
        ),
        (
            {"zone": "us-west4"},
            (),
            "--zone='us-west4' is invalid; expected a zone, e.g. us-west4-a",
        ),
        (
            {"workdir": "/tmp/run"},
            (),
            "--workdir='/tmp/run' is invalid; expected a folder in a bucket",
        ),
        ({"workdir": "gs://bucket"}, (), "expected a folder in a bucket"),
        ({"topology": "v5e:3x3"}, (), "v5e comes as 1x1, 2x2, 2x4, 4x4"),
        (
            {"topology": "v5q:4x4"},
            (),
            "unknown TPU generation in --topology=v5q:4x4 'v5q'; did you mean",
        ),
        ({"config": "experiments/none.py"}, (), "--config=experiments/none.py does not exist"),
        ({"config": "/etc/passwd"}, (), "--config=/etc/passwd is outside"),
        ({}, ("--config.train_fro=3",), "train_fro"),
        ({}, ("--config.train_for", "3 steps"), "write --config=FILE and --config.FIELD=VALUE"),
        ({}, ("--config.train_for=3\nsteps",), "control character"),
        ({}, ("--env=A-B=1",), "--env='A-B=1' is invalid; expected NAME=VALUE"),
        ({}, ("--spot", "--reserved"), "--spot and --reserved are mutually exclusive"),
        (
            {},
            ("--service_account=me",),
            "--service_account='me' is invalid; expected an email address",
        ),
        ({}, ("--sopt",), "sopt"),
        (
            {},
            ("--config.batch.readers=1",),
            "batch.readers=1 is not a multiple of the 4 hosts; write e.g. --config.batch.readers=4",
        ),
        ({}, ("--config.batch.rows=6",), "batch.rows=6 is not a multiple of batch.readers=4"),
        ({}, ("--config.prepared=experiments",), "prepared=experiments is on this machine"),
    ],
)
def test_invalid_input_is_rejected_in_one_line(
    cloud, repository, capsys, changes, more, message, launch
):
    assert launch(tpu_vm, launcher_arguments(*more, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert cloud.calls() == []


@pytest.mark.parametrize("flag", ["config", "workdir", "name", "project", "zone", "topology"])
def test_missing_flag_is_named(cloud, repository, capsys, flag, launch):
    arguments = [
        argument for argument in launcher_arguments() if not argument.startswith(f"--{flag}=")
    ]
    assert launch(tpu_vm, arguments) == 2
    assert f"--{flag}" in capsys.readouterr().err
    assert cloud.calls() == []


def test_uncommitted_changes_are_rejected(healthy_vms, repository, capsys, launch):
    config = (repository / "experiments" / "tiny.py").read_text()
    (repository / "experiments" / "new.py").write_text(config)
    assert launch(tpu_vm, launcher_arguments(config="experiments/new.py")) == 2
    assert "experiments/new.py is not committed" in capsys.readouterr().err
    assert launch(tpu_vm, launcher_arguments()) == 2
    assert "differ from HEAD" in capsys.readouterr().err
    assert healthy_vms.calls() == []
