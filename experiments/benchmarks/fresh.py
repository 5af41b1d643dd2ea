"""Runs a function in a new Python process and times it from before the process starts.

For costs that occur once per process. `run` starts this module as a program:

    python -m gemma_encoder.experiments.benchmarks.fresh MODULE:FUNCTION SETTINGS

SETTINGS is JSON; the result is the last line of stdout.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from gemma_encoder.experiments.benchmarks import harness
from gemma_encoder.inputs.json_text import to_json

MARK = "fresh-result: "


def run(
    function: str, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Calls a function in a process of its own and returns its figures, time and peak memory.

    "seconds" are from before the process started to the function's return; "gib" is the process's
    peak memory in GiB.

    Args:
        function: "module:function"; called with the settings, returns figures by name.
        settings: keyword arguments, JSON-serializable.
        environment: variables to set in addition to this process's own.

    Raises:
        RuntimeError: the process failed; with the end of its output.
    """
    command = [sys.executable, "-m", __name__, function, to_json(dict(settings))]
    began = time.time()
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(
            f"{function} exited with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        )
    result = json.loads(lines[-1].removeprefix(MARK))
    return {"seconds": result.pop("ended") - began, **result}


def turns(
    function: str,
    settings: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    turn_as: str | None = None,
) -> harness.Turn:
    """Returns an arm that starts a process for each turn.

    Args:
        function, settings, environment: see `run`.
        turn_as: keyword under which the function receives the index of the turn; None to omit it.
    """

    def run_turn(turn: int) -> dict[str, float]:
        index = {turn_as: turn} if turn_as else {}
        return run(function, {**settings, **index}, environment)

    return run_turn


def main(function: str, settings: str) -> None:
    """Calls the function and prints its result with the time and the peak memory."""
    module, _, name = function.partition(":")
    result = dict(getattr(importlib.import_module(module), name)(**json.loads(settings)))
    result |= {
        "ended": time.time(),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(f"\n{MARK}{to_json(result)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
