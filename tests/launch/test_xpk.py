"""GKE launcher through xpk: exact argument lists, and a workload's life against fake programs."""

import io
import json
import shlex
import signal
import sys
import tarfile

import pytest

from gemma_encoder.launch import xpk
from tests.launch.conftest import launcher_arguments, lists

REGISTRY = "us-docker.pkg.dev/my-project/images"
IMAGE = "us-docker.pkg.dev/my-project/images/gemma_encoder:1"
CLUSTER = ["--cluster=tpus", "--project=my-project", "--zone=us-west4-a"]
SELECTOR = "--selector=xpk.google.com/workload=first"


def arguments(*more: str, **changes: str) -> list[str]:
    """Returns a valid command line of the launcher."""
    return launcher_arguments(*more, **({"cluster": "tpus"} | changes))


def status(condition: str = "", restarts: int = 0) -> dict:
    """Returns kubectl's answer to `get jobset`."""
    conditions = [{"type": condition, "status": "True", "message": "all done"}] if condition else []
    return {"out": json.dumps({"status": {"conditions": conditions, "restarts": restarts}})}


def pods(*codes: int) -> dict:
    """Returns kubectl's answer to `get pods`, with one terminated container per code."""
    statuses = [[{"state": {"terminated": {"exitCode": code}}}] for code in codes]
    items = [{"status": {"containerStatuses": containers}} for containers in statuses]
    return {"out": json.dumps({"items": items})}


@pytest.fixture
def healthy_cluster(cloud, repository):
    """A cluster in which everything works."""
    for words in ("docker build", "docker push", "workload create", "workload delete"):
        cloud.rule(words)
    cloud.rule("get jobset", status(), status("Completed"))
    cloud.rule("logs", {"out": "[pod/first-slice-job-0-0] step 1\n"})
    return cloud


def test_dry_run_prints_all_commands_and_starts_nothing(cloud, repository, launch, capsys):
    override = "--config.train_for=10 steps"
    more = (f"--registry={REGISTRY}", "--dry_run", "--env=A=$(B)", override, "--slices=1")
    assert launch(xpk, arguments(*more)) == 0
    steps = lists(capsys.readouterr().out)
    image = steps[3][2]
    assert image.startswith(f"{REGISTRY}/gemma_encoder:")
    assert len(image.rpartition(":")[2]) == 12
    plan = ["-m", "gemma_encoder", "plan", "--config=experiments/tiny.py", override]
    files = repository / "runs/launch"
    git = ["git", "-C", str(repository)]
    # Kubernetes reads $$ as a dollar sign.
    program = (
        "exec env 'A=$$(B)' python -m gemma_encoder train --config=experiments/tiny.py "
        f"'{override}' --workdir=gs://bucket/runs/first"
    )
    options = [
        "--tpu-type=v5litepod-16",
        "--num-slices=1",
        f"--docker-image={image}",
        "--max-restarts=10",
        "--restart-on-exit-codes=75",
        "--termination-grace-period-seconds=120",
        f"--command={program}",
    ]
    kubectl = ["kubectl", "--namespace=default"]
    follow = ["--follow", "--prefix", "--tail=200", "--max-log-requests=4"]
    assert steps == [
        [sys.executable, *plan, "--topology=v5e:4x4", f"--json={files / 'first.plan.json'}"],
        [*git, "archive", "--format=tar.gz", f"--output={files / 'first.tar.gz'}", "HEAD"],
        ["docker", "build", "--file=launch/Dockerfile", f"--tag={image}", "-"],
        ["docker", "push", image],
        ["xpk", "workload", "create", "--workload=first", *CLUSTER, *options],
        [*kubectl, "get", "jobset", "first", "--output=json"],
        [*kubectl, "logs", SELECTOR, *follow],
        [*kubectl, "get", "pods", SELECTOR, "--output=json"],
        ["xpk", "workload", "delete", "--workload=first", *CLUSTER],
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
    options = [
        "--tpu-type=v5p-128",
        "--num-slices=2",
        f"--docker-image={IMAGE}",
        "--spot",
        "--max-restarts=3",
        "--restart-on-exit-codes=75",
        "--termination-grace-period-seconds=120",
    ]
    assert create[:-1] == ["xpk", "workload", "create", "--workload=first", *CLUSTER, *options]


def test_undisturbed_run(healthy_cluster, repository, launch, capsys):
    assert launch(xpk, arguments(f"--registry={REGISTRY}")) == 0
    assert [
        " ".join(call[:3]) for call in healthy_cluster.calls() if call[0] in ("docker", "xpk")
    ] == [
        "docker build --file=launch/Dockerfile",
        f"docker push {healthy_cluster.calls('docker push')[0][2]}",
        "xpk workload create",
        "xpk workload delete",
    ]
    assert healthy_cluster.calls()[0][0] == "plan"
    with tarfile.open(fileobj=io.BytesIO(healthy_cluster.context())) as context:
        assert "launch/Dockerfile" in context.getnames()
    assert "[pod/first-slice-job-0-0] step 1" in capsys.readouterr().out
    assert "step 1" in (repository / "runs/launch/first.log").read_text()


def test_run_resumes_after_two_preemptions(healthy_cluster, launch, capsys):
    """Kubernetes restarts the job; the launcher waits for the new pods and follows their logs."""
    healthy_cluster.rule(
        "get jobset", status(), status(restarts=1), status(restarts=2), status("Completed", 2)
    )
    healthy_cluster.rule("logs", {"code": 1, "err": "no pods\n"}, {"out": "resumed\n"})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == 0
    captured = capsys.readouterr()
    assert "restart 1 of 10" in captured.err
    assert "restart 2 of 10" in captured.err
    assert "resumed" in captured.out
    assert len(healthy_cluster.calls("logs")) == 3
    assert len(healthy_cluster.calls("workload create")) == 1
    assert len(healthy_cluster.calls("workload delete")) == 1


@pytest.mark.parametrize(
    ("codes", "expected", "message"),
    [
        ((0, 2, 75, 143), 2, "exit codes [2, 75, 143]"),
        ((75, 75, 137), 75, "resume from the last checkpoint"),
        ((1, 0), 1, "exit codes [1]"),
        ((), 1, "exit codes []"),
    ],
)
def test_failed_workload_is_explained_and_deleted(
    healthy_cluster, launch, capsys, codes, expected, message
):
    healthy_cluster.rule("get jobset", status(), status("Failed"))
    healthy_cluster.rule("get pods", pods(*codes))
    healthy_cluster.rule("logs", {"out": "error: message of the program\n"})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == expected
    error = capsys.readouterr().err
    assert message in error
    assert "message of the program" in error
    assert "first.log" in error
    assert len(healthy_cluster.calls("workload delete")) == 1


def test_refused_workload_is_not_deleted(healthy_cluster, launch, capsys):
    """The cause may be quota, or a name that belongs to another user."""
    healthy_cluster.rule("workload create", {"code": 1, "out": "[XPK] first already exists\n"})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == 1
    assert healthy_cluster.calls("workload delete") == []
    assert healthy_cluster.calls("kubectl") == []
    delete = shlex.join(["xpk", "workload", "delete", "--workload=first", *CLUSTER])
    assert delete in capsys.readouterr().err


@pytest.mark.parametrize("step", ["docker build", "docker push"])
def test_failed_image_is_reported(healthy_cluster, launch, capsys, step):
    healthy_cluster.rule(step, {"code": 1, "err": "denied\n"})
    assert launch(xpk, arguments(f"--registry={REGISTRY}")) == 1
    captured = capsys.readouterr()
    assert "denied" in captured.out
    assert step in captured.err
    assert healthy_cluster.calls("xpk") == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interruption_deletes_the_workload(healthy_cluster, launch, signum):
    healthy_cluster.rule("logs", {"signal": signum, "wait": 60})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == 128 + signum
    assert len(healthy_cluster.calls("workload delete")) == 1


def test_keep_leaves_the_workload(healthy_cluster, launch, capsys):
    assert launch(xpk, arguments(f"--image={IMAGE}", "--keep")) == 0
    assert healthy_cluster.calls("workload delete") == []
    assert "to delete it, run: xpk workload delete" in capsys.readouterr().err


def test_failed_deletion_is_reported(healthy_cluster, launch, capsys):
    healthy_cluster.rule("workload delete", {"code": 1})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == 1
    assert "may cost money; run: xpk workload delete" in capsys.readouterr().err


def test_unreadable_state_ends_the_wait(healthy_cluster, launch, capsys):
    healthy_cluster.rule("get jobset", {"code": 1, "err": "Unauthorized\n"})
    assert launch(xpk, arguments(f"--image={IMAGE}")) == 1
    assert "Unauthorized" in capsys.readouterr().err
    assert len(healthy_cluster.calls("workload delete")) == 1


def test_user_text_stays_one_argument(healthy_cluster, launch):
    """Holds for xpk's arguments and, after Kubernetes has read the dollars, for the pod's shell."""
    injection = 'a\'; touch /tmp/owned; $(id) `id` && "x" $$ | #'
    template = f"--config.own.template={injection}"
    assert launch(xpk, arguments(f"--image={IMAGE}", template, f"--env=A={injection}")) == 0
    (call,) = healthy_cluster.calls("workload create")
    (remote,) = [argument for argument in call if argument.startswith("--command=")]
    words = shlex.split(remote.removeprefix("--command=").replace("$$", "$"))
    assert words[:3] == ["exec", "env", f"A={injection}"]
    assert template in words


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"cluster": "tpus;"}, (f"--image={IMAGE}",), "--cluster='tpus;' is invalid"),
        ({"workdir": "runs/first"}, (f"--image={IMAGE}",), "expected a folder in a bucket"),
        ({}, (), "give either --registry, to build an image, or --image"),
        ({}, ("--registry=a.b/c", f"--image={IMAGE}"), "give either --registry"),
        ({}, ("--image=--privileged",), "--image='--privileged' is invalid; expected an image"),
        ({}, ("--registry=a b",), "--registry='a b' is invalid"),
        (
            {"topology": "v5e:2x4"},
            (f"--image={IMAGE}", "--config.batch.readers=3"),
            "not a multiple of the 2 hosts",
        ),
    ],
)
def test_invalid_input_is_rejected_in_one_line(
    cloud, repository, launch, capsys, changes, more, message
):
    assert launch(xpk, arguments(*more, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert cloud.calls() == []
