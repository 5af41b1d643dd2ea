"""Multi-process runs: initialization, joint decisions, the preemption signal."""

import contextlib
import glob
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.runtime import COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID
from gemma_encoder.runtime import EXIT_PREEMPTED as EXIT_PREEMPTED


def initialize() -> None:
    """Connects to the other processes of this run, if any; call it before JAX is used.

    Processes are found by the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, which `gemma-encoder launch local` sets, or else by JAX's own detection on TPU
    hosts and under Slurm.

    Raises:
        InputError: the variables are incomplete, or the other processes do not respond.
    """
    variables = (COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID)
    present = [name for name in variables if name in os.environ]
    detected = (
        glob.glob("/dev/accel*")
        or glob.glob("/dev/vfio/[0-9]*")
        or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    )
    if jax.distributed.is_initialized() or not (present or detected):
        return
    if present and len(present) < len(variables):
        raise InputError(
            f"of {COORDINATOR_ADDRESS}, {NUM_PROCESSES} and {PROCESS_ID} "
            f"only {', '.join(present)} is set; set all three or none"
        )
    arguments = {}
    if present:
        arguments = {
            "coordinator_address": os.environ[COORDINATOR_ADDRESS],
            "num_processes": int(os.environ[NUM_PROCESSES]),
            "process_id": int(os.environ[PROCESS_ID]),
        }
    try:
        jax.distributed.initialize(**arguments)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the processes of this run cannot connect: {reason}") from error


def is_main_process() -> bool:
    """Returns True on the process that writes files and prints messages."""
    return jax.process_index() == 0


def decided_by_main(answer: bool) -> bool:
    """Returns the main process's answer, on every process."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def any_process(answer: bool) -> bool:
    """Returns True, on every process, if the answer of any process is True."""
    if jax.process_count() == 1:
        return answer
    return bool(np.any(multihost_utils.process_allgather(np.array(answer))))


def process_share() -> tuple[int, int]:
    """Returns the index of this process and the number of all."""
    return jax.process_index(), jax.process_count()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Makes all processes leave the context with an error if it fails on any of them.

    Every process must enter it.

    Raises:
        InputError: the context failed on another process, whose message tells why.
    """
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):  # the others may have ended already
            any_process(True)
        raise
    if any_process(False):
        raise InputError("another process of this run failed; see its message")


class PreemptionSignal:
    """Preemption signal: SIGTERM, which cloud providers send before they reclaim a machine.

    Use it as a context manager. A single process has its own signal handler. With several
    processes, a process that gets the signal notifies JAX's coordination service, and all agree on
    the step to stop at; for that, all must call `reached` equally often.

    A signal after the last call of `reached` is passed on at the end to the handler that was set
    before, which `stopping` sets in a program.
    """

    def __init__(self):
        self._received = threading.Event()
        self._calls = 0
        self._is_answered = False
        self._former_handler = None

    def __enter__(self) -> "PreemptionSignal":
        if (
            not jax.distributed.is_initialized()
            and threading.current_thread() is threading.main_thread()
        ):
            self._former_handler = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        if self._former_handler is None:
            return
        signal.signal(signal.SIGTERM, self._former_handler)
        if self._received.is_set() and not self._is_answered and callable(self._former_handler):
            signal.raise_signal(signal.SIGTERM)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received.set()

    def reached(self) -> bool:
        """Returns True if the run should stop now; the answer is the same on every process."""
        self._calls += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        self._is_answered = self._received.is_set()
        return self._is_answered
