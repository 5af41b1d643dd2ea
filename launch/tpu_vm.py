"""Trains on Cloud TPU VMs: requests machines, installs, runs, resumes after preemption, deletes.

    gemma-encoder launch tpu_vm --config=msmarco:size=gemma2_9b --workdir=gs://BUCKET/RUN \\
      --name=NAME --project=PROJECT --zone=ZONE --topology=v5e:8x8 [--slices=N] \\
      [--spot | --reserved] [--env=NAME=VALUE …] [--config.FIELD=VALUE …] [--dry_run]

Exits with 0 when training is done, 2 for invalid input, 75 after more preemptions than
--max_retries (rerun the command to resume), 1 for any other failure, and 128 + N when stopped by
signal N. The machines are deleted in each of these cases, unless --keep is given.
launch/README.md is a step-by-step guide.
"""

import enum
import re
import time
from collections.abc import Mapping, Sequence

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.launch import cluster, command
from gemma_encoder.launch.topology import GENERATIONS
from gemma_encoder.runtime import EXIT_PREEMPTED

QUEUED_RESOURCES = ["gcloud", "compute", "tpus", "queued-resources"]
MAX_CHIPS_PER_VM = 8
WAITING = {"", "CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES", "STATE_UNSPECIFIED"}
CHECKS = 3  # polls of the machines after a failure: a preemption becomes visible with a delay
_REPORT = re.compile(r"worker-report: (\S+) (\w+) ended with (\d+)\.")


class AttemptOutcome(enum.Enum):
    """Outcome of one attempt to run the job."""

    DONE = "done"
    BAD_INPUT = "bad input"
    PREEMPTED = "preempted; a checkpoint is saved"
    LOST = "the machines were preempted"
    DISCONNECTED = "the connection broke"
    FAILED = "failed"


RETRIED = (AttemptOutcome.PREEMPTED, AttemptOutcome.LOST, AttemptOutcome.DISCONNECTED)
EXIT_CODES = {
    AttemptOutcome.DONE: cluster.EXIT_DONE,
    AttemptOutcome.BAD_INPUT: cluster.EXIT_BAD_INPUT,
    AttemptOutcome.FAILED: cluster.EXIT_FAILED,
}


class Machines:
    """Queued resource of a job: builds the argument list of every gcloud command on it."""

    def __init__(
        self,
        job: cluster.Job,
        capacity: Sequence[str],
        options: Sequence[str],
        runtime_version: str,
    ):
        self.job = job
        self._capacity = capacity
        self._options = options
        self._runtime_version = runtime_version
        self._zone = [f"--project={job.project}", f"--zone={job.zone}"]
        # All workers at once, since each waits for the others.
        self._all_workers = ["--node=all", "--worker=all", "--batch-size=all"]

    def create(self) -> list[str]:
        """Requests all slices as one queued resource."""
        job = self.job
        if job.slices > 1:
            nodes = [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
        else:
            nodes = [f"--node-id={job.name}"]
        kind = [
            f"--accelerator-type={job.topology.accelerator_type}",
            f"--runtime-version={self._runtime_version}",
        ]
        return [
            *QUEUED_RESOURCES,
            "create",
            job.name,
            *self._zone,
            *kind,
            *nodes,
            *self._capacity,
            *self._options,
            "--async",
            "--quiet",
        ]

    def describe(self) -> list[str]:
        """Queries the state of the queued resource."""
        return [*QUEUED_RESOURCES, "describe", self.job.name, *self._zone, "--format=json"]

    def describe_node(self, node: str) -> list[str]:
        """Queries the state of one slice."""
        return [
            "gcloud",
            "compute",
            "tpus",
            "tpu-vm",
            "describe",
            node,
            *self._zone,
            "--format=json",
        ]

    def copy(self) -> list[str]:
        """Copies the code, and worker.py to install and run it, to every home folder."""
        files = [str(self.job.file(".tar.gz")), str(cluster.ROOT / "launch" / "worker.py")]
        return [
            *QUEUED_RESOURCES,
            "scp",
            *files,
            f"{self.job.name}:",
            *self._zone,
            *self._all_workers,
            "--quiet",
        ]

    def on_all(self, arguments: Sequence[str]) -> list[str]:
        """Runs an argument list on every worker."""
        # Without these, ssh would wait for hours for a machine that has disappeared.
        alive = ["--ssh-flag=-o ServerAliveInterval=30", "--ssh-flag=-o ServerAliveCountMax=10"]
        return [
            *QUEUED_RESOURCES,
            "ssh",
            self.job.name,
            *self._zone,
            *self._all_workers,
            *alive,
            "--quiet",
            f"--command={command.line(arguments)}",
        ]

    def install(self) -> list[str]:
        """Installs the code on every worker."""
        return self.on_all(["python3", "worker.py", "install", self.job.name])

    def run(self) -> list[str]:
        """Runs the training program on every worker, or follows it if it is already running."""
        program = self.job.program("../env/bin/python")
        return self.on_all(["python3", "worker.py", "run", self.job.name, *program])

    def delete(self) -> list[str]:
        """Deletes the queued resource and its machines in any state."""
        return [*QUEUED_RESOURCES, "delete", self.job.name, *self._zone, "--force", "--quiet"]

    def steps(self) -> list[list[str]]:
        """Returns every command of an undisturbed run, in order."""
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
    """Runs a job from its first request for machines to their final deletion.

    Args:
        machines: the queued resource.
        signals: defers signals while machines are requested or deleted.
        keep: whether to leave the machines running at the end.
    """

    def __init__(self, machines: Machines, signals: command.Signals, *, keep: bool):
        self._machines = machines
        self._job = machines.job
        self._signals = signals
        self._keep = keep
        self._log = self._job.file(".log")
        self._held = False  # whether machines are requested or allocated
        self._ready = False  # whether the code is installed on them

    def go(self) -> int:
        """Runs the job to its end and returns the launcher's exit code."""
        max_retries = self._job.max_retries
        try:
            for retry in range(max_retries + 1):
                outcome = self._attempt()
                if outcome not in RETRIED:
                    return EXIT_CODES[outcome]
                if retry == max_retries:
                    cluster.say(f"{outcome.value}; no retry is left of {max_retries}")
                    break
                cluster.say(f"{outcome.value}; retry {retry + 1} of {max_retries}")
                if outcome is not AttemptOutcome.DISCONNECTED:
                    self._delete()
            cluster.say("giving up; rerun the command to resume from the last checkpoint")
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
        # An interrupted request may still have been created; defer signals to know that it was,
        # so that it is deleted.
        with self._signals.held():
            result = command.stream(self._machines.create(), self._log)
            self._held = result.code == 0
        if not self._held:
            cluster.say(
                "the request was refused, see above; launch/README.md lists the causes. "
                f"If {self._job.name!r} already exists, it may be another user's run"
            )
            return AttemptOutcome.FAILED
        return AttemptOutcome.DONE

    def _wait(self) -> AttemptOutcome:
        """Polls until the machines are allocated, without a time limit."""
        last_state = None
        failed_polls = 0
        while True:
            state, detail = self._state()
            failed_polls = failed_polls + 1 if state is None else 0
            if state is not None and state != last_state:
                suffix = f": {detail}" if detail else ""
                cluster.say(f"{self._job.name}: {state}{suffix}")
                last_state = state
            if state == "ACTIVE":
                return AttemptOutcome.DONE
            if failed_polls >= cluster.MAX_FAILED_POLLS:
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
            if result.code == 0 and self._all_succeeded(codes):
                return AttemptOutcome.DONE
            installed = list(codes.values()).count(0)
            cluster.say(f"installed on {installed} of {self._job.hosts} workers")
        if self._lost():
            return AttemptOutcome.LOST
        return self._failed("copying and installing the code")

    def _train(self) -> AttemptOutcome:
        started = time.strftime("%H:%M:%S")
        cluster.say(
            f"training on {self._job.hosts} hosts since {started}; "
            f"the log is also written to {self._log}"
        )
        _, codes = self._on_all(self._machines.run())
        if cluster.EXIT_BAD_INPUT in codes.values():
            self._failed("training: invalid input")
            return AttemptOutcome.BAD_INPUT
        if self._all_succeeded(codes):
            cluster.say(f"done; {self._job.workdir} holds checkpoints, metrics and predictions")
            return AttemptOutcome.DONE
        if EXIT_PREEMPTED in codes.values():
            return AttemptOutcome.PREEMPTED
        if self._lost():
            return AttemptOutcome.LOST
        if len(codes) < self._job.hosts and not any(codes.values()):
            return AttemptOutcome.DISCONNECTED
        return self._failed(f"training: exit codes {sorted(set(codes.values()))}")

    def _all_succeeded(self, codes: Mapping[str, int]) -> bool:
        return len(codes) == self._job.hosts and not any(codes.values())

    def _on_all(self, arguments: Sequence[str]) -> tuple[command.CommandResult, dict[str, int]]:
        """Runs a command on all workers and returns its result and the exit codes by host.

        Hosts that reported no exit code are absent.
        """
        codes = {}

        def see(text: str) -> None:
            for host, _, code in _REPORT.findall(text):
                codes[host] = int(code)

        return command.stream(arguments, self._log, see), codes

    def _state(self) -> tuple[str | None, str]:
        """Returns the state of the request and its error message.

        If the state cannot be read, returns None and the reason.
        """
        result = command.run_command(self._machines.describe())
        answer = result.json()
        if answer is None:
            return None, result.errors.strip() or result.output.strip()
        node_specs = answer.get("tpu", {}).get("nodeSpec", [])
        self._nodes = [spec["nodeId"] for spec in node_specs if spec.get("nodeId")]
        state = answer.get("state", {})
        error = state.get("failedData", {}).get("error", {})
        return state.get("state", ""), error.get("message", "")

    def _lost(self) -> bool:
        """Returns True if machines were preempted; polls, since this shows with a delay."""
        for check in range(CHECKS):
            if check:
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

    def _failed(self, step: str) -> AttemptOutcome:
        cluster.explain(self._job, step)
        return AttemptOutcome.FAILED

    def _leave(self) -> None:
        if not self._held:
            return
        if self._keep:
            delete = command.line(self._machines.delete())
            cluster.say(f"machines left running and charged for; to delete them, run: {delete}")
        else:
            self._delete()

    def _delete(self) -> None:
        delete = self._machines.delete()
        with self._signals.held():
            for _ in range(CHECKS):
                if command.stream(delete, self._log).code == 0:
                    self._held = False
                    self._ready = False
                    return
                command.sleep(self._job.poll_seconds)
        raise cluster.NotDeleted(
            f"{self._job.name} could not be deleted and may cost money; run: {command.line(delete)}"
        )


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return cluster.run_launcher(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = _flags()
    job = flags.job(argv, MAX_CHIPS_PER_VM)
    machines = _machines(job, flags)
    if flags["dry_run"]:
        plan = [] if flags["skip_plan"] else [job.plan()]
        cluster.print_dry_run([*plan, *machines.steps()])
        return cluster.EXIT_DONE
    cluster.check_job(job, skip_plan=flags["skip_plan"])
    with command.Signals() as signals:
        cluster.pack(job)
        return TpuVmLauncher(machines, signals, keep=flags["keep"]).go()


def _flags() -> cluster.LaunchFlags:
    flags = cluster.LaunchFlags(__doc__)
    flags.switch("reserved", "Use the project's reserved capacity.")
    flags.text(
        "service_account",
        "Service account of the machines; default: Compute Engine's default service account.",
    )
    flags.text(
        "runtime_version",
        "TPU software version; default: the one for plain JAX on the TPU generation.",
    )
    return flags


def _machines(job: cluster.Job, flags: cluster.LaunchFlags) -> Machines:
    if flags["spot"] and flags["reserved"]:
        raise InputError("--spot and --reserved are mutually exclusive; give at most one of them")
    capacity = [f"--{name}" for name in ("spot", "reserved") if flags[name]]
    account = flags.checked("service_account", required=False)
    options = [f"--service-account={account}"] if account else []
    default_version = GENERATIONS[job.topology.generation].runtime_version
    runtime_version = flags.checked("runtime_version", required=False) or default_version
    return Machines(job, capacity, options, runtime_version)
