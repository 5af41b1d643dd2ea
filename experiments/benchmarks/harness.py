"""What every comparison does the same way: arms in processes of their own that take turns, warm-up apart, medians, a table, JSON.

An arm waits in a pipe while another one works: two frameworks in one process would disturb each other's threads and memory.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
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

Turn = Callable[
    [int], dict[str, float]
]  # does the work of turn n (inputs differ from turn to turn) and says what it saw


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of doing the work.

    Attributes:
        name: as the table shows it.
        setup: "module:function", called once in the arm's process with the settings; gives its `Turn`.
        settings: picklable.
        huge_pages: start its process as our programs start themselves on a CPU, see `gemma_encoder.runtime.use_huge_pages`.
    """

    name: str
    setup: str
    settings: Mapping[str, Any]
    huge_pages: bool = False


def take_turns(
    arms: Sequence[Arm], repeats: int, warmup: int = 1
) -> dict[str, list[dict[str, float]]]:
    """What each arm saw in each turn after warm-up, its own time ("seconds") and peak memory ("gib") included.

    Args:
        arms: worked on in this order, one after another, in every round.
        repeats: rounds that count.
        warmup: rounds before them.
    """
    context = multiprocessing.get_context("spawn")
    workers = []
    try:
        for arm in arms:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, arm), daemon=True)
            with _environment({"GLIBC_TUNABLES": runtime.HUGE_PAGES} if arm.huge_pages else {}):
                process.start()
            there.close()  # the process has its own: when that is gone, so is the process
            workers.append((arm, here, process))
            _receive(
                arm, here
            )  # one is set up after another: the memory of both setups never adds up
        seen: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
        for turn in range(warmup + repeats):
            for arm, here, _ in workers:
                here.send(turn)
                result = _receive(arm, here)
                if turn >= warmup:
                    seen[arm.name].append(result)
        return seen
    finally:
        for _, here, process in workers:
            here.close()
            process.join(10)
            process.kill()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What a process that is started meanwhile finds in its environment besides ours."""
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


def medians(seen: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """The median of each figure over an arm's turns, and the spread of its seconds: (largest - smallest) / median."""
    found = {}
    for name, turns in seen.items():
        found[name] = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        seconds = [turn["seconds"] for turn in turns]
        found[name]["spread"] = (max(seconds) - min(seconds)) / found[name]["seconds"]
    return found


def ratio(
    seen: Mapping[str, Sequence[Mapping[str, float]]], ours: str, peer: str, figure: str = "seconds"
) -> float:
    """How many times as fast as the peer: the median over rounds of the peer's figure by ours, both of the same round."""
    return statistics.median(
        theirs[figure] / mine[figure] for mine, theirs in zip(seen[ours], seen[peer], strict=True)
    )


def same(
    what: str, seen: Mapping[str, Sequence[Mapping[str, float]]], figure: str, tolerance: float
) -> float:
    """The largest difference of a figure between arms in the same round, relative to its size where that is above 1.

    Raises:
        SystemExit: it is above the tolerance, so that times would compare different work.
    """
    largest = 0.0
    for turns in zip(*seen.values(), strict=True):
        values = [turn[figure] for turn in turns]
        difference = (max(values) - min(values)) / max(1.0, *map(abs, values))
        if not difference <= tolerance:  # nor is one that is no number
            raise SystemExit(
                f"{what}: the arms do not compute the same: {figure} is {dict(zip(seen, values, strict=True))}"
            )
        largest = max(largest, difference)
    return largest


def missing(*names: str) -> str | None:
    """Why the peers' arms cannot run here: which distribution is not installed; None where all are."""
    absent = [name for name in names if not _installed(name)]
    return f"{', '.join(absent)} not installed: pip install -e .[bench]" if absent else None


def machine() -> str:
    """The machine and the versions that decide, in one line."""
    names = ("jax", "torch", "transformers", "sentence-transformers")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names if _installed(name)]
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {', '.join(versions)}, {time.strftime('%Y-%m-%d')}"


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def parser(doc: str, repeats: int = 5) -> argparse.ArgumentParser:
    """The flags that all subjects have."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--repeats", type=int, default=repeats, help="rounds that count; one more warms up"
    )
    made.add_argument("--json", type=pathlib.Path, help="file for the figures")
    return made


def publish(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    notes: Sequence[str] = (),
    file: pathlib.Path | None = None,
) -> None:
    """Prints a markdown table under the machine's line, and writes the same to a JSON file if one is named."""
    line = machine()
    print(f"{title}\n{line}\n")
    print(
        "\n".join(
            f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows)
        )
    )
    print("".join(f"\n{note}" for note in notes))
    if file:
        file.write_text(
            json.dumps(
                {
                    "title": title,
                    "machine": line,
                    "rows": [dict(zip(columns, row, strict=True)) for row in rows],
                    "notes": list(notes),
                },
                indent=1,
            )
        )


def add_device(made: argparse.ArgumentParser) -> None:
    """The flags of subjects that also run on a GPU: what both arms compute in, and where the peer's does."""
    made.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the activations"
    )
    made.add_argument(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="of the peer; ours takes what JAX finds",
    )


def data_file(variable: str, name: str) -> pathlib.Path:
    """A file in the folder that an environment variable names; SystemExit with one line where it is not there."""
    folder = os.environ.get(variable)
    if not folder or not (pathlib.Path(folder) / name).exists():
        raise SystemExit(
            f"{variable} must name a folder with {name}"
            + (f"; {folder} has none" if folder else "; it is not set")
        )
    return pathlib.Path(folder) / name
