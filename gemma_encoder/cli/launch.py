"""Trains on several processes of this machine, on Cloud TPU VMs, or on GKE.

    gemma-encoder launch local --processes=2 -- train --config=quickstart --workdir=runs/two
    gemma-encoder launch tpu_vm --config=msmarco:size=gemma2_9b --workdir=gs://BUCKET/RUN …
    gemma-encoder launch xpk --config=msmarco:size=gemma2_9b --workdir=gs://BUCKET/RUN …

  local     several processes on this machine
  tpu_vm    Cloud TPU VMs: created, set up, monitored, restarted after preemption, deleted
  xpk       Google Kubernetes Engine, through xpk

gemma-encoder launch LAUNCHER --help lists the options of a launcher; launch/README.md in the
repository is a guide from a cloud project to a running job.
"""

import importlib
import inspect
from collections.abc import Sequence

from gemma_encoder import terminal
from gemma_encoder.cli import commandline
from gemma_encoder.inputs.errors import unknown

LAUNCHERS = ("local", "tpu_vm", "xpk")


def main(argv: Sequence[str]) -> int:
    """Runs the launcher that the first argument names and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    launcher, arguments = (argv[0], argv[1:]) if argv else ("", [])
    if launcher in commandline.HELP:
        terminal.print_result(inspect.cleandoc(__doc__))
        return 0
    if launcher not in LAUNCHERS:
        terminal.print_one_line(f"error: {unknown('launcher', launcher, LAUNCHERS)}")
        return commandline.EXIT_BAD_INPUT
    return importlib.import_module(f"gemma_encoder.launch.{launcher}").main(arguments)
