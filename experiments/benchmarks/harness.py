"""Shared by all comparisons: arms that take turns in separate processes, medians, tables, JSON.

An arm waits on a pipe while another arm works. Two frameworks in one process would disturb each
other's threads and memory. Warm-up turns are not counted.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gemma_encoder import runtime
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.whole_files import write_whole

# Does the work of turn n, with inputs that differ from turn to turn, and returns its figures.
Turn = Callable[[int], dict[str, float]]
# The figures of each counted turn, by arm.
Results = Mapping[str, Sequence[Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of doing the work.

    Attributes:
        name: name shown in the table.
        setup: "module:function", called once in the arm's process with the settings; returns the
            arm's `Turn`.
        settings: keyword arguments of the function; picklable.
        huge_pages: whether to start the process with huge pages, as our programs start on a CPU;
            see `gemma_encoder.runtime.use_huge_pages`.
    """

    name: str
    setup: str
    settings: Mapping[str, Any]
    huge_pages: bool = False


def take_turns(
    arms: Sequence[Arm], repeats: int, warmup: int = 1
) -> dict[str, list[dict[str, float]]]:
    """Runs the arms round by round and returns the figures of each counted turn, by arm.

    The figures include the turn's time in seconds ("seconds") and its process's peak memory in GiB
    ("gib").

    Args:
        arms: run one after another, in this order, in every round.
        repeats: rounds that are counted.
        warmup: rounds before them that are not.

    Raises:
        RuntimeError: an arm failed, with its traceback, or its process died.
    """
    context = multiprocessing.get_context("spawn")
    workers = []
    try:
        for arm in arms:
            connection, process = _start(context, arm)
            workers.append((arm, connection, process))
            # Setups follow each other, so that their memory never adds up.
            _receive(arm, connection)
        results: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
        for turn in range(warmup + repeats):
            for arm, connection, _ in workers:
                connection.send(turn)
                result = _receive(arm, connection)
                if turn >= warmup:
                    results[arm.name].append(result)
        return results
    finally:
        for _, connection, process in workers:
            connection.close()
            process.join(10)
            process.kill()


def _start(context, arm: Arm) -> tuple[Any, Any]:
    """Starts the process of an arm; returns our end of its pipe, and the process."""
    connection, worker_connection = context.Pipe()
    process = context.Process(target=_serve, args=(worker_connection, arm), daemon=True)
    variables = {"GLIBC_TUNABLES": runtime.HUGE_PAGES} if arm.huge_pages else {}
    with _environment(variables):
        process.start()
    # The process has its own copy: closing ours makes the pipe end when the process dies.
    worker_connection.close()
    return connection, process


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for processes that are started inside the context."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _receive(arm: Arm, pipe) -> dict[str, float]:
    try:
        result = pipe.recv()
    except EOFError:
        raise RuntimeError(f"{arm.name}: its process died") from None
    if isinstance(result, str):
        raise RuntimeError(f"{arm.name}:\n{result}")
    return result


def _serve(pipe, arm: Arm) -> None:
    """Sets an arm up and answers each turn that is received with its figures."""
    try:
        module, _, function = arm.setup.partition(":")
        run = getattr(importlib.import_module(module), function)(**arm.settings)
        pipe.send({})
        while True:
            turn = pipe.recv()
            began = time.perf_counter()
            result = dict(run(turn))
            result.setdefault("seconds", time.perf_counter() - began)
            pipe.send({"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20} | result)
    except EOFError:
        pass
    except Exception:
        pipe.send(traceback.format_exc())


def medians(results: Results) -> dict[str, dict[str, float]]:
    """Returns the median of each figure over an arm's turns, by arm.

    Adds "spread": (largest - smallest) / median of the arm's seconds.
    """
    by_arm = {}
    for name, turns in results.items():
        figures = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        seconds = [turn["seconds"] for turn in turns]
        figures["spread"] = (max(seconds) - min(seconds)) / figures["seconds"]
        by_arm[name] = figures
    return by_arm


def ratio(results: Results, ours: str, peer: str, figure: str = "seconds") -> float:
    """Returns the median over rounds of the peer's figure / ours, both from the same round.

    For seconds this is the speedup over the peer.
    """
    return statistics.median(
        theirs[figure] / mine[figure]
        for mine, theirs in zip(results[ours], results[peer], strict=True)
    )


def same(subject: str, results: Results, figure: str, tolerance: float) -> float:
    """Returns the largest difference of a figure between arms in the same round.

    Differences are relative to the figure's size where that is above 1.

    Raises:
        SystemExit: the difference exceeds the tolerance, so times would compare different work.
    """
    largest = 0.0
    for turns in zip(*results.values(), strict=True):
        values = [turn[figure] for turn in turns]
        difference = (max(values) - min(values)) / max(1.0, *map(abs, values))
        if not difference <= tolerance:  # also true for NaN
            by_arm = dict(zip(results, values, strict=True))
            raise SystemExit(f"{subject}: the arms do not compute the same: {figure} is {by_arm}")
        largest = max(largest, difference)
    return largest


def fastest(figures: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> str | None:
    """Returns the arm among `names` with the least median seconds; None if there are no names."""
    return min(names, key=lambda name: figures[name]["seconds"], default=None)


def missing(*names: str) -> str | None:
    """Returns the reason why the peers' arms cannot run here; None if all `names` are installed."""
    absent = [name for name in names if not _installed(name)]
    return f"{', '.join(absent)} not installed: pip install -e .[bench]" if absent else None


def machine() -> str:
    """Returns the machine, the versions that matter and the date, in one line."""
    names = ("jax", "torch", "transformers", "sentence-transformers")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names if _installed(name)]
    parts = [
        f"{os.cpu_count()} cores",
        platform.machine(),
        f"Python {platform.python_version()}",
        ", ".join(versions),
        time.strftime("%Y-%m-%d"),
    ]
    return ", ".join(parts)


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def process_memory(field: str) -> int:
    """Returns a memory field of /proc/self/status in bytes, e.g. VmRSS, VmHWM or RssAnon."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def parser(doc: str, repeats: int = 5) -> argparse.ArgumentParser:
    """Returns a parser with the flags that all comparisons have."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--repeats", type=int, default=repeats, help="counted rounds, after one that warms up"
    )
    made.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    return made


def add_device(made: argparse.ArgumentParser) -> None:
    """Adds the flags of comparisons that also run on a GPU: dtype, and the peer's device."""
    made.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of activations"
    )
    made.add_argument(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="device of the peer; ours runs on JAX's default device",
    )


def integers(text: str) -> list[int]:
    """Parses the value of a flag: whole numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def publish(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    notes: Sequence[str] = (),
    file: pathlib.Path | None = None,
) -> None:
    """Prints a Markdown table below the machine's line, and writes it to a JSON file, if given."""
    line = machine()
    print(f"{title}\n{line}\n")
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(map(str, row))} |")
    print("".join(f"\n{note}" for note in notes))
    if file:
        table = {
            "title": title,
            "machine": line,
            "rows": [dict(zip(columns, row, strict=True)) for row in rows],
            "notes": list(notes),
        }
        write_whole(file, to_json(table, indent=1))


def data_file(variable: str, name: str) -> pathlib.Path:
    """Returns a file in the folder that an environment variable names.

    Raises:
        SystemExit: the variable is not set, or the folder has no such file.
    """
    folder = os.environ.get(variable)
    if not folder or not (pathlib.Path(folder) / name).exists():
        problem = f"{folder} has none" if folder else "it is not set"
        raise SystemExit(f"{variable} must name a folder with {name}; {problem}")
    return pathlib.Path(folder) / name
