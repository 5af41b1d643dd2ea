"""Stops commands by Ctrl-C or SIGTERM at random moments, and checks how they end.

    python -m gemma_encoder.experiments.benchmarks.stops --stops=40 --folder=/tmp/stops

Each command is started `--stops` times per signal and gets it between 50 ms after its start and the
time it needs. It must end with one line and the signal's exit code, or have finished; temporary
files must not remain, and the command must work afterwards.
"""

import argparse
import collections
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from gemma_encoder import stopping
from gemma_encoder.inputs.json_text import to_json

EARLIEST = 0.05  # seconds after the start: before, Python has not yet started
NOISE = ("Traceback", "Exception ignored", "Fatal", "terminate called", "Error")
PREEMPTED = "preempted: saving step"
TRAIN = ("--config=quickstart:smoke",)
# "finished": the signal came while Python was exiting.
RIGHT = ("one line", "finished", "saved", "over before")
LONGEST_EXIT = 2.0  # seconds


class Command(NamedTuple):
    """A command to stop.

    Attributes:
        arguments: its arguments.
        fresh: paths to remove before each start.
    """

    arguments: tuple[str, ...]
    fresh: tuple[str, ...] = ()


COMMANDS = {
    "train": Command(("train", *TRAIN, "--workdir=new"), ("new",)),
    "resume": Command(("train", *TRAIN, "--config.train_for=2000 steps", "--workdir=long")),
    "evaluate": Command(("evaluate", *TRAIN, "--workdir=run")),
    "predict": Command(
        ("predict", "--workdir=run", "--task=toy_sentiment", "--input=texts.txt", "--output=o.csv"),
        ("o.csv",),
    ),
    "predict to stdout": Command(
        ("predict", "--workdir=run", "--task=toy_sentiment", "--input=texts.txt")
    ),
    "report": Command(("report", "run", "--output=report.html"), ("report.html",)),
    "export": Command(("export", "--workdir=run", "--output=out", "--heads=false"), ("out",)),
    "inspect": Command(("inspect", "--task=toy_sentiment")),
    "inspect a checkpoint": Command(("inspect", "run")),
    "submit check": Command(("submit", "check", "absent.zip")),
    "help": Command(("--help",)),
}
ENDLESS = {"resume"}  # longer than it takes to stop


def popen(command: Command, folder: pathlib.Path) -> subprocess.Popen:
    """Starts a command in a folder, which holds its temporary files, too."""
    for name in command.fresh:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "gemma_encoder", *command.arguments],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder / "tmp")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(code: int, errors: str, signum: int, usual: int) -> str:
    """Names how a command ended.

    Args:
        code: its exit code.
        errors: what it wrote to stderr.
        signum: the signal that it got.
        usual: its exit code without a signal.
    """
    lines = errors.splitlines()
    if code == -signum or "<frozen site>" in errors or "runpy" in errors:
        return "before the program"
    if any(noise in errors for noise in NOISE):
        return "noise"
    if code == stopping.CODES[signum] and lines[-1:] == [stopping.LINES[signum]]:
        return "one line" if lines.count(lines[-1]) == 1 else "several lines"
    if code == stopping.EXIT_PREEMPTED and lines and lines[-1].startswith(PREEMPTED):
        return "saved"
    return "finished" if code == usual else f"exit code {code}"


def leftovers(folder: pathlib.Path) -> list[str]:
    """Returns the temporary files in a folder.

    The file of a lock is none: where a process ends at once it stays, as after `kill -9`, but the
    lock itself does not.
    """
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.parent.name == "tmp" or path.name.endswith(".tmp")
    )


def stop_repeatedly(
    name: str, folder: pathlib.Path, stops: int, rng: random.Random
) -> collections.Counter:
    """Stops a command at random moments and counts the outcomes by signal."""
    command = COMMANDS[name]
    began = time.monotonic()
    seconds, usual = 12.0, 0
    if name not in ENDLESS:
        process = popen(command, folder)
        process.communicate()
        seconds, usual = time.monotonic() - began, process.returncode
    counts: collections.Counter = collections.Counter()
    for index in range(2 * stops):
        signum = (signal.SIGINT, signal.SIGTERM)[index % 2]
        moment = rng.uniform(EARLIEST, seconds)
        process = popen(command, folder)
        time.sleep(moment)
        if process.poll() is not None:
            process.communicate()
            counts["over before"] += 1
            continue
        process.send_signal(signum)
        stopped = time.monotonic()
        _, errors = process.communicate()
        waited = time.monotonic() - stopped
        result = outcome(process.returncode, errors, signum, usual)
        if result == "finished" and waited > LONGEST_EXIT:
            result = "not stopped"
        counts[result] += 1
        if remains := leftovers(folder):
            counts["with temporary files"] += 1
        if result not in RIGHT or waited > 5:
            label = f"{name}, {signal.Signals(signum).name} at {moment:.2f} s"
            print(f"{label}: {result}, after {waited:.1f} s, {remains}\n{errors}", flush=True)
        elif remains:
            print(f"{name}: {remains} remain", flush=True)
    if name not in ENDLESS:
        process = popen(command, folder)
        _, errors = process.communicate()
        if process.returncode != usual:
            counts["does not work afterwards"] += 1
            print(f"{name} afterwards: exit code {process.returncode}\n{errors}", flush=True)
    print(f"{name}, {seconds:.1f} s: {dict(counts)}", flush=True)
    return counts


def main() -> None:
    """Stops all commands and prints the counts; exits with code 1 if one did not end right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=40, help="per command and signal")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a folder to create")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    (args.folder / "tmp").mkdir(parents=True)
    (args.folder / "texts.txt").write_text("".join(f"a fine film {i}\n" for i in range(20000)))
    process = popen(Command(("train", *TRAIN, "--workdir=run")), args.folder)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(errors)
    rng = random.Random(args.seed)
    result = {
        name: stop_repeatedly(name, args.folder, args.stops, rng)
        for name in args.commands.split(",")
    }
    print(to_json(result))
    if args.json:
        args.json.write_text(to_json(result, indent=1), encoding="utf-8")
    sys.exit(0 if all(set(counts) <= {*RIGHT} for counts in result.values()) else 1)


if __name__ == "__main__":
    main()
