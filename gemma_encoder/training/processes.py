"""The processes of a run: how they find each other, how a notice to stop reaches all of them at once."""

import glob
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.runtime import COORDINATOR, COUNT, NUMBER
from gemma_encoder.runtime import EXIT_PREEMPTED as EXIT_PREEMPTED


def start() -> None:
    """Joins the other processes of this run, if there are any; call it before JAX is used.

    They are found by the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, which `gemma-encoder launch local` sets, else by what JAX detects on TPU hosts and
    under Slurm.

    Raises:
        InputError: the variables are incomplete, or the others do not answer.
    """
    named = [name for name in (COORDINATOR, COUNT, NUMBER) if name in os.environ]
    detected = (
        glob.glob("/dev/accel*")
        or glob.glob("/dev/vfio/[0-9]*")
        or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    )
    if jax.distributed.is_initialized() or not (named or detected):
        return
    if named and len(named) < 3:
        raise InputError(
            f"of {COORDINATOR}, {COUNT} and {NUMBER} only {', '.join(named)} is set; set all three or none"
        )
    known = (
        {
            "coordinator_address": os.environ[COORDINATOR],
            "num_processes": int(os.environ[COUNT]),
            "process_id": int(os.environ[NUMBER]),
        }
        if named
        else {}
    )
    try:
        jax.distributed.initialize(**known)
    except RuntimeError as error:
        raise InputError(
            f"the processes of this run do not find each other: {str(error).splitlines()[0]}"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that speaks to people."""
    return jax.process_index() == 0


class Notice:
    """Whether this run was told to stop: SIGTERM, which is also how clouds announce that a machine will be taken.

    Use it as a context. Alone, the process asks its own signal handler; of several, whichever is told tells JAX's coordination
    service, and all agree on the moment, for which they must ask equally often.
    """

    def __init__(self):
        self._told, self._asked, self._before = threading.Event(), 0, None

    def __enter__(self) -> "Notice":
        if (
            not jax.distributed.is_initialized()
            and threading.current_thread() is threading.main_thread()
        ):
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told.set()

    def reached(self) -> bool:
        """Whether to stop now; the same answer on every process."""
        self._asked += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._told.is_set()
