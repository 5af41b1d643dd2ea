"""Trains on Google Kubernetes Engine through xpk: one JobSet, with a job per slice.

    gemma-encoder launch xpk --config=msmarco:size=gemma2_9b --workdir=gs://BUCKET/RUN \\
      --name=NAME --project=PROJECT --zone=ZONE --cluster=CLUSTER --topology=v5e:8x8 \\
      (--registry=REGISTRY | --image=IMAGE) [--slices=N] [--env=NAME=VALUE …] \\
      [--config.FIELD=VALUE …]

An image is built from launch/Dockerfile and pushed to --registry, unless --image names an existing
one. The launcher then creates the workload, streams its log, and deletes it at the end. Kubernetes
restarts preempted jobs. Exit codes are those of `launch tpu_vm`. launch/README.md is a step-by-step
guide.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.launch import cluster, command
from gemma_encoder.runtime import EXIT_PREEMPTED

MAX_CHIPS_PER_NODE = 4  # xpk creates node pools of machines with one or four
GRACE_SECONDS = 120  # from SIGTERM to SIGKILL: time to save a checkpoint
_KUBECTL = ["kubectl", "--namespace=default"]


class Workload:
    """JobSet of a job: builds the argument list of every command on it."""

    def __init__(self, job: cluster.Job, cluster_name: str, image: str, *, built: bool, spot: bool):
        self.job = job
        self.image = image
        self.built = built
        self._spot = ["--spot"] if spot else []
        self._cluster = [
            f"--cluster={cluster_name}",
            f"--project={job.project}",
            f"--zone={job.zone}",
        ]
        self._selector = f"--selector=xpk.google.com/workload={job.name}"

    def build(self) -> list[str]:
        """Builds the image; reads the archive of the code from standard input."""
        return ["docker", "build", "--file=launch/Dockerfile", f"--tag={self.image}", "-"]

    def push(self) -> list[str]:
        """Pushes the image to the registry."""
        return ["docker", "push", self.image]

    def create(self) -> list[str]:
        """Creates the workload."""
        job = self.job
        # xpk sends SIGTERM to the shell around the command; exec lets the program receive it.
        # Kubernetes expands $(NAME) in a command and reads $$ as a dollar sign.
        program = f"exec {command.line(job.program('python'))}".replace("$", "$$")
        return [
            "xpk",
            "workload",
            "create",
            f"--workload={job.name}",
            *self._cluster,
            f"--tpu-type={job.topology.accelerator_type}",
            f"--num-slices={job.slices}",
            f"--docker-image={self.image}",
            *self._spot,
            f"--max-restarts={job.max_retries}",
            f"--restart-on-exit-codes={EXIT_PREEMPTED}",
            f"--termination-grace-period-seconds={GRACE_SECONDS}",
            f"--command={program}",
        ]

    def status(self) -> list[str]:
        """Queries the state of the JobSet."""
        return [*_KUBECTL, "get", "jobset", self.job.name, "--output=json"]

    def pods(self) -> list[str]:
        """Queries the state of its pods."""
        return [*_KUBECTL, "get", "pods", self._selector, "--output=json"]

    def logs(self) -> list[str]:
        """Follows the log of all pods."""
        return [
            *_KUBECTL,
            "logs",
            self._selector,
            "--follow",
            "--prefix",
            "--tail=200",
            f"--max-log-requests={self.job.hosts}",
        ]

    def delete(self) -> list[str]:
        """Deletes the workload; the cluster remains."""
        return ["xpk", "workload", "delete", f"--workload={self.job.name}", *self._cluster]

    def steps(self) -> list[list[str]]:
        """Returns every command of an undisturbed run, in order."""
        image = [self.job.archive(), self.build(), self.push()] if self.built else []
        return [*image, self.create(), self.status(), self.logs(), self.pods(), self.delete()]


class XpkLauncher:
    """Runs a workload from its creation to its deletion.

    Args:
        workload: the JobSet.
        signals: defers signals while the workload is created or deleted.
        keep: whether to leave the workload in the cluster at the end.
    """

    def __init__(self, workload: Workload, signals: command.Signals, *, keep: bool):
        self._workload = workload
        self._job = workload.job
        self._signals = signals
        self._keep = keep
        self._log = self._job.file(".log")
        self._held = False  # whether the workload exists

    def go(self) -> int:
        """Runs the job to its end and returns the launcher's exit code."""
        try:
            return self._run()
        finally:
            self._leave()

    def _run(self) -> int:
        if self._workload.built and not self._make_image():
            return cluster.EXIT_FAILED
        # An interrupted xpk may still have created the workload; defer signals to know that it did,
        # so that it is deleted.
        with self._signals.held():
            result = command.stream(self._workload.create(), self._log)
            self._held = result.code == 0
        if not self._held:
            cluster.say("xpk refused, see above; if the workload exists nevertheless, delete it:")
            cluster.say(command.line(self._workload.delete()))
            return cluster.EXIT_FAILED
        succeeded = self._watch()
        if succeeded is None:
            return cluster.EXIT_FAILED
        if not succeeded:
            return self._explain()
        cluster.say(f"done; {self._job.workdir} holds checkpoints, metrics and predictions")
        return cluster.EXIT_DONE

    def _make_image(self) -> bool:
        cluster.pack(self._job)
        for step, archive in (
            (self._workload.build(), self._job.file(".tar.gz")),
            (self._workload.push(), None),
        ):
            if command.stream(step, self._log, stdin=archive).code:
                cluster.say(f"no image: {command.line(step)} failed, see above")
                return False
        return True

    def _watch(self) -> bool | None:
        """Streams the log until the JobSet ends.

        Returns:
            True if the JobSet succeeded, False if it failed, None if its state cannot be read.
        """
        restarts = 0
        failed_polls = 0
        while True:
            result = command.run_command(self._workload.status())
            status = (result.json() or {}).get("status")
            failed_polls = failed_polls + 1 if status is None else 0
            if failed_polls >= cluster.MAX_FAILED_POLLS:
                cluster.say(f"the state cannot be read: {result.errors.strip()}")
                return None
            status = status or {}
            condition = _final_condition(status)
            if condition is not None:
                message = f"{condition['type']} {condition.get('message', '')}".rstrip()
                cluster.say(f"{self._job.name}: {message}")
                return condition["type"] == "Completed"
            if status.get("restarts", 0) > restarts:
                restarts = status["restarts"]
                cluster.say(f"preempted; restart {restarts} of {self._job.max_retries}")
            # Ends with the pods, and returns immediately while there are none.
            command.stream(self._workload.logs(), self._log)
            command.sleep(self._job.poll_seconds)

    def _explain(self) -> int:
        """Reports why the JobSet failed and returns the launcher's exit code."""
        answer = command.run_command(self._workload.pods()).json() or {}
        codes = _exit_codes(answer.get("items", []))
        cluster.explain(self._job, f"training: exit codes {sorted(codes)}")
        if cluster.EXIT_BAD_INPUT in codes:
            return cluster.EXIT_BAD_INPUT
        if EXIT_PREEMPTED in codes:
            cluster.say("preempted too often; rerun the command to resume from the last checkpoint")
            return EXIT_PREEMPTED
        return cluster.EXIT_FAILED

    def _leave(self) -> None:
        if not self._held:
            return
        delete = self._workload.delete()
        if self._keep:
            cluster.say(f"workload left in the cluster; to delete it, run: {command.line(delete)}")
            return
        with self._signals.held():
            if command.stream(delete, self._log).code:
                raise cluster.NotDeleted(
                    f"{self._job.name} could not be deleted and may cost money; "
                    f"run: {command.line(delete)}"
                )


def _final_condition(status: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the condition that says that a JobSet has ended, None while it is running."""
    for condition in status.get("conditions", []):
        is_final = condition.get("type") in ("Completed", "Failed")
        if is_final and condition.get("status") == "True":
            return condition
    return None


def _exit_codes(pods: Sequence[Mapping[str, Any]]) -> set[int]:
    """Returns the nonzero exit codes of all containers of some pods."""
    codes = set()
    for pod in pods:
        for container in pod.get("status", {}).get("containerStatuses", []):
            terminated = container.get("state", {}).get("terminated") or {}
            if terminated.get("exitCode"):
                codes.add(terminated["exitCode"])
    return codes


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return cluster.run_launcher(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = _flags()
    job = flags.job(argv, MAX_CHIPS_PER_NODE)
    workload = _workload(job, flags)
    if flags["dry_run"]:
        plan = [] if flags["skip_plan"] else [job.plan()]
        cluster.print_dry_run([*plan, *workload.steps()])
        return cluster.EXIT_DONE
    cluster.check_job(job, skip_plan=flags["skip_plan"])
    with command.Signals() as signals:
        return XpkLauncher(workload, signals, keep=flags["keep"]).go()


def _flags() -> cluster.LaunchFlags:
    flags = cluster.LaunchFlags(__doc__)
    flags.text("cluster", "GKE cluster, created by `xpk cluster create`.")
    flags.text(
        "registry",
        "Image repository, e.g. us-docker.pkg.dev/PROJECT/REPOSITORY: an image is built from "
        "launch/Dockerfile and pushed there.",
    )
    flags.text("image", "Existing image to use instead.")
    return flags


def _workload(job: cluster.Job, flags: cluster.LaunchFlags) -> Workload:
    registry = flags.checked("registry", required=False)
    image = flags.checked("image", required=False)
    if (registry is None) == (image is None):
        raise InputError("give either --registry, to build an image, or --image, to use one")
    return Workload(
        job,
        flags.checked("cluster"),
        image or f"{registry}/gemma_encoder:{_commit()}",
        built=image is None,
        spot=flags["spot"],
    )


def _commit() -> str:
    """Returns the launched commit, which is the tag of the image."""
    result = command.run_command(
        ["git", "-C", str(cluster.ROOT), "rev-parse", "--short=12", "HEAD"]
    )
    if result.code:
        raise InputError(f"HEAD is not a commit that can be launched: {result.errors.strip()}")
    return result.output.strip()
