"""The processes of a run: joining, agreeing, the preemption signal."""

import glob
import os
import signal
import threading
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.runtime import COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID
from gemma_encoder.runtime import EXIT_PREEMPTED as EXIT_PREEMPTED


def initialize() -> None:
    """Joins the other processes of this run, if there are any; call it before JAX is used.

    They are found by the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, which `gemma-encoder launch local` sets, else by what JAX detects on TPU hosts
    and under Slurm.

    Raises:
        InputError: the variables are incomplete, or the others do not answer.
    """
    named = [
        name for name in (COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID) if name in os.environ
    ]
    detected = (
        glob.glob("/dev/accel*")
        or glob.glob("/dev/vfio/[0-9]*")
        or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    )
    if jax.distributed.is_initialized() or not (named or detected):
        return
    if named and len(named) < 3:
        raise InputError(
            f"of {COORDINATOR_ADDRESS}, {NUM_PROCESSES} and {PROCESS_ID} only {', '.join(named)} is set; "
            "set all three or none"
        )
    arguments = (
        {
            "coordinator_address": os.environ[COORDINATOR_ADDRESS],
            "num_processes": int(os.environ[NUM_PROCESSES]),
            "process_id": int(os.environ[PROCESS_ID]),
        }
        if named
        else {}
    )
    try:
        jax.distributed.initialize(**arguments)
    except RuntimeError as error:
        raise InputError(
            f"the processes of this run do not find each other: {str(error).splitlines()[0]}"
        ) from error


def is_main_process() -> bool:
    """Whether this process is the one that writes files and speaks to people."""
    return jax.process_index() == 0


def decided_by_main(answer: bool) -> bool:
    """The main process's answer, on every process."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def any_process(answer: bool) -> bool:
    """Whether the answer is yes on any process."""
    if jax.process_count() == 1:
        return answer
    return bool(np.any(multihost_utils.process_allgather(np.array(answer))))


class PreemptionSignal:
    """Preemption signal: SIGTERM, which cloud providers send before they reclaim a machine.

    Use it as a context. A single process asks its own signal handler. Of several, whichever gets
    the signal tells JAX's coordination service, and all agree on the step, for which they must
    ask equally often.
    """

    def __init__(self):
        self._received, self._asked, self._handler = threading.Event(), 0, None

    def __enter__(self) -> "PreemptionSignal":
        if (
            not jax.distributed.is_initialized()
            and threading.current_thread() is threading.main_thread()
        ):
            self._handler = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received.set()

    def reached(self) -> bool:
        """Whether to stop now; the same answer on every process."""
        self._asked += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._received.is_set()
