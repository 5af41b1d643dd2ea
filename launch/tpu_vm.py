"""Trains on Cloud TPU VMs: requests, installs, runs, watches, restarts after preemption, deletes.

    gemma-encoder launch tpu_vm --config=msmarco:size=gemma2_9b --workdir=gs://BUCKET/RUN \\
      --name=NAME --project=PROJECT --zone=ZONE --topology=v5e:8x8 [--slices=N] \\
      [--spot | --reserved] [--env=NAME=VALUE …] [--config.FIELD=VALUE …] [--dry_run]

Exits 0 when training is done, 2 where something handed over cannot be used, 75 where it was
preempted more often than --max_retries says (rerun the command to resume), 1 for any other failure,
128 + N when stopped by signal N. The machines are deleted in each of these cases, unless --keep is
given. launch/README.md leads there step by step.
"""

import enum
import re
import time
from collections.abc import Sequence

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.launch import cluster, command
from gemma_encoder.launch.topology import GENERATIONS
from gemma_encoder.runtime import EXIT_PREEMPTED

QUEUED_RESOURCES = ["gcloud", "compute", "tpus", "queued-resources"]
LARGEST_HOST = 8  # chips of one TPU VM
WAITING = {"", "CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES", "STATE_UNSPECIFIED"}
CHECKS = 3  # looks at the machines after a failure: that they were taken away shows late
UNSEEN = 5  # looks that may fail in a row
_REPORT = re.compile(r"worker-report: (\S+) (\w+) ended with (\d+)\.")


class AttemptOutcome(enum.Enum):
    """How one try ended."""

    DONE = "done"
    BAD_INPUT = "bad input"
    PREEMPTED = "preempted; its state is saved"
    LOST = "the machines were taken away"
    DISCONNECTED = "the connection broke"
    FAILED = "failed"


RETRIED = (AttemptOutcome.PREEMPTED, AttemptOutcome.LOST, AttemptOutcome.DISCONNECTED)
EXIT_CODES = {
    AttemptOutcome.DONE: cluster.EXIT_DONE,
    AttemptOutcome.BAD_INPUT: cluster.EXIT_BAD_INPUT,
    AttemptOutcome.FAILED: cluster.EXIT_FAILED,
}


class Machines:
    """The queued resource of a job: every command that concerns it."""

    def __init__(
        self,
        job: cluster.Job,
        capacity: Sequence[str],
        options: Sequence[str],
        runtime_version: str,
    ):
        self.job, self._capacity, self._options, self._runtime_version = (
            job,
            capacity,
            options,
            runtime_version,
        )
        self._place = [f"--project={job.project}", f"--zone={job.zone}"]
        self._all = [
            "--node=all",
            "--worker=all",
            "--batch-size=all",
        ]  # at once: a worker waits for the others

    def create(self) -> list[str]:
        """Asks for the slices, under one name."""
        job = self.job
        nodes = (
            [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
            if job.slices > 1
            else [f"--node-id={job.name}"]
        )
        kind = [
            f"--accelerator-type={job.topology.accelerator_type}",
            f"--runtime-version={self._runtime_version}",
        ]
        return [
            *QUEUED_RESOURCES,
            "create",
            job.name,
            *self._place,
            *kind,
            *nodes,
            *self._capacity,
            *self._options,
            "--async",
            "--quiet",
        ]

    def describe(self) -> list[str]:
        """Asks for the state of the request."""
        return [*QUEUED_RESOURCES, "describe", self.job.name, *self._place, "--format=json"]

    def describe_node(self, node: str) -> list[str]:
        """Asks for the state of one slice."""
        return [
            "gcloud",
            "compute",
            "tpus",
            "tpu-vm",
            "describe",
            node,
            *self._place,
            "--format=json",
        ]

    def copy(self) -> list[str]:
        """Copies the code, and the program that installs and runs it, to every home folder."""
        files = [str(self.job.file(".tar.gz")), str(cluster.ROOT / "launch" / "worker.py")]
        return [
            *QUEUED_RESOURCES,
            "scp",
            *files,
            f"{self.job.name}:",
            *self._place,
            *self._all,
            "--quiet",
        ]

    def on_all(self, arguments: Sequence[str]) -> list[str]:
        """Runs an argument list on every worker."""
        # A machine that vanished says nothing: without these, ssh would wait for it for hours.
        alive = ["--ssh-flag=-o ServerAliveInterval=30", "--ssh-flag=-o ServerAliveCountMax=10"]
        return [
            *QUEUED_RESOURCES,
            "ssh",
            self.job.name,
            *self._place,
            *self._all,
            *alive,
            "--quiet",
            f"--command={command.line(arguments)}",
        ]

    def install(self) -> list[str]:
        """Installs the code on every worker."""
        return self.on_all(["python3", "worker.py", "install", self.job.name])

    def run(self) -> list[str]:
        """Runs the training program on every worker, or follows it where it runs already."""
        return self.on_all(
            ["python3", "worker.py", "run", self.job.name, *self.job.program("../env/bin/python")]
        )

    def delete(self) -> list[str]:
        """Gives everything back, whatever its state."""
        return [*QUEUED_RESOURCES, "delete", self.job.name, *self._place, "--force", "--quiet"]

    def steps(self) -> list[list[str]]:
        """Every command of a run that nothing disturbs."""
        return [
            self.job.archive(),
            self.create(),
            self.describe(),
            self.copy(),
            self.install(),
            self.run(),
            self.delete(),
        ]


class TpuVmLauncher:
    """One life of a job, from its first request to its last deletion."""

    def __init__(self, machines: Machines, signals: command.Signals, *, keep: bool):
        self._machines, self._job, self._signals, self._keep = machines, machines.job, signals, keep
        self._log = self._job.file(".log")
        self._held = False  # whether machines are asked for or held
        self._ready = False  # whether they are installed

    def go(self) -> int:
        """Runs the job to its end and returns the launcher's exit code."""
        try:
            for retry in range(self._job.max_retries + 1):
                outcome = self._attempt()
                if outcome not in RETRIED:
                    return EXIT_CODES[outcome]
                cluster.say(
                    f"{outcome.value}; {f'retry {retry + 1} of' if retry < self._job.max_retries else 'no retry is left of'} {self._job.max_retries}"
                )
                if outcome is not AttemptOutcome.DISCONNECTED and retry < self._job.max_retries:
                    self._delete()
            cluster.say(
                "gave up; give the same command again and the run goes on from its last checkpoint"
            )
            return EXIT_PREEMPTED
        finally:
            self._leave()

    def _attempt(self) -> AttemptOutcome:
        if not self._ready:
            for step in (self._request, self._wait, self._set_up):
                outcome = step()
                if outcome is not AttemptOutcome.DONE:
                    return outcome
            self._ready = True
        return self._train()

    def _request(self) -> AttemptOutcome:
        with (
            self._signals.held()
        ):  # a request that is under way must be known as made, so that it is deleted
            result = command.stream(self._machines.create(), self._log)
            self._held = result.code == 0
        if not self._held:
            cluster.say(
                f"the request was refused, see above; launch/README.md has the causes. If {self._job.name!r} exists already, it may be someone's run"
            )
            return AttemptOutcome.FAILED
        return AttemptOutcome.DONE

    def _wait(self) -> AttemptOutcome:
        """Waits until the machines are there, however long that takes."""
        shown, unseen = None, 0
        while True:
            state, detail = self._state()
            unseen = unseen + 1 if state is None else 0
            if state is not None and state != shown:
                cluster.say(f"{self._job.name}: {state}{f': {detail}' if detail else ''}")
                shown = state
            if state == "ACTIVE":
                return AttemptOutcome.DONE
            if unseen >= UNSEEN:
                cluster.say(f"the state cannot be read: {detail}")
                return AttemptOutcome.FAILED
            if state == "FAILED":
                return AttemptOutcome.FAILED
            if state is not None and state not in WAITING:
                return AttemptOutcome.LOST
            command.sleep(self._job.poll_seconds)

    def _set_up(self) -> AttemptOutcome:
        copied = command.stream(self._machines.copy(), self._log)
        if copied.code == 0:
            result, codes = self._on_all(self._machines.install())
            if result.code == 0 and len(codes) == self._job.hosts and not any(codes.values()):
                return AttemptOutcome.DONE
            cluster.say(
                f"installed on {list(codes.values()).count(0)} of {self._job.hosts} workers"
            )
        return (
            AttemptOutcome.LOST if self._lost() else self._failed("copying and installing the code")
        )

    def _train(self) -> AttemptOutcome:
        started = time.strftime("%H:%M:%S")
        cluster.say(
            f"training on {self._job.hosts} hosts since {started}; the log goes to {self._log} too"
        )
        _, codes = self._on_all(self._machines.run())
        if cluster.EXIT_BAD_INPUT in codes.values():
            self._failed("training: something handed over cannot be used")
            return AttemptOutcome.BAD_INPUT
        if len(codes) == self._job.hosts and not any(codes.values()):
            cluster.say(f"done; {self._job.workdir} holds checkpoints, metrics and predictions")
            return AttemptOutcome.DONE
        if EXIT_PREEMPTED in codes.values():
            return AttemptOutcome.PREEMPTED
        if self._lost():
            return AttemptOutcome.LOST
        if len(codes) < self._job.hosts and not any(codes.values()):
            return AttemptOutcome.DISCONNECTED
        return self._failed(f"training: exit codes {sorted(set(codes.values()))}")

    def _on_all(self, arguments: Sequence[str]) -> tuple[command.Result, dict[str, int]]:
        """Runs a command on all workers; also returns the exit code that each one reported."""
        codes = {}

        def see(text: str) -> None:
            for host, _, code in _REPORT.findall(text):
                codes[host] = int(code)

        return command.stream(arguments, self._log, see), codes

    def _state(self) -> tuple[str | None, str]:
        """The state of the request, and its error; None and why where it cannot be read."""
        result = command.run_command(self._machines.describe())
        if (answer := result.json()) is None:
            return None, result.errors.strip() or result.output.strip()
        state = answer.get("state", {})
        self._nodes = [
            spec["nodeId"]
            for spec in answer.get("tpu", {}).get("nodeSpec", [])
            if spec.get("nodeId")
        ]
        return state.get("state", ""), state.get("failedData", {}).get("error", {}).get(
            "message", ""
        )

    def _lost(self) -> bool:
        """Whether machines were taken away, which shows late."""
        for look in range(CHECKS):
            if look:
                command.sleep(self._job.poll_seconds)
            state, _ = self._state()
            if state is None:
                continue
            if state != "ACTIVE":
                cluster.say(f"{self._job.name}: {state}")
                return True
            for node in self._nodes:
                answer = command.run_command(self._machines.describe_node(node)).json()
                if answer and answer.get("state") != "READY":
                    cluster.say(f"{node}: {answer.get('state')}")
                    return True
        return False

    def _failed(self, what: str) -> AttemptOutcome:
        cluster.explain(self._job, what)
        return AttemptOutcome.FAILED

    def _leave(self) -> None:
        if self._held and self._keep:
            cluster.say(
                f"kept, and charged for, until you run: {command.line(self._machines.delete())}"
            )
        elif self._held:
            self._delete()

    def _delete(self) -> None:
        with self._signals.held():
            for _ in range(CHECKS):
                if command.stream(self._machines.delete(), self._log).code == 0:
                    self._held = self._ready = False
                    return
                command.sleep(self._job.poll_seconds)
        raise cluster.NotDeleted(
            f"{self._job.name} could not be deleted and may cost money; run: {command.line(self._machines.delete())}"
        )


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return cluster.run_launcher(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = _flags()
    job = flags.job(argv, LARGEST_HOST)
    machines = _machines(job, flags)
    if flags["dry_run"]:
        cluster.print_dry_run([*([] if flags["skip_plan"] else [job.plan()]), *machines.steps()])
        return cluster.EXIT_DONE
    cluster.check_job(job, skip_plan=flags["skip_plan"])
    with command.Signals() as signals:
        cluster.pack(job)
        return TpuVmLauncher(machines, signals, keep=flags["keep"]).go()


def _flags() -> cluster.LaunchFlags:
    flags = cluster.LaunchFlags(__doc__)
    flags.switch("reserved", "Use reserved capacity of the project.")
    flags.text(
        "service_account",
        "Whom the machines act as; by default Compute Engine's default service account.",
    )
    flags.text(
        "runtime_version",
        "TPU software version; by default the one for plain JAX on that generation.",
    )
    return flags


def _machines(job: cluster.Job, flags: cluster.LaunchFlags) -> Machines:
    if flags["spot"] and flags["reserved"]:
        raise InputError("--spot and --reserved exclude each other")
    capacity = [f"--{name}" for name in ("spot", "reserved") if flags[name]]
    account = flags.checked("service_account", required=False)
    options = [f"--service-account={account}"] if account else []
    runtime_version = (
        flags.checked("runtime_version", required=False)
        or GENERATIONS[job.topology.generation].runtime_version
    )
    return Machines(job, capacity, options, runtime_version)
