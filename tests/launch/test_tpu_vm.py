"""Cloud TPU VMs: exact argument lists, and the whole life of a job against stand-ins."""

import json
import shlex
import signal
import sys
import tarfile

import pytest

from gemma_encoder.launch import command, tpu_vm
from tests.launch.conftest import lists

PLACE = ["--project=my-project", "--zone=us-west4-a"]
ALL = ["--node=all", "--worker=all", "--batch-size=all"]
ALIVE = ["--ssh-flag=-o ServerAliveInterval=30", "--ssh-flag=-o ServerAliveCountMax=10"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]


def arguments(*more: str, **changes: str) -> list[str]:
    """A good command line of the launcher."""
    given = {
        "config": "experiments/tiny.py",
        "workdir": "gs://bucket/runs/first",
        "name": "first",
        "project": "my-project",
        "zone": "us-west4-a",
        "topology": "v5e:4x4",
    } | changes
    return [
        *(f"--{name}={value}" for name, value in given.items()),
        "--poll_seconds=0",
        *more,
    ]


def state(name: str, message: str = "", nodes: tuple[str, ...] = ("first",)) -> dict:
    """The answer to `describe`."""
    failed = {"failedData": {"error": {"message": message}}} if message else {}
    return {
        "out": json.dumps(
            {
                "state": {"state": name, **failed},
                "tpu": {"nodeSpec": [{"nodeId": node} for node in nodes]},
            }
        )
    }


def report(step: str, *codes: int, text: str = "") -> dict:
    """The answer of so many workers; gcloud exits with the first code that is not 0."""
    lines = [f"host-{host}: {text}\n" for host in range(len(codes)) if text]
    lines += [
        f"worker-report: host-{host} {step} ended with {code}.\n" for host, code in enumerate(codes)
    ]
    return {"out": "".join(lines), "code": next(filter(None, codes), 0)}


@pytest.fixture
def calm(cloud, repository):
    """A cloud in which everything works, on four hosts."""
    for words in ("queued-resources create", "queued-resources scp", "queued-resources delete"):
        cloud.rule(words)
    cloud.rule(
        "queued-resources describe",
        state("WAITING_FOR_RESOURCES"),
        state("PROVISIONING"),
        state("ACTIVE"),
    )
    cloud.rule("tpu-vm describe", {"out": '{"state": "READY"}'})
    cloud.rule("worker.py install", report("install", 0, 0, 0, 0))
    cloud.rule("worker.py run", report("run", 0, 0, 0, 0, text="step 1"))
    return cloud


def count(cloud, *words: str) -> int:
    return len(cloud.calls(*words))


def test_dry_run_prints_every_argument_list_and_starts_nothing(cloud, repository, capsys, launch):
    override = "--config.train_for=10 steps"
    assert (
        launch(
            tpu_vm,
            arguments("--spot", "--dry_run", "--env=TFDS_DATA_DIR=gs://bucket/tfds", override),
        )
        == 0
    )
    archive = str(repository / "runs/launch/first.tar.gz")
    program = [
        "env",
        "TFDS_DATA_DIR=gs://bucket/tfds",
        "../env/bin/python",
        "-m",
        "gemma_encoder",
        "train",
    ]
    program += ["--config=experiments/tiny.py", override, "--workdir=gs://bucket/runs/first"]
    plan = [
        "-m",
        "gemma_encoder",
        "plan",
        "--config=experiments/tiny.py",
        override,
        "--topology=v5e:4x4",
    ]
    ssh = [*QUEUED, "ssh", "first", *PLACE, *ALL, *ALIVE, "--quiet"]
    kind = [
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=first",
        "--spot",
    ]
    assert lists(capsys.readouterr().out) == [
        [sys.executable, *plan, f"--json={repository / 'runs/launch/first.plan.json'}"],
        ["git", "-C", str(repository), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"],
        [*QUEUED, "create", "first", *PLACE, *kind, "--async", "--quiet"],
        [*QUEUED, "describe", "first", *PLACE, "--format=json"],
        [
            *QUEUED,
            "scp",
            archive,
            str(repository / "launch/worker.py"),
            "first:",
            *PLACE,
            *ALL,
            "--quiet",
        ],
        [*ssh, "--command=python3 worker.py install first"],
        [*ssh, f"--command={shlex.join(['python3', 'worker.py', 'run', 'first', *program])}"],
        [*QUEUED, "delete", "first", *PLACE, "--force", "--quiet"],
    ]
    assert cloud.calls() == [] and not (repository / "runs").exists()


def test_slices_share_one_request(cloud, repository, capsys, launch):
    account = "--service_account=trainer@my-project.iam.gserviceaccount.com"
    more = (
        "--slices=2",
        "--reserved",
        account,
        "--runtime_version=v2-other",
        "--skip_plan",
        "--dry_run",
    )
    assert launch(tpu_vm, arguments(*more, config="experiments/tiny.py:8")) == 0
    kind = [
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-other",
        "--node-count=2",
        "--node-prefix=first",
        "--reserved",
    ]
    steps = lists(capsys.readouterr().out)
    assert steps[1] == [
        *QUEUED,
        "create",
        "first",
        *PLACE,
        *kind,
        account.replace("service_account", "service-account"),
        "--async",
        "--quiet",
    ]


def test_a_run_that_nothing_disturbs(calm, repository, capsys, launch):
    assert launch(tpu_vm, arguments()) == 0
    verbs = [call[4] if "queued-resources" in call else call[0] for call in calm.calls()]
    assert verbs == [
        "plan",
        "create",
        "describe",
        "describe",
        "describe",
        "scp",
        "ssh",
        "ssh",
        "delete",
    ]
    assert "host-3: step 1" in capsys.readouterr().out
    assert "host-3: step 1" in (repository / "runs/launch/first.log").read_text()
    with tarfile.open(repository / "runs/launch/first.tar.gz") as archive:
        assert "experiments/tiny.py" in archive.getnames()


def test_keep_leaves_the_machines_and_says_how_to_end_them(calm, capsys, launch):
    assert launch(tpu_vm, arguments("--keep")) == 0
    assert count(calm, "delete") == 0
    assert (
        shlex.join([*QUEUED, "delete", "first", *PLACE, "--force", "--quiet"])
        in capsys.readouterr().err
    )


def test_a_plan_that_does_not_fit_costs_nothing(calm, capsys, launch):
    calm.plan_fails(1)
    assert launch(tpu_vm, arguments()) == 2
    assert "gemma-encoder plan exited with 1" in capsys.readouterr().err
    assert count(calm, "gcloud") == 0
    assert launch(tpu_vm, arguments("--skip_plan")) == 0


def test_a_refused_request_deletes_nothing(calm, capsys, launch):
    """It may be refused because the name belongs to someone else's run."""
    calm.rule(
        "queued-resources create",
        {"code": 1, "err": "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded.\n"},
    )
    assert launch(tpu_vm, arguments()) == 1
    assert "Quota limit" in capsys.readouterr().out
    assert count(calm, "create") == 1 and count(calm, "delete") == 0


def test_quota_that_shows_later_is_told_and_the_request_deleted(calm, capsys, launch):
    calm.rule(
        "queued-resources describe", state("ACCEPTED"), state("FAILED", "Quota exceeded for TPUs")
    )
    assert launch(tpu_vm, arguments()) == 1
    assert "FAILED: Quota exceeded for TPUs" in capsys.readouterr().err
    assert count(calm, "create") == count(calm, "delete") == 1 and count(calm, "ssh") == 0


def test_preempted_twice_then_done(calm, launch):
    """Once with a notice, once without; the name, the workdir and the whole command stay the same."""
    calm.rule(
        "worker.py run", report("run", 75, 75, 75, 75), {"code": 255}, report("run", 0, 0, 0, 0)
    )
    calm.rule(
        "queued-resources describe",
        state("ACTIVE"),
        state("ACTIVE"),
        state("ACTIVE"),
        state("SUSPENDED"),
        state("ACTIVE"),
    )
    assert launch(tpu_vm, arguments("--spot")) == 0
    verbs = [call[4] for call in calm.calls("queued-resources") if call[4] != "describe"]
    assert verbs == ["create", "scp", "ssh", "ssh", "delete"] * 3
    for words in ("create", "worker.py run"):
        first, second, third = calm.calls(words)
        assert first == second == third


def test_preempted_while_the_request_waits(calm, launch):
    calm.rule(
        "queued-resources describe", state("PROVISIONING"), state("SUSPENDED"), state("ACTIVE")
    )
    assert launch(tpu_vm, arguments()) == 0
    assert count(calm, "create") == count(calm, "delete") == 2


def test_a_worker_that_was_lost_shows_late(calm, launch):
    """The request is active still; the slice's own state tells, at the second look."""
    calm.rule("worker.py run", {**report("run", 1, 1, 1), "code": 1}, report("run", 0, 0, 0, 0))
    calm.rule("tpu-vm describe", {"out": '{"state": "READY"}'}, {"out": '{"state": "PREEMPTED"}'})
    assert launch(tpu_vm, arguments()) == 0
    assert count(calm, "create") == 2 and count(calm, "tpu-vm describe first") == 2


def test_preempted_too_often(calm, capsys, launch):
    calm.rule("worker.py run", report("run", 75, 75, 75, 75))
    assert launch(tpu_vm, arguments("--max_retries=2")) == 75
    assert count(calm, "create") == count(calm, "delete") == 3
    assert "goes on from its last checkpoint" in capsys.readouterr().err


def test_bad_input_is_never_tried_again(calm, capsys, launch):
    """Not even where other workers ended otherwise, or were preempted meanwhile."""
    calm.rule("worker.py run", report("run", 1, 2, 75, 1, text="error: unknown task 'glue_sts2'"))
    assert launch(tpu_vm, arguments()) == 2
    assert count(calm, "create") == count(calm, "worker.py run") == count(calm, "delete") == 1
    error = capsys.readouterr().err
    assert (
        "unknown task 'glue_sts2'" in error
        and "first.log" in error
        and "gs://bucket/runs/first/metrics.jsonl" in error
    )


def test_a_failure_on_machines_that_are_there_is_not_tried_again(calm, capsys, launch):
    calm.rule("worker.py run", report("run", 0, 1, 0, 0, text="loss is not finite"))
    assert launch(tpu_vm, arguments()) == 1
    assert count(calm, "worker.py run") == count(calm, "delete") == 1
    assert "loss is not finite" in capsys.readouterr().err


def test_a_connection_that_broke_is_made_anew_on_the_same_machines(calm, launch):
    calm.rule("worker.py run", {**report("run", 0, 0), "code": 255}, report("run", 0, 0, 0, 0))
    assert launch(tpu_vm, arguments()) == 0
    assert (
        count(calm, "create") == count(calm, "scp") == count(calm, "delete") == 1
        and count(calm, "worker.py run") == 2
    )


def test_an_exit_code_of_0_without_reports_is_no_success(calm, launch):
    """gcloud exits 0 where it could reach no machine."""
    calm.rule("worker.py run", {"code": 0})
    assert launch(tpu_vm, arguments("--max_retries=1")) == 75
    calm.rule("worker.py install", report("install", 0, 0, 0))
    assert launch(tpu_vm, arguments()) == 1


def test_installing_fails(calm, capsys, launch):
    calm.rule("worker.py install", report("install", 0, 1, 0, 0, text="No matching distribution"))
    assert launch(tpu_vm, arguments()) == 1
    assert count(calm, "worker.py run") == 0 and count(calm, "delete") == 1
    assert "No matching distribution" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopping_deletes(calm, signum, launch):
    before = signal.getsignal(signum)
    calm.rule("worker.py run", {"signal": signum, "wait": 60})
    assert launch(tpu_vm, arguments()) == 128 + signum
    assert count(calm, "delete") == 1
    assert signal.getsignal(signum) == before


def test_stopping_while_the_request_is_made_deletes_it(calm, launch):
    """It is let finish, since an unfinished one might have been made; one that was refused is not ours."""
    calm.rule("queued-resources create", {"signal": signal.SIGTERM, "wait": 0})
    assert launch(tpu_vm, arguments()) == 128 + signal.SIGTERM
    assert count(calm, "create") == count(calm, "delete") == 1 and count(calm, "describe") == 0
    calm.rule("queued-resources create", {"signal": signal.SIGTERM, "wait": 0, "code": 1})
    assert launch(tpu_vm, arguments()) == 128 + signal.SIGTERM
    assert count(calm, "delete") == 1


def test_stopping_twice_does_not_stop_the_deletion(calm, launch):
    calm.rule("worker.py run", {"signal": signal.SIGINT, "wait": 60})
    calm.rule("queued-resources delete", {"signal": signal.SIGINT, "wait": 0})
    assert launch(tpu_vm, arguments()) == 128 + signal.SIGINT
    assert count(calm, "delete") == 1


def test_a_deletion_that_fails_is_tried_again_and_told(calm, capsys, launch):
    calm.rule("queued-resources delete", {"code": 1}, {"code": 0})
    assert launch(tpu_vm, arguments()) == 0
    calm.rule("queued-resources delete", {"code": 1})
    assert launch(tpu_vm, arguments()) == 1
    assert (
        "may cost money; run: gcloud compute tpus queued-resources delete first"
        in capsys.readouterr().err
    )


def test_a_state_that_cannot_be_read_ends_the_wait(calm, capsys, launch):
    calm.rule("queued-resources describe", {"code": 1, "err": "ERROR: PERMISSION_DENIED\n"})
    assert launch(tpu_vm, arguments()) == 1
    assert "PERMISSION_DENIED" in capsys.readouterr().err and count(calm, "delete") == 1


def test_no_gcloud(calm, monkeypatch, capsys, launch):
    monkeypatch.setattr(tpu_vm, "QUEUED_RESOURCES", ["gcloud-is-absent"])
    assert launch(tpu_vm, arguments()) == 2
    assert "gcloud-is-absent is not on the PATH" in capsys.readouterr().err


INJECTION = 'a\'; touch /tmp/owned; $(id) `id` && "x" | #'


def test_what_a_user_writes_stays_one_argument(calm, launch):
    """Of gcloud, and of the shell on the worker."""
    assert (
        launch(tpu_vm, arguments(f"--config.own.template={INJECTION}", f"--env=A={INJECTION}")) == 0
    )
    (call,) = calm.calls("worker.py run")
    (remote,) = [argument for argument in call if argument.startswith("--command=")]
    words = shlex.split(remote.removeprefix("--command="))
    assert words[4:6] == ["env", f"A={INJECTION}"] and f"--config.own.template={INJECTION}" in words
    (plan,) = calm.calls("plan")
    assert f"--config.own.template={INJECTION}" in plan


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"name": "first;rm"}, (), "--name='first;rm' cannot be used; expected lowercase letters"),
        ({"name": "--quiet"}, (), "--name='--quiet' cannot be used"),
        ({"name": "First"}, (), "--name='First'"),
        ({"name": "a" * 41}, (), "at most 40"),
        (
            {"project": "my project"},
            (),
            "--project='my project' cannot be used; expected a project's id",
        ),
        (
            {"zone": "us-west4"},
            (),
            "--zone='us-west4' cannot be used; expected a zone, e.g. us-west4-a",
        ),
        (
            {"workdir": "/tmp/run"},
            (),
            "--workdir='/tmp/run' cannot be used; expected a folder in a bucket",
        ),
        ({"workdir": "gs://bucket"}, (), "expected a folder in a bucket"),
        ({"topology": "v5e:3x3"}, (), "v5e comes as 1x1, 2x2, 2x4, 4x4"),
        (
            {"topology": "v5q:4x4"},
            (),
            "unknown TPU generation in --topology=v5q:4x4 'v5q'; did you mean",
        ),
        ({"config": "experiments/none.py"}, (), "--config=experiments/none.py does not exist"),
        ({"config": "/etc/passwd"}, (), "--config=/etc/passwd lies outside"),
        ({}, ("--config.train_fro=3",), "train_fro"),
        ({}, ("--config.train_for", "3 steps"), "write --config=FILE and --config.FIELD=VALUE"),
        ({}, ("--config.train_for=3\nsteps",), "control character"),
        ({}, ("--env=A-B=1",), "--env='A-B=1' cannot be used; expected NAME=VALUE"),
        ({}, ("--spot", "--reserved"), "--spot and --reserved exclude each other"),
        (
            {},
            ("--service_account=me",),
            "--service_account='me' cannot be used; expected an e-mail address",
        ),
        ({}, ("--sopt",), "sopt"),
        (
            {},
            ("--config.batch.readers=1",),
            "batch.readers=1 is not a multiple of the 4 hosts; write e.g. --config.batch.readers=4",
        ),
        ({}, ("--config.batch.rows=6",), "batch.rows=6 is not a multiple of batch.readers=4"),
        ({}, ("--config.prepared=experiments",), "prepared=experiments lies on this machine"),
    ],
)
def test_what_cannot_be_launched_is_told_in_one_line(
    cloud, repository, capsys, changes, more, message, launch
):
    assert launch(tpu_vm, arguments(*more, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert cloud.calls() == []


@pytest.mark.parametrize("flag", ["config", "workdir", "name", "project", "zone", "topology"])
def test_what_is_missing_is_named(cloud, repository, capsys, flag, launch):
    given = [argument for argument in arguments() if not argument.startswith(f"--{flag}=")]
    assert launch(tpu_vm, given) == 2
    assert f"--{flag}" in capsys.readouterr().err and cloud.calls() == []


def test_only_what_is_committed_is_launched(calm, repository, capsys, launch):
    (repository / "experiments" / "new.py").write_text(
        (repository / "experiments" / "tiny.py").read_text()
    )
    assert launch(tpu_vm, arguments(config="experiments/new.py")) == 2
    assert "experiments/new.py is not committed" in capsys.readouterr().err
    assert launch(tpu_vm, arguments()) == 2
    assert "differ from HEAD" in capsys.readouterr().err
    assert calm.calls() == []


def test_a_command_that_is_left_is_ended(repository, tmp_path):
    """Also one that does not end when asked."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None); print('up', flush=True); time.sleep(60)"
    seen = []

    def stop(text: str) -> None:
        seen.append(text)
        raise KeyboardInterrupt

    command.PATIENCE, before = 0.1, command.PATIENCE
    try:
        with pytest.raises(KeyboardInterrupt):
            command.stream([sys.executable, "-IS", "-c", stubborn], tmp_path / "log", stop)
    finally:
        command.PATIENCE = before
    assert seen == ["up\n"]
