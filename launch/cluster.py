"""Training jobs of the TPU launchers: shared flags, and the checks that run before any cost."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import ml_collections

from gemma_encoder import configs, terminal
from gemma_encoder.cli import commandline
from gemma_encoder.cli.commandline import EXIT_BAD_INPUT
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.launch import command, formats
from gemma_encoder.launch.topology import Topology

ROOT = pathlib.Path(__file__).resolve().parent.parent  # the Git repository whose HEAD is launched

# Exit codes of the training program and of the launchers, beside EXIT_BAD_INPUT (invalid input,
# never retried) and EXIT_PREEMPTED.
EXIT_DONE = 0
EXIT_FAILED = 1

MAX_FAILED_POLLS = 5  # consecutive polls of a state that may fail

# Config fields that may name files. Workers cannot read paths of the local machine.
PATH_FIELDS = (
    "prepared",
    "tokenizer",
    "model.pretrained",
    "ranking.run",
    "own.train",
    "own.validation",
    "own.test",
)

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclasses.dataclass(frozen=True)
class Job:
    """A validated training job.

    Attributes:
        name: name of the run and of every resource created for it; a resumed run keeps it.
        project: Google Cloud project ID.
        zone: Google Cloud zone.
        topology: topology of one slice.
        slices: number of slices.
        config: FILE[:ARG], with the file's path relative to the repository.
        overrides: --config.FIELD=VALUE arguments, as given.
        workdir: gs://BUCKET/FOLDER.
        environment: environment variables of the training program.
        hosts: number of machines, over all slices.
        max_retries: number of restarts after preemption.
        poll_seconds: seconds between two polls of a state.
    """

    name: str
    project: str
    zone: str
    topology: Topology
    slices: int
    config: str
    overrides: tuple[str, ...]
    workdir: str
    environment: Mapping[str, str]
    hosts: int
    max_retries: int
    poll_seconds: float

    def program(self, python: str) -> list[str]:
        """Returns the argument list of the training program, for a Python interpreter."""
        arguments = [
            python,
            "-m",
            "gemma_encoder",
            "train",
            f"--config={self.config}",
            *self.overrides,
            f"--workdir={self.workdir}",
        ]
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return ["env", *variables, *arguments] if variables else arguments

    def plan(self) -> list[str]:
        """Returns the argument list of the planner."""
        slices = [f"--slices={self.slices}"] if self.slices > 1 else []
        topology = f"--topology={self.topology.generation}:{self.topology.shape}"
        return [
            sys.executable,
            "-m",
            "gemma_encoder",
            "plan",
            f"--config={self.config}",
            *self.overrides,
            topology,
            *slices,
            f"--json={self.file('.plan.json')}",
        ]

    def archive(self) -> list[str]:
        """Returns the argument list that archives the code.

        Only committed files are archived, so that a run is identified by its commit.
        """
        return [
            "git",
            "-C",
            str(ROOT),
            "archive",
            "--format=tar.gz",
            f"--output={self.file('.tar.gz')}",
            "HEAD",
        ]

    def file(self, suffix: str) -> pathlib.Path:
        """Returns the path of one of the run's local files."""
        return ROOT / "runs" / "launch" / f"{self.name}{suffix}"


class LaunchFlags(commandline.Flags):
    """Flags shared by both launchers; each launcher adds its own."""

    def __init__(self, description: str):
        super().__init__(description)
        self.config()
        self.text(
            "workdir",
            "Folder of the run: gs://BUCKET/FOLDER. Reuse it to resume the run.",
        )
        self.text("name", "Name of the run and of the resources created for it.")
        self.text("project", "Google Cloud project.")
        self.text("zone", "Zone with this kind of TPU, e.g. us-west4-a.")
        self.text("topology", "Generation and shape of a slice, e.g. v5e:8x8.")
        self.whole("slices", "Number of slices that train together.", default=1, least=1)
        self.repeated(
            "env", "NAME=VALUE: an environment variable of the training program; may be repeated."
        )
        self.whole(
            "max_retries",
            "Number of restarts of a preempted run.",
            default=10,
            least=0,
        )
        self.real(
            "poll_seconds", "Seconds between two polls of the state.", default=30.0, least=0.0
        )
        self.switch("spot", "Use spot capacity: cheaper, but may be preempted.")
        self.switch("keep", "Delete nothing at the end.")
        self.switch("skip_plan", "Skip the check that the step fits the chips' memory.")
        self.switch(
            "dry_run",
            "Print every command, one per line, quoted for a shell, and start nothing.",
        )

    def checked(self, name: str, *, required: bool = True) -> str | None:
        """Returns a flag's text; raises InputError if it is missing or has a wrong format."""
        if self[name] is None and not required:
            return None
        return formats.check_format(name, self[name])

    def job(self, argv: Sequence[str], largest_host: int) -> Job:
        """Parses the flags, loads the config, and validates both.

        Args:
            argv: the arguments.
            largest_host: the most chips that the platform offers on one machine.

        Raises:
            InputError: the job cannot be launched.
        """
        if commandline.HELP & set(argv):
            self.parse(argv)
        _check_checkout()
        _check_arguments(argv)
        file, colon, argument = configs.resolve(_config_argument(argv)).partition(":")
        path = _relative_to_repository(file)
        config = self.parse(argv)
        _check_paths(config)
        topology = Topology.parse(self["topology"] or "")
        hosts = topology.hosts(largest_host) * self["slices"]
        _check_readers(config, hosts)
        return Job(
            name=self.checked("name"),
            project=self.checked("project"),
            zone=self.checked("zone"),
            topology=topology,
            slices=self["slices"],
            config=f"{path}{colon}{argument}",
            overrides=tuple(word for word in argv if word.startswith("--config.")),
            workdir=self.checked("workdir"),
            environment=_environment(self["env"]),
            hosts=hosts,
            max_retries=self["max_retries"],
            poll_seconds=self["poll_seconds"],
        )


def check_job(job: Job, *, skip_plan: bool) -> None:
    """Runs the slower checks: the code is committed, and the training step fits in memory.

    Raises:
        InputError: files are not committed, or the step does not fit.
    """
    file = job.config.partition(":")[0]
    if _git("cat-file", "-e", f"HEAD:{file}").code:
        raise InputError(
            f"{file} is not committed; workers get only committed files, so commit it first"
        )
    changed = _git("status", "--porcelain").output.splitlines()
    if changed:
        example = changed[0][3:]
        raise InputError(
            f"{len(changed)} files differ from HEAD, e.g. {example}; "
            "workers get only committed files, so commit or stash the changes"
        )
    job.file("").parent.mkdir(parents=True, exist_ok=True)
    if skip_plan:
        return
    code = subprocess.run(job.plan(), cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise InputError(
            f"gemma-encoder plan exited with {code}, see above; choose a larger --topology or a "
            "smaller batch, or skip the check with --skip_plan"
        )


class NotDeleted(Exception):
    """Resources that cost money could not be deleted."""


def run_launcher(launcher: Callable[[], int]) -> int:
    """Runs a launcher; turns its expected exceptions into a one-line message and an exit code."""
    try:
        return launcher()
    except InputError as error:
        terminal.print_one_line(f"error: {error}")
        return EXIT_BAD_INPUT
    except NotDeleted as error:
        terminal.print_one_line(f"error: {error}")
        return EXIT_FAILED
    except command.Interrupted as interrupted:
        say(f"stopped by {interrupted}")
        return interrupted.exit_code


def say(text: str) -> None:
    """Prints a status line of the launcher to stderr, marked off from the log that it streams."""
    terminal.print_message(f"launch: {text}")


def pack(job: Job) -> None:
    """Archives the committed code; raises InputError if git fails."""
    if (packed := command.run_command(job.archive())).code:
        raise InputError(f"git archive failed: {' '.join(packed.errors.split())}")


def explain(job: Job, step: str) -> None:
    """Prints the last lines of the log and where to find more.

    Args:
        job: the failed job.
        step: the step that failed, e.g. "copying the code".
    """
    text = job.file(".log").read_text(encoding="utf-8", errors="replace")
    terminal.print_message("\n".join(["", *text.splitlines()[-command.TAIL :], ""]))
    say(
        f"failed while {step}; the last lines are above. "
        f"See {job.file('.log')}, {job.workdir}/metrics.jsonl and the table in launch/README.md"
    )


def print_dry_run(steps: Sequence[Sequence[str]]) -> None:
    """Prints argument lists, one per line, quoted for a shell."""
    for step in steps:
        terminal.print_result(command.line(step))


def _git(*arguments: str) -> command.CommandResult:
    return command.run_command(["git", "-C", str(ROOT), *arguments])


def _check_checkout() -> None:
    """Raises InputError if the package was installed without its repository."""
    if not (ROOT / ".git").exists():
        raise InputError(
            f"{ROOT} is not a Git repository, and workers get only committed files; "
            "launch from a clone of the repository, installed with pip install --editable ."
        )


def _check_arguments(argv: Sequence[str]) -> None:
    """Raises InputError for arguments that cannot be passed on to workers one by one."""
    for argument in argv:
        if _CONTROL.search(argument):
            raise InputError(f"{argument!r} contains a line break or another control character")
        names_config = re.match(r"--?(no)?config\b", argument)
        if names_config and not re.match(r"--config[.\w]*=", argument):
            raise InputError(
                f"{argument!r}: write --config=FILE and --config.FIELD=VALUE as one argument with "
                "two hyphens, so that it can be passed on to the workers"
            )


def _config_argument(argv: Sequence[str]) -> str:
    """Returns the value of the only --config; raises InputError if there is none or several."""
    prefix = "--config="
    values = [argument.removeprefix(prefix) for argument in argv if argument.startswith(prefix)]
    if len(values) != 1:
        raise InputError("name exactly one experiment, e.g. --config=msmarco:size=gemma2_9b")
    return values[0]


def _relative_to_repository(path: str) -> str:
    """Returns a config file's path relative to the repository.

    Symbolic links into the repository, such as those of the package, are followed.
    """
    full = pathlib.Path(os.path.abspath(path))
    if not full.is_relative_to(ROOT) or full.is_relative_to(ROOT / "gemma_encoder"):
        full = full.resolve()
    if not full.is_relative_to(ROOT):
        raise InputError(
            f"--config={path} is outside {ROOT}; workers get only the repository, "
            "so move the file into it, e.g. to experiments/"
        )
    if not full.is_file():
        raise InputError(f"--config={path} does not exist")
    return str(full.relative_to(ROOT))


def _environment(texts: Sequence[str]) -> dict[str, str]:
    """Parses the NAME=VALUE arguments of --env."""
    variables = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(
                f"--env={text!r} is invalid; expected NAME=VALUE, "
                "e.g. --env=TFDS_DATA_DIR=gs://bucket/tfds"
            )
        variables[name] = value
    return variables


def _check_paths(config: ml_collections.ConfigDict) -> None:
    """Raises InputError if a field names a local file."""
    for field in PATH_FIELDS:
        value = config
        for part in field.split("."):
            value = value.get(part, "")
        if value and os.path.exists(value):
            raise InputError(
                f"{field}={value} is on this machine, where workers cannot read it; "
                "copy it to a bucket and write gs://BUCKET/…"
            )


def _check_readers(config: ml_collections.ConfigDict, hosts: int) -> None:
    """Raises InputError unless readers divide evenly among hosts, and rows among readers.

    Otherwise the run would fail at its first step, on machines that are already being paid for.
    """
    readers = config.batch.readers
    rows = config.batch.rows
    if readers % hosts:
        raise InputError(
            f"batch.readers={readers} is not a multiple of the {hosts} hosts; "
            f"write e.g. --config.batch.readers={hosts}"
        )
    if rows % readers:
        raise InputError(f"batch.rows={rows} is not a multiple of batch.readers={readers}")
