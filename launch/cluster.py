"""What is launched: the flags that both launchers share, and every check that can be made before something costs money."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import ml_collections

from gemma_encoder import configs
from gemma_encoder.cli import commandline
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.launch import command
from gemma_encoder.launch.topology import Topology

ROOT = pathlib.Path(__file__).resolve().parent.parent  # the git repository whose HEAD is launched

# Exit codes of the training program, and of the launchers themselves.
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2  # what the user handed over cannot be used: trying again cannot help

# Fields of a config that may name files; a path on this machine means nothing to a worker.
PATH_FIELDS = (
    "prepared",
    "tokenizer",
    "model.pretrained",
    "ranking.run",
    "own.train",
    "own.validation",
    "own.test",
)

_NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"  # of runs: what Cloud TPU, GKE and xpk all take, with room for a slice's number behind it
_PATTERNS = {
    "name": (
        _NAME,
        "lowercase letters, digits and hyphens, at most 40, the first a letter, the last no hyphen",
    ),
    "cluster": (
        _NAME,
        "lowercase letters, digits and hyphens, at most 40, the first a letter, the last no hyphen",
    ),
    "project": (
        r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]",
        "a project's id, e.g. my-project-123",
    ),
    "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]", "a zone, e.g. us-west4-a"),
    "workdir": (
        r"gs://[a-z0-9][-_.a-z0-9]+[a-z0-9](/[^\s/]+)+/?",
        "a folder in a bucket, e.g. gs://bucket/runs/first",
    ),
    "service_account": (
        r"[-a-z0-9]+@[-a-z0-9.]+",
        "an e-mail address, e.g. trainer@my-project-123.iam.gserviceaccount.com",
    ),
    "runtime_version": (r"[a-z0-9][-.a-z0-9]*", "a TPU software version, e.g. v2-alpha-tpuv6e"),
    "image": (
        r"[a-z0-9][-.a-z0-9]*(:[0-9]+)?(/[-_.a-z0-9]+)+((:[\w][-.\w]*)|(@sha256:[0-9a-f]{64}))?",
        "an image, e.g. us-docker.pkg.dev/project/repository/image:tag",
    ),
    "registry": (
        r"[a-z0-9][-.a-z0-9]*(:[0-9]+)?(/[-_.a-z0-9]+)+",
        "a repository of images, e.g. us-docker.pkg.dev/project/repository",
    ),
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, checked.

    Attributes:
        name: of the run and of everything made for it; a run that goes on keeps it.
        config: FILE[:ARG], the file's path relative to the repository.
        overrides: --config.FIELD=VALUE, as given.
        workdir: gs://BUCKET/FOLDER.
        environment: variables of the training program.
        hosts: machines of all slices.
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
        """The training program's argument list, for an interpreter."""
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
        """The planner's argument list."""
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
        """The argument list that packs the code: what is committed, nothing else, so that a run can be told by its commit."""
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
        """A file of this run on this machine."""
        return ROOT / "runs" / "launch" / f"{self.name}{suffix}"


class LaunchFlags(commandline.Flags):
    """The flags that both launchers have; those of one launcher are added."""

    def __init__(self, description: str):
        super().__init__(description)
        self.config()
        self.text(
            "workdir",
            "Folder of the run: gs://BUCKET/FOLDER. The same folder goes on with the same run.",
        )
        self.text("name", "Name of the run, and of what is made for it.")
        self.text("project", "Google Cloud project.")
        self.text("zone", "Zone with this kind of TPU, e.g. us-west4-a.")
        self.text("topology", "Generation and shape of a slice, e.g. v5e:8x8.")
        self.whole("slices", "Slices that train together.", default=1, least=1)
        self.repeated("env", "NAME=VALUE: a variable for the training program; may be repeated.")
        self.whole(
            "max_retries",
            "Times that a run which was preempted is started again.",
            default=10,
            least=0,
        )
        self.real(
            "poll_seconds", "Seconds between two looks at the state.", default=30.0, least=0.0
        )
        self.switch("spot", "Use spot capacity: cheaper, and may be taken away.")
        self.switch("keep", "Delete nothing at the end.")
        self.switch("skip_plan", "Do not check first whether the step fits the chips' memory.")
        self.switch(
            "dry_run", "Print every command, one a line, quoted for a shell, and start nothing."
        )

    def checked(self, name: str, *, required: bool = True) -> str | None:
        """A flag's text, if it is what its kind allows."""
        pattern, meaning = _PATTERNS[name]
        value = self[name]
        if value is None and not required:
            return None
        if value is None:
            raise InputError(f"--{name} is missing; expected {meaning}")
        if not re.fullmatch(pattern, value):
            raise InputError(f"--{name}={value!r} cannot be used; expected {meaning}")
        return value

    def job(self, argv: Sequence[str], largest_host: int) -> Job:
        """Reads the flags, loads the config, and checks both.

        Args:
            argv: the arguments.
            largest_host: the most chips that a machine may have.

        Raises:
            InputError: whatever cannot be launched.
        """
        if commandline.HELP & set(argv):
            self.parse(argv)
        _check_checkout()
        for argument in argv:
            if _CONTROL.search(argument):
                raise InputError(f"{argument!r} holds a line break or another control character")
            if re.match(r"--?(no)?config\b", argument) and not re.match(
                r"--config[.\w]*=", argument
            ):
                raise InputError(
                    f"{argument!r}: write --config=FILE and --config.FIELD=VALUE, as one argument with two hyphens, so that it can be passed on"
                )
        given = [
            argument.removeprefix("--config=")
            for argument in argv
            if argument.startswith("--config=")
        ]
        if len(given) != 1:
            raise InputError("name one experiment, e.g. --config=msmarco:size=gemma2_9b")
        file, colon, argument = configs.resolve(given[0]).partition(":")
        path = _inside(file)
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
    """The checks that take longer: that the config is committed, and that its step fits.

    Raises:
        InputError: it is not, or does not.
    """
    file = job.config.partition(":")[0]
    if command.run_command(["git", "-C", str(ROOT), "cat-file", "-e", f"HEAD:{file}"]).code:
        raise InputError(
            f"{file} is not committed; workers get what is committed, so commit it first"
        )
    if changed := command.run_command(
        ["git", "-C", str(ROOT), "status", "--porcelain"]
    ).output.splitlines():
        raise InputError(
            f"{len(changed)} files differ from HEAD, {changed[0][3:]} among them; workers get what is committed, so commit or stash them"
        )
    job.file("").parent.mkdir(parents=True, exist_ok=True)
    if skip_plan:
        return
    code = subprocess.run(job.plan(), cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise InputError(
            f"gemma-encoder plan exited with {code}, see above; choose a larger --topology or a smaller batch, or leave the check out by --skip_plan"
        )


class NotDeleted(Exception):
    """Something is left that someone pays for."""


def run_launcher(launcher: Callable[[], int]) -> int:
    """Runs a launcher; whatever stops it becomes one line and an exit code."""
    try:
        return launcher()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except NotDeleted as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except command.Interrupted as interrupted:
        say(f"stopped by {interrupted}")
        return interrupted.exit_code


def say(text: str) -> None:
    """One line of the launcher's own, apart from the log that it streams."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def pack(job: Job) -> None:
    """Packs the committed code; raises InputError where git cannot."""
    if (packed := command.run_command(job.archive())).code:
        raise InputError(f"the code could not be packed: {packed.errors.strip()}")


def explain(job: Job, what: str) -> None:
    """Shows the log's last lines, and says where to look."""
    lines = job.file(".log").read_text(errors="replace").splitlines()[-command.TAIL :]
    print("\n".join(["", *lines, ""]), file=sys.stderr)
    say(
        f"failed while {what}; above are the last lines. Look at {job.file('.log')} and {job.workdir}/metrics.jsonl, and at the table in launch/README.md"
    )


def print_dry_run(steps: Sequence[Sequence[str]]) -> None:
    """Prints argument lists, one a line, quoted for a shell."""
    for step in steps:
        print(command.line(step))


def _check_checkout() -> None:
    """Raises InputError where the package was installed without its repository."""
    if not (ROOT / ".git").exists():
        raise InputError(
            f"{ROOT} is no git repository, and workers get what is committed; "
            "launch from a clone of the repository, installed by pip install --editable ."
        )


def _inside(path: str) -> str:
    """A config file's path relative to the repository; links into it, as of the package, are followed."""
    full = pathlib.Path(os.path.abspath(path))
    if not full.is_relative_to(ROOT) or full.is_relative_to(ROOT / "gemma_encoder"):
        full = full.resolve()
    if not full.is_relative_to(ROOT):
        raise InputError(
            f"--config={path} lies outside {ROOT}; workers get the repository, so put it there, e.g. under experiments/"
        )
    if not full.is_file():
        raise InputError(f"--config={path} does not exist")
    return str(full.relative_to(ROOT))


def _environment(texts: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(
                f"--env={text!r} cannot be used; expected NAME=VALUE, e.g. --env=TFDS_DATA_DIR=gs://bucket/tfds"
            )
        found[name] = value
    return found


def _check_paths(config: ml_collections.ConfigDict) -> None:
    """Refuses fields that name files of this machine."""
    for field in PATH_FIELDS:
        value = config
        for part in field.split("."):
            value = value.get(part, "")
        if value and os.path.exists(value):
            raise InputError(
                f"{field}={value} lies on this machine, where workers cannot read it; copy it to a bucket and write gs://BUCKET/…"
            )


def _check_readers(config: ml_collections.ConfigDict, hosts: int) -> None:
    """Every host takes as many readers; a run on too few would stop at its first step, on machines that are paid for."""
    if config.batch.readers % hosts:
        raise InputError(
            f"batch.readers={config.batch.readers} is not a multiple of the {hosts} hosts; write e.g. --config.batch.readers={hosts}"
        )
    if config.batch.rows % config.batch.readers:
        raise InputError(
            f"batch.rows={config.batch.rows} is not a multiple of batch.readers={config.batch.readers}"
        )
