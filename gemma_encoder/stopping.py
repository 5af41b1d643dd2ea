"""Ctrl-C and SIGTERM: one line on stderr and an exit code, at any moment of a program.

    from gemma_encoder import stopping

    stopping.start()  # the first statement of a program, before its other imports
    ...
    sys.exit(stopping.run(main))

In `main`, a signal raises KeyboardInterrupt or Terminated, so that files are closed, temporary ones
removed and background writes awaited. During an import, or outside of `main`, it ends the program
at once: libraries turn exceptions of their imports into others, and nothing is being written. So
does a second signal, an exception that is lost in a callback, and a program that does not stop in
time. Files are whole in any case, as after `kill -9`.

Importing this module is fast: it imports only what Python has imported itself.
"""

import _thread
import atexit
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from types import CodeType, FrameType

EXIT_INTERRUPTED = 130  # as shells report SIGINT
# Exit code of a program that was told to end, with its work saved: rerun it to resume (EX_TEMPFAIL
# of sysexits.h).
EXIT_PREEMPTED = 75
CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_PREEMPTED}
LINES = {
    signal.SIGINT: "interrupted; rerun the command to resume from saved work",
    signal.SIGTERM: "terminated; rerun the command to resume from saved work",
}

# Seconds after which a program that was told to stop ends in any case: if native code does not let
# Python handle the signal, while it cleans up, and while exit functions of libraries run.
LONGEST_NATIVE_CALL = 3.0
LONGEST_CLEANUP = 30.0
LONGEST_EXIT = 5.0


class Terminated(BaseException):
    """SIGTERM was received. Like KeyboardInterrupt, it is not caught by `except Exception`."""


class _State:
    """State of this process.

    Attributes:
        is_started: `start` was called.
        program: the code of the function that `run` runs; None before and after.
        exit_code: the exit code of a program that has ended by itself.
        signum: the first signal to stop; None before.
        in_bar: a progress bar was shown when the signal came, so that the line starts anew.
        is_ending: `_end` has begun.
        is_reported: the line was written.
        lock: held by the thread that ends the program.
        stderr: a copy of the file descriptor of stderr, which stays when that is redirected.
    """

    is_started = False
    program: CodeType | None = None
    exit_code: int | None = None
    signum: int | None = None
    in_bar = False
    is_ending = False
    is_reported = False
    lock = _thread.allocate_lock()
    stderr = 2


_state = _State()


def start() -> None:
    """Handles SIGINT and SIGTERM in this process, and opens its standard streams if closed.

    A signal that the parent process ignores stays ignored, as after `nohup`.
    """
    if _state.is_started:
        return
    _state.is_started = True
    for signum in CODES:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _receive)
    _open_streams()
    _state.stderr = os.dup(2)
    sys.unraisablehook = _end_if_stop_was_lost
    os.register_at_fork(before=_hold, after_in_parent=_unhold, after_in_child=_forget)
    atexit.register(_leave)  # registered first, hence called last
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Signals must reach the main thread, or wait for it when it replaces the process: `held`.
    signal.pthread_sigmask(signal.SIG_BLOCK, CODES)
    _thread.start_new_thread(_watch, (reader,))
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)


def run(program: Callable[[], int]) -> int:
    """Runs a program and returns its exit code; if it is stopped, ends the process instead."""
    _state.program = program.__code__
    try:
        code = program()
    except SystemExit as stop:
        _end_if_stopped()
        if isinstance(stop.code, str):
            raise
        code = stop.code or 0
    except BaseException:
        _end_if_stopped()
        raise
    _end_if_stopped()
    _state.exit_code = code
    return code


def is_requested() -> bool:
    """Returns True once the program was told to stop."""
    return _state.signum is not None


def hold_signals() -> None:
    """Blocks signals, if `start` handles them, until `release_signals` or the next `start`.

    For a process that replaces itself: the signals then reach the new program.
    """
    if _state.is_started:
        signal.pthread_sigmask(signal.SIG_BLOCK, CODES)


def release_signals() -> None:
    """Handles the signals that came since `hold_signals`."""
    if _state.is_started:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)


def _receive(signum: int, frame: FrameType | None) -> None:
    """Handles a signal, on the main thread."""
    if _state.exit_code is not None:  # the program has ended: skip what is left of the exit
        os._exit(_state.exit_code)
    if _state.is_reported:
        os._exit(CODES[_state.signum])
    if _state.is_ending:
        return
    if _state.signum is not None:
        _end()
    _begin_to_stop(signum)
    if not _may_raise(frame):
        _end()
    raise KeyboardInterrupt if signum == signal.SIGINT else Terminated


def _may_raise(frame: FrameType | None) -> bool:
    """Returns True if an exception in this frame reaches `run`, and no import is in progress."""
    while frame is not None and frame.f_code is not _state.program:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return False
        frame = frame.f_back
    return frame is not None


def _begin_to_stop(signum: int) -> None:
    """Notes the signal, and drops what is written to stderr from now on, except for the line."""
    _state.signum = signum
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    try:
        _state.in_bar = len(bars) > 0 and os.isatty(_state.stderr)
        sys.stderr.flush()
    except Exception:  # such as a write that this signal has interrupted
        pass
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
    except OSError:  # no descriptors are left
        pass


def _end_if_stopped() -> None:
    """Ends the process if it was told to stop, whatever the program has made of that."""
    if _state.signum is not None:
        _end(is_clean=True)


def _end(*, is_clean: bool = False) -> None:
    """Writes the line and ends the process; does not return.

    Args:
        is_clean: the main thread has left the program: output is flushed, and the exit functions of
            libraries are called. Nothing else of Python's exit is done, where threads of libraries
            end in errors and aborts.
    """
    while not _state.lock.acquire(blocking=False):
        time.sleep(1)  # another thread ends the process
    _state.is_ending = True
    code = CODES[_state.signum]
    _thread.start_new_thread(_exit_after, (LONGEST_EXIT, code))
    if os.environ.get("JAX_PROCESS_ID", "0") == "0":  # one line for all processes of a run
        _write_line()
    _state.is_reported = True
    try:
        if is_clean:
            sys.stdout.flush()
            atexit._run_exitfuncs()
    except Exception:  # the reader of stdout has exited, too
        pass
    finally:
        os._exit(code)


def _write_line() -> None:
    line = f"{LINES[_state.signum]}\n"
    try:
        os.write(_state.stderr, (f"\n{line}" if _state.in_bar else line).encode())
    except OSError:  # its reader has exited, or it is full
        return


def _exit_after(seconds: float, code: int) -> None:
    time.sleep(seconds)
    os._exit(code)


def _watch(reader: int) -> None:
    """Reads the signals on a thread, and sees to it that the program stops."""
    first = None
    while True:
        for signum in os.read(reader, 64):
            if signum not in CODES or signal.getsignal(signum) is not _receive:
                continue  # another part of the program handles it
            if first is None:
                first = signum
                _thread.start_new_thread(_enforce, (signum,))
            elif _state.exit_code is not None:
                os._exit(_state.exit_code)
            elif _state.is_reported:
                os._exit(CODES[_state.signum])
            elif not _state.is_ending:
                if _state.signum is None:
                    _begin_to_stop(first)
                _end()


def _enforce(signum: int) -> None:
    """Ends the program if it does not stop by itself."""
    time.sleep(LONGEST_NATIVE_CALL)
    if _state.exit_code is not None or signal.getsignal(signum) is not _receive:
        return
    if _state.signum is None:
        _begin_to_stop(signum)
        _end()
    time.sleep(LONGEST_CLEANUP)
    _end()


def _end_if_stop_was_lost(unraisable: "sys.UnraisableHookArgs") -> None:
    """Ends the program if its exception was raised in a callback, where Python drops it."""
    if _state.signum is None:
        sys.__unraisablehook__(unraisable)
    elif issubclass(unraisable.exc_type, KeyboardInterrupt | Terminated):
        _end()


def _leave() -> None:
    """Ends a program after its exit functions, without removing Python's modules one by one.

    That takes a second with large libraries, in which handlers of signals are no longer called.
    """
    for signum in CODES:
        signal.signal(signum, signal.SIG_IGN)
    if _state.exit_code is None or not isinstance(_state.exit_code, int):
        return  # with a traceback
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # Python reports it
            return
    os._exit(_state.exit_code)


_masks: dict[int, set[int]] = {}  # of threads that are forking a process


def _hold() -> None:
    _masks[_thread.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, CODES)


def _unhold() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop(_thread.get_ident()))


def _forget() -> None:
    """Lets signals end a forked process, whose copy of the pipe would wake this one."""
    signal.set_wakeup_fd(-1)
    for signum in CODES:
        if signal.getsignal(signum) is _receive:
            signal.signal(signum, signal.SIG_DFL)
    sys.unraisablehook = sys.__unraisablehook__
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)


class _LenientFile(io.FileIO):
    """File whose write errors are ignored: messages must not end a program."""

    def write(self, content: bytes) -> int:
        try:
            written = super().write(content)
        except OSError:  # closed by its reader, or full
            written = None
        return len(content) if written is None else written


def _open_streams() -> None:
    """Opens closed standard streams, and lets nothing written to stderr fail.

    Otherwise the next file that is opened becomes the stream, and messages are written into it. A
    closed stdout stays one that cannot be written, so that no result is lost without a word.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, mode)  # the lowest that is free: this one
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (for the process)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    # Characters that the terminal's encoding lacks, and parts of file names in no encoding.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_LenientFile(2, "w", closefd=False)),
        encoding=getattr(sys.stderr, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=True,
    )
