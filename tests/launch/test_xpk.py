"""GKE through xpk: exact argument lists, and the whole life of a workload against stand-ins."""

import io
import json
import shlex
import signal
import sys
import tarfile

import pytest

from gemma_encoder.launch import xpk
from tests.launch.conftest import lists

IMAGE = "us-docker.pkg.dev/my-project/images/gemma_encoder:1"
PLACE = ["--cluster=tpus", "--project=my-project", "--zone=us-west4-a"]
SELECTOR = "--selector=xpk.google.com/workload=first"


def arguments(*more: str, **changes: str) -> list[str]:
    """A good command line of the launcher."""
    given = {
        "config": "experiments/tiny.py",
        "workdir": "gs://bucket/runs/first",
        "name": "first",
        "project": "my-project",
        "zone": "us-west4-a",
        "cluster": "tpus",
        "topology": "v5e:4x4",
    } | changes
    return [
        *(f"--{name}={value}" for name, value in given.items()),
        "--poll_seconds=0",
        *more,
    ]


def status(condition: str = "", restarts: int = 0) -> dict:
    """What `kubectl get jobset` answers."""
    conditions = [{"type": condition, "status": "True", "message": "all said"}] if condition else []
    return {"out": json.dumps({"status": {"conditions": conditions, "restarts": restarts}})}


def pods(*codes: int) -> dict:
    """What `kubectl get pods` answers."""
    return {
        "out": json.dumps(
            {
                "items": [
                    {
                        "status": {
                            "containerStatuses": [{"state": {"terminated": {"exitCode": code}}}]
                        }
                    }
                    for code in codes
                ]
            }
        )
    }


@pytest.fixture
def calm(cloud, repository):
    """A cluster in which everything works."""
    for words in ("docker build", "docker push", "workload create", "workload delete"):
        cloud.rule(words)
    cloud.rule("get jobset", status(), status("Completed"))
    cloud.rule("logs", {"out": "[pod/first-slice-job-0-0] step 1\n"})
    return cloud


def test_dry_run_prints_every_argument_list_and_starts_nothing(cloud, repository, launch, capsys):
    override = "--config.train_for=10 steps"
    assert (
        launch(
            xpk,
            arguments(
                "--registry=us-docker.pkg.dev/my-project/images",
                "--dry_run",
                "--env=A=$(B)",
                override,
                "--slices=1",
            ),
        )
        == 0
    )
    steps = lists(capsys.readouterr().out)
    image = steps[3][2]
    assert (
        image.startswith("us-docker.pkg.dev/my-project/images/gemma_encoder:")
        and len(image.rpartition(":")[2]) == 12
    )
    # $$ is Kubernetes' way to write a dollar.
    program = f"exec env 'A=$$(B)' python -m gemma_encoder train --config=experiments/tiny.py '{override}' --workdir=gs://bucket/runs/first"
    kind = ["--tpu-type=v5litepod-16", "--num-slices=1", f"--docker-image={image}"]
    restarts = [
        "--max-restarts=10",
        "--restart-on-exit-codes=75",
        "--termination-grace-period-seconds=120",
    ]
    plan = [
        "-m",
        "gemma_encoder",
        "plan",
        "--config=experiments/tiny.py",
        override,
        "--topology=v5e:4x4",
    ]
    assert steps == [
        [sys.executable, *plan, f"--json={repository / 'runs/launch/first.plan.json'}"],
        [
            "git",
            "-C",
            str(repository),
            "archive",
            "--format=tar.gz",
            f"--output={repository / 'runs/launch/first.tar.gz'}",
            "HEAD",
        ],
        ["docker", "build", "--file=launch/Dockerfile", f"--tag={image}", "-"],
        ["docker", "push", image],
        [
            "xpk",
            "workload",
            "create",
            "--workload=first",
            *PLACE,
            *kind,
            *restarts,
            f"--command={program}",
        ],
        ["kubectl", "--namespace=default", "get", "jobset", "first", "--output=json"],
        [
            "kubectl",
            "--namespace=default",
            "logs",
            SELECTOR,
            "--follow",
            "--prefix",
            "--tail=200",
            "--max-log-requests=4",
        ],
        ["kubectl", "--namespace=default", "get", "pods", SELECTOR, "--output=json"],
        ["xpk", "workload", "delete", "--workload=first", *PLACE],
    ]
    assert cloud.calls() == []


def test_slices_on_spot_with_a_prebuilt_image(cloud, repository, launch, capsys):
    more = (
        "--slices=2",
        "--spot",
        f"--image={IMAGE}",
        "--skip_plan",
        "--dry_run",
        "--max_retries=3",
        "--config.batch.rows=64",
    )
    assert launch(xpk, arguments(*more, topology="v5p:4x4x4", config="experiments/tiny.py:32")) == 0
    create = lists(capsys.readouterr().out)[0]
    assert create[:-1] == [
        *(
            "xpk",
            "workload",
            "create",
            "--workload=first",
            *PLACE,
            "--tpu-type=v5p-128",
            "--num-slices=2",
            f"--docker-image={IMAGE}",
            "--spot",
        ),
        *(
            "--max-restarts=3",
            "--restart-on-exit-codes=75",
            "--termination-grace-period-seconds=120",
        ),
    ]


def test_a_run_that_nothing_disturbs(calm, repository, launch, capsys):
    assert launch(xpk, arguments("--registry=us-docker.pkg.dev/my-project/images")) == 0
    assert [" ".join(call[:3]) for call in calm.calls() if call[0] in ("docker", "xpk")] == [
        "docker build --file=launch/Dockerfile",
        f"docker push {calm.calls('docker push')[0][2]}",
        "xpk workload create",
        "xpk workload delete",
    ]
    assert calm.calls()[0][0] == "plan"
    with tarfile.open(fileobj=io.BytesIO(calm.context())) as context:
        assert "launch/Dockerfile" in context.getnames()
    assert "[pod/first-slice-job-0-0] step 1" in capsys.readouterr().out
    assert "step 1" in (repository / "runs/launch/first.log").read_text()


def test_preempted_twice_then_done(calm, launch, capsys):
    """Kubernetes starts it again; pods are awaited, and followed anew."""
    calm.rule(
        "get jobset", status(), status(restarts=1), status(restarts=2), status("Completed", 2)
    )
    calm.rule("logs", {"code": 1, "err": "no pods\n"}, {"out": "resumed\n"})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == 0
    captured = capsys.readouterr()
    assert (
        "restart 1 of 10" in captured.err
        and "restart 2 of 10" in captured.err
        and "resumed" in captured.out
    )
    assert (
        len(calm.calls("logs")) == 3
        and len(calm.calls("workload create")) == len(calm.calls("workload delete")) == 1
    )


@pytest.mark.parametrize(
    ("codes", "expected", "message"),
    [
        ((0, 2, 75, 143), 2, "exit codes [2, 75, 143]"),
        ((75, 75, 137), 75, "goes on from its last checkpoint"),
        ((1, 0), 1, "exit codes [1]"),
        ((), 1, "exit codes []"),
    ],
)
def test_a_workload_that_fails(calm, launch, capsys, codes, expected, message):
    calm.rule("get jobset", status(), status("Failed"))
    calm.rule("get pods", pods(*codes))
    calm.rule("logs", {"out": "error: what the program said\n"})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == expected
    error = capsys.readouterr().err
    assert message in error and "what the program said" in error and "first.log" in error
    assert len(calm.calls("workload delete")) == 1


def test_a_workload_that_is_refused_is_not_deleted(calm, launch, capsys):
    """Quota, or a name that is someone else's."""
    calm.rule("workload create", {"code": 1, "out": "[XPK] first already exists\n"})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == 1
    assert calm.calls("workload delete") == [] and calm.calls("kubectl") == []
    assert (
        shlex.join(["xpk", "workload", "delete", "--workload=first", *PLACE])
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("step", ["docker build", "docker push"])
def test_an_image_that_cannot_be_made(calm, launch, capsys, step):
    calm.rule(step, {"code": 1, "err": "denied\n"})
    assert launch(xpk, arguments("--registry=us-docker.pkg.dev/my-project/images")) == 1
    captured = capsys.readouterr()
    assert "denied" in captured.out and f"{step}" in captured.err and calm.calls("xpk") == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopping_deletes(calm, launch, signum):
    calm.rule("logs", {"signal": signum, "wait": 60})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == 128 + signum
    assert len(calm.calls("workload delete")) == 1


def test_keep_leaves_the_workload(calm, launch, capsys):
    assert launch(xpk, arguments(f"--image={IMAGE}", "--keep")) == 0
    assert (
        calm.calls("workload delete") == []
        and "kept; end it by: xpk workload delete" in capsys.readouterr().err
    )


def test_a_workload_that_cannot_be_deleted_is_told(calm, launch, capsys):
    calm.rule("workload delete", {"code": 1})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == 1
    assert "may cost money; run: xpk workload delete" in capsys.readouterr().err


def test_a_state_that_cannot_be_read_ends_the_wait(calm, launch, capsys):
    calm.rule("get jobset", {"code": 1, "err": "Unauthorized\n"})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == 1
    assert "Unauthorized" in capsys.readouterr().err and len(calm.calls("workload delete")) == 1


def test_what_a_user_writes_stays_one_argument(calm, launch):
    """Of xpk, and, once Kubernetes has read its dollars, of the shell in the pod."""
    injection = 'a\'; touch /tmp/owned; $(id) `id` && "x" $$ | #'
    assert (
        launch(
            xpk,
            arguments(
                f"--image={IMAGE}", f"--config.own.template={injection}", f"--env=A={injection}"
            ),
        )
        == 0
    )
    (call,) = calm.calls("workload create")
    (remote,) = [argument for argument in call if argument.startswith("--command=")]
    words = shlex.split(remote.removeprefix("--command=").replace("$$", "$"))
    assert (
        words[:3] == ["exec", "env", f"A={injection}"]
        and f"--config.own.template={injection}" in words
    )


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"cluster": "tpus;"}, (f"--image={IMAGE}",), "--cluster='tpus;' cannot be used"),
        ({"workdir": "runs/first"}, (f"--image={IMAGE}",), "expected a folder in a bucket"),
        ({}, (), "give either --registry, to build an image, or --image"),
        ({}, ("--registry=a.b/c", f"--image={IMAGE}"), "give either --registry"),
        ({}, ("--image=--privileged",), "--image='--privileged' cannot be used; expected an image"),
        ({}, ("--registry=a b",), "--registry='a b' cannot be used"),
        (
            {"topology": "v5e:2x4"},
            (f"--image={IMAGE}", "--config.batch.readers=3"),
            "not a multiple of the 2 hosts",
        ),
    ],
)
def test_what_cannot_be_launched_is_told_in_one_line(
    cloud, repository, launch, capsys, changes, more, message
):
    assert launch(xpk, arguments(*more, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert cloud.calls() == []
