"""A new Python process for every turn, timed from before it is started: for whatever happens once in a process.

python -m gemma_encoder.experiments.benchmarks.fresh MODULE:FUNCTION SETTINGS     (what `run` starts; SETTINGS is JSON, the result goes to stdout's last line)
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

MARK = "fresh-result: "


def run(
    function: str, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """What a function says in a process of its own, the seconds from before the process was started to the function's return, and its peak memory.

    Args:
        function: "module:function"; it is called with the settings and gives figures by name.
        settings: JSON-ready.
        environment: variables to set besides this process's own.

    Raises:
        RuntimeError: the process failed; with the end of what it wrote.
    """
    command = [sys.executable, "-m", __name__, function, json.dumps(dict(settings))]
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
    """An arm whose every turn is a process of its own.

    Args:
        function, settings, environment: as `run` takes them.
        turn_as: the setting under which the function gets the turn's number; None where it needs none.
    """
    return lambda turn: run(
        function, {**settings, **({turn_as: turn} if turn_as else {})}, environment
    )


def main(function: str, settings: str) -> None:
    """Calls the function, and says what it gave."""
    module, _, name = function.partition(":")
    result = dict(getattr(importlib.import_module(module), name)(**json.loads(settings)))
    result |= {
        "ended": time.time(),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(f"\n{MARK}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
