"""Fuzzes the files that the library writes, for longer than the tests do.

    python -m tests.fuzz --count=10000           make fuzz
    python -m tests.fuzz --seed=1234             make fuzz SEED=1234: repeats one case

Workers run the cases, so that a crash of a library is a case, too, and not the end.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

from tests.fuzz.cases import Case, Fuzzer, kinds_of_faults, limit_memory, schedule, table

ORIGINALS = pathlib.Path(__file__).resolve().parent.parent.parent / ".fuzz"
SILENCE = 180  # seconds without a line after which a worker hangs
# Must be set before JAX and TensorFlow are imported; see tests/conftest.py.
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PLATFORMS": "cpu",
}
NO_TARGET = "?"  # of a worker that ended before it damaged anything
CHUNK = 50  # cases that a worker is given at a time


def main() -> int:
    """Runs the program and returns its exit code: 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--seed", type=int, help="run this case only")
    parser.add_argument("--targets", default="", help="only targets whose names begin so")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument(
        "--originals",
        type=pathlib.Path,
        help="folder of the whole files, which are made if it does not exist; by default .fuzz, "
        "which is made anew except for --seed, since the names of some files are random",
    )
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    if options.worker:
        return work(options.originals, options.worker)
    seeds: Iterable[int] = itertools.count(options.first)
    if options.seed is not None:
        seeds = [options.seed]
    elif options.targets:
        from tests.fuzz.targets import targets

        order = schedule(targets(pathlib.Path()))
        seeds = (s for s in seeds if order[s % len(order)].name.startswith(options.targets))
    seeds = list(itertools.islice(seeds, options.count))
    if options.originals is None:
        options.originals = ORIGINALS
        if options.seed is None:
            shutil.rmtree(ORIGINALS, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        return fuzz(options, seeds, pathlib.Path(folder))


def work(root: pathlib.Path, scratch: pathlib.Path) -> int:
    """Runs the cases whose seeds are on stdin; prints each, as JSON, before and after it."""
    from tests.fuzz import doors, originals
    from tests.fuzz.targets import targets

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    scratch.mkdir(parents=True, exist_ok=True)
    with originals.small_files(), doors.compiled_once():
        fuzzer = Fuzzer(targets(root), root, scratch)
        limit_memory()
        for line in sys.stdin:
            case = fuzzer.run(int(line), lambda case: _send(case, answers))
            _send(case, answers)
    return 0


def _send(case: Case, file: IO[str]) -> None:
    print(json.dumps(vars(case)), file=file, flush=True)


def fuzz(options: argparse.Namespace, seeds: Sequence[int], folder: pathlib.Path) -> int:
    """Runs all cases and prints faults, as they come, and the table."""
    root = options.originals.absolute()
    began = time.monotonic()
    if not (root / "complete").exists():
        shutil.rmtree(root, ignore_errors=True)
        code = "import pathlib, sys; from tests.fuzz import originals;"
        code += "originals.make(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, root], check=True)
        print(f"made the originals in {time.monotonic() - began:.0f} s", flush=True)
    began = time.monotonic()
    cases = []
    for case in run_in_workers(options, seeds, root, folder):
        cases.append(case)
        if case.is_fault or len(seeds) == 1:
            print(case, flush=True)
        if len(cases) % 1000 == 0:
            print(f"{len(cases)} cases, {time.monotonic() - began:.0f} s", flush=True)
    faults = kinds_of_faults(cases)
    if faults:
        print(f"\nfaults by kind, {len(faults)}:")
        print("\n".join(faults))
    print(f"\n{table(cases)}\n{len(cases)} cases in {time.monotonic() - began:.0f} s")
    return int(any(case.is_fault for case in cases))


def run_in_workers(
    options: argparse.Namespace, seeds: Sequence[int], root: pathlib.Path, folder: pathlib.Path
) -> Iterator:
    """Yields the cases of all seeds, as workers finish them."""
    todo: queue.Queue = queue.Queue()
    for start in range(0, len(seeds), CHUNK):
        todo.put(seeds[start : start + CHUNK])
    results: queue.Queue = queue.Queue()
    workers = [
        threading.Thread(
            target=_manage, args=(options, todo, results, root, folder / f"{index}"), daemon=True
        )
        for index in range(min(options.workers, todo.qsize()))
    ]
    for worker in workers:
        worker.start()
    for _ in range(len(seeds)):
        while True:
            try:
                case = results.get(timeout=5)
                break
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers):
                    raise RuntimeError("all workers ended") from None
        if isinstance(case, Exception):
            raise case
        yield case


def _manage(
    options: argparse.Namespace,
    todo: queue.Queue,
    results: queue.Queue,
    root: pathlib.Path,
    scratch: pathlib.Path,
) -> None:
    """Gives seeds to one worker, and starts another one if it dies or hangs."""
    process = None
    while True:
        try:
            seeds = todo.get_nowait()
        except queue.Empty:
            break
        while seeds:
            process = process or _start(options, root, scratch)
            case = _run(process, seeds[0])
            if case.outcome in ("crash", "hang"):
                process.kill()
                process.wait()
                process = None
            if case.target == NO_TARGET:
                log = scratch.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
                results.put(RuntimeError(f"whole files cannot be read:\n{log[-3000:]}"))
                return
            results.put(case)
            seeds = seeds[1:]
    if process is not None:
        process.stdin.close()
        process.wait()


def _start(
    options: argparse.Namespace, root: pathlib.Path, scratch: pathlib.Path
) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.fuzz", f"--worker={scratch}"]
    command += [f"--originals={root}"]
    pipe = subprocess.PIPE
    with scratch.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, bufsize=0)


def _run(process: subprocess.Popen, seed: int) -> Case:
    """Lets a worker run one case; it answers twice, before and after."""
    with contextlib.suppress(BrokenPipeError):  # it has ended, and does not answer either
        process.stdin.write(f"{seed}\n".encode())
    case = Case(seed, NO_TARGET, "", "", "crash")
    for _ in range(2):
        ready, _, _ = select.select([process.stdout], [], [], SILENCE)
        if not ready:
            return dataclasses.replace(case, outcome="hang", detail="in a library")
        line = process.stdout.readline()
        if not line:
            return dataclasses.replace(case, outcome="crash", detail="the process ended")
        case = Case(**json.loads(line))
    return case


if __name__ == "__main__":
    sys.exit(main())
