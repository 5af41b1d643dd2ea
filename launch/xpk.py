"""Trains on Google Kubernetes Engine through xpk: one JobSet, with a job per slice.

    gemma-encoder launch xpk --config=msmarco:size=gemma2_9b --workdir=gs://BUCKET/RUN \\
      --name=NAME --project=PROJECT --zone=ZONE --cluster=CLUSTER --topology=v5e:8x8 \\
      (--registry=REGISTRY | --image=IMAGE) [--slices=N] [--env=NAME=VALUE …] [--config.FIELD=VALUE …]

The image is built from launch/Dockerfile and pushed to --registry, or is named by --image. Then:
create the workload, stream its log, and delete it. Kubernetes restarts what was preempted. Exit
codes are those of `launch tpu_vm`. launch/README.md leads there step by step.
"""

from collections.abc import Sequence

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.launch import cluster, command
from gemma_encoder.runtime import EXIT_PREEMPTED

LARGEST_HOST = 4  # chips of one machine: xpk makes pools of machines with one or four
GRACE_SECONDS = 120  # from the notice to the end: time to save a checkpoint
UNSEEN = 5  # looks that may fail in a row
_KUBECTL = ["kubectl", "--namespace=default"]


class Workload:
    """The JobSet of a job: every command that concerns it."""

    def __init__(self, job: cluster.Job, cluster_name: str, image: str, *, built: bool, spot: bool):
        self.job, self.image, self.built = job, image, built
        self._spot = ["--spot"] if spot else []
        self._place = [
            f"--cluster={cluster_name}",
            f"--project={job.project}",
            f"--zone={job.zone}",
        ]
        self._selector = f"--selector=xpk.google.com/workload={job.name}"

    def build(self) -> list[str]:
        """Builds the image; the archive of the code is its standard input."""
        return ["docker", "build", "--file=launch/Dockerfile", f"--tag={self.image}", "-"]

    def push(self) -> list[str]:
        """Brings the image to where the cluster finds it."""
        return ["docker", "push", self.image]

    def create(self) -> list[str]:
        """Starts the workload."""
        job = self.job
        # exec: xpk sends SIGTERM to the shell around the command, and the program is what must hear it.
        # Kubernetes reads $(NAME) in a command as a variable of the container, and $$ as a dollar.
        program = f"exec {command.line(job.program('python'))}".replace("$", "$$")
        return [
            *("xpk", "workload", "create", f"--workload={job.name}"),
            *self._place,
            *(
                f"--tpu-type={job.topology.accelerator_type}",
                f"--num-slices={job.slices}",
                f"--docker-image={self.image}",
            ),
            *self._spot,
            *(f"--max-restarts={job.max_retries}", f"--restart-on-exit-codes={EXIT_PREEMPTED}"),
            *(f"--termination-grace-period-seconds={GRACE_SECONDS}", f"--command={program}"),
        ]

    def status(self) -> list[str]:
        """Asks for the state of the JobSet."""
        return [*_KUBECTL, "get", "jobset", self.job.name, "--output=json"]

    def pods(self) -> list[str]:
        """Asks for the state of its pods."""
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
        """Ends the workload; the cluster stays."""
        return ["xpk", "workload", "delete", f"--workload={self.job.name}", *self._place]

    def steps(self) -> list[list[str]]:
        """Every command of a run that nothing disturbs."""
        made = [self.job.archive(), self.build(), self.push()] if self.built else []
        return [*made, self.create(), self.status(), self.logs(), self.pods(), self.delete()]


class XpkLauncher:
    """One life of a workload, from its creation to its deletion."""

    def __init__(self, workload: Workload, signals: command.Signals, *, keep: bool):
        self._workload, self._job, self._signals, self._keep = workload, workload.job, signals, keep
        self._log = self._job.file(".log")
        self._held = False

    def go(self) -> int:
        """Runs the job to its end and returns the launcher's exit code."""
        try:
            return self._run()
        finally:
            self._leave()

    def _run(self) -> int:
        if self._workload.built and not self._make_image():
            return cluster.EXIT_FAILED
        with (
            self._signals.held()
        ):  # a workload that is being created must be known as made, so that it is deleted
            result = command.stream(self._workload.create(), self._log)
            self._held = result.code == 0
        if not self._held:
            cluster.say("xpk refused, see above; if it made the workload all the same, end it by:")
            cluster.say(command.line(self._workload.delete()))
            return cluster.EXIT_FAILED
        succeeded = self._watch()
        if succeeded:
            cluster.say(f"done; {self._job.workdir} holds checkpoints, metrics and predictions")
            return cluster.EXIT_DONE
        return self._explain() if succeeded is False else cluster.EXIT_FAILED

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
        """Streams the log until the JobSet ends; whether it succeeded, None where that cannot be known."""
        restarts, unseen = 0, 0
        while True:
            result = command.run_command(self._workload.status())
            status = (result.json() or {}).get("status")
            unseen = unseen + 1 if status is None else 0
            if unseen >= UNSEEN:
                cluster.say(f"the state cannot be read: {result.errors.strip()}")
                return None
            status = status or {}
            for condition in status.get("conditions", []):
                if condition.get("status") == "True" and condition.get("type") in (
                    "Completed",
                    "Failed",
                ):
                    cluster.say(
                        f"{self._job.name}: {condition['type']} {condition.get('message', '')}".rstrip()
                    )
                    return condition["type"] == "Completed"
            if status.get("restarts", 0) > restarts:
                restarts = status["restarts"]
                cluster.say(f"preempted; restart {restarts} of {self._job.max_retries}")
            command.stream(
                self._workload.logs(), self._log
            )  # ends with the pods, and at once while there are none
            command.sleep(self._job.poll_seconds)

    def _explain(self) -> int:
        """Says why the JobSet failed; returns the launcher's exit code."""
        codes = set()
        for pod in (command.run_command(self._workload.pods()).json() or {}).get("items", []):
            for container in pod.get("status", {}).get("containerStatuses", []):
                ended = container.get("state", {}).get("terminated") or {}
                if ended.get("exitCode"):
                    codes.add(ended["exitCode"])
        cluster.explain(self._job, f"training: exit codes {sorted(codes)}")
        if cluster.EXIT_BAD_INPUT in codes:
            return cluster.EXIT_BAD_INPUT
        if EXIT_PREEMPTED in codes:
            cluster.say(
                "preempted too often; give the same command again and the run goes on from its last checkpoint"
            )
            return EXIT_PREEMPTED
        return cluster.EXIT_FAILED

    def _leave(self) -> None:
        if not self._held:
            return
        if self._keep:
            cluster.say(f"kept; end it by: {command.line(self._workload.delete())}")
            return
        with self._signals.held():
            if command.stream(self._workload.delete(), self._log).code:
                raise cluster.NotDeleted(
                    f"{self._job.name} could not be deleted and may cost money; run: {command.line(self._workload.delete())}"
                )


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return cluster.run_launcher(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = cluster.LaunchFlags(__doc__)
    flags.text("cluster", "The GKE cluster, made by `xpk cluster create`.")
    flags.text(
        "registry",
        "Where images go, e.g. us-docker.pkg.dev/PROJECT/REPOSITORY: one is built from launch/Dockerfile and pushed there.",
    )
    flags.text("image", "An image that is there already, instead.")
    job = flags.job(argv, LARGEST_HOST)
    registry, image = (
        flags.checked("registry", required=False),
        flags.checked("image", required=False),
    )
    if (registry is None) == (image is None):
        raise InputError("give either --registry, to build an image, or --image, to use one")
    workload = Workload(
        job,
        flags.checked("cluster"),
        image or f"{registry}/gemma_encoder:{_commit()}",
        built=image is None,
        spot=flags["spot"],
    )
    if flags["dry_run"]:
        cluster.print_dry_run([*([] if flags["skip_plan"] else [job.plan()]), *workload.steps()])
        return cluster.EXIT_DONE
    cluster.check_job(job, skip_plan=flags["skip_plan"])
    with command.Signals() as signals:
        return XpkLauncher(workload, signals, keep=flags["keep"]).go()


def _commit() -> str:
    """The commit that is launched, which names the image."""
    result = command.run_command(
        ["git", "-C", str(cluster.ROOT), "rev-parse", "--short=12", "HEAD"]
    )
    if result.code:
        raise InputError(f"no commit to launch: {result.errors.strip()}")
    return result.output.strip()
