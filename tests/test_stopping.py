"""Ctrl-C and SIGTERM end programs in one line, at any moment; standard streams may be closed."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from gemma_encoder import cli, stopping
from gemma_encoder.runtime import PROCESS_ID

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def interruptible():
    """Lets SIGINT reach subprocesses of tests that a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PROGRAM = """
from gemma_encoder import stopping
stopping.start()
import os, signal, sys, time

def wait():
    os.write(1, b"ready")
    time.sleep(60)

{setup}
def main():
{body}
    return 0

sys.exit(stopping.run(main))
"""


def program(body: str, setup: str = "") -> list[str]:
    """Returns the command of a program with the body of its main function."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    return [sys.executable, "-c", PROGRAM.format(setup=setup, body=indented)]


def stop(command: list[str], *signals: int, **options) -> tuple[int, str]:
    """Starts a command, sends the signals once it writes "ready"; returns exit code and stderr."""
    options["env"] = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    for signum in signals:
        assert process.stdout.read(5) == "ready", process.stderr.read()
        process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def expected(signum: int) -> tuple[int, str]:
    """Returns the exit code and the line of a signal."""
    return stopping.CODES[signum], f"{stopping.LINES[signum]}\n"


LOST = "class Lost:\n    def __del__(self):\n        wait()\n"
LOUD = """
import atexit, threading

def shout():
    print("an exit function", file=sys.stderr)
    raise RuntimeError

def fail():
    while True:
        time.sleep(0.01)
        if stopping.is_requested():
            raise RuntimeError

atexit.register(shout)
threading.Thread(target=fail).start()
"""
NATIVE = """
import ctypes
stopping.LONGEST_NATIVE_CALL = 0.1
lock = ctypes.CDLL(None).pthread_mutex_lock
mutex = ctypes.create_string_buffer(64)
"""
MOMENTS = {
    "in the program": ("wait()", ""),
    "before the program": ("", "wait()"),
    "in a callback": ("Lost()", LOST),
    "turned into another error": (
        "try:\n    wait()\nexcept BaseException:\n    raise ValueError('x')",
        "",
    ),
    "swallowed at the end": ("try:\n    wait()\nexcept BaseException:\n    pass", ""),
    "swallowed": (
        "try:\n    wait()\nexcept BaseException:\n    pass\ntime.sleep(60)",
        "stopping.LONGEST_CLEANUP = 0.1; stopping.LONGEST_NATIVE_CALL = 0.1",
    ),
    "in native code": ("os.write(1, b'ready'); lock(mutex); lock(mutex)", NATIVE),
    "with noise": ("wait()", LOUD),
    "in an exit of the program": ("try:\n    sys.exit(3)\nfinally:\n    wait()", ""),
    "in an import": (
        "try:\n    import slow\nexcept BaseException:\n    print('broken', file=sys.stderr)",
        "open('slow.py', 'w').write('import os, time; os.write(1, b\"ready\"); time.sleep(60)')\n"
        "sys.path.insert(0, '.')",
    ),
    "in a new program": (
        "stopping.hold_signals()\n"
        "os.write(1, b'ready')\n"
        "time.sleep(0.3)\n"
        "code = 'from gemma_encoder import stopping as s; s.start(); import time; time.sleep(9)'\n"
        "os.execv(sys.executable, [sys.executable, '-c', code])",
        "",
    ),
}


@pytest.mark.parametrize("signum", SIGNALS, ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_a_program_in_one_line(moment, signum, tmp_path):
    assert stop(program(*MOMENTS[moment]), signum, cwd=tmp_path) == expected(signum)


def test_a_second_signal_ends_a_program_at_once():
    body = "try:\n    wait()\nfinally:\n    wait()"
    assert stop(program(body), signal.SIGINT, signal.SIGINT) == expected(signal.SIGINT)
    body = "os.write(1, b'readyready'); lock(mutex); lock(mutex)"
    setup = f"{NATIVE}\nstopping.LONGEST_NATIVE_CALL = 60"
    # Of signals that arrive together, either is handled first.
    assert stop(program(body, setup), *SIGNALS) in map(expected, SIGNALS)


def test_a_stopped_program_removes_its_temporary_files(tmp_path):
    body = """import pathlib
from gemma_encoder.whole_files import whole_file
with whole_file(pathlib.Path("file")) as temporary:
    temporary.write_text("half")
    wait()"""
    (tmp_path / "file").write_text("whole")
    assert stop(program(body), signal.SIGTERM, cwd=tmp_path) == expected(signal.SIGTERM)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "whole"


def test_a_signal_that_the_parent_ignores_stays_ignored():
    code = f"import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); {'{}'}"
    body = "os.write(1, b'ready'); time.sleep(0.3)"
    command = code.format(f"os.execv(sys.executable, {program(body)!r})")
    assert stop([sys.executable, "-c", command], signal.SIGINT) == (0, "")


def test_a_signal_to_a_forked_process_does_not_stop_its_parent():
    body = """child = os.fork()
if not child:
    time.sleep(60)
    os._exit(1)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
time.sleep(0.3)
os.write(1, b"ready")
time.sleep(60)"""
    setup = "stopping.LONGEST_NATIVE_CALL = 0.1"
    assert stop(program(body, setup), signal.SIGINT) == expected(signal.SIGINT)


def test_a_program_that_has_ended_keeps_its_exit_code():
    setup = "import atexit; atexit.register(wait)"
    body = "return 3"
    assert stop(program(body, setup), signal.SIGINT) == (3, "")


def test_other_processes_of_a_run_write_no_line():
    code, errors = stop(program("wait()"), signal.SIGTERM, env={PROCESS_ID: "1"})
    assert (code, errors) == (75, "")


@pytest.mark.parametrize(
    ("command", "signum"), zip([*cli.COMMANDS, "main"], itertools.cycle(SIGNALS), strict=False)
)
def test_a_signal_during_the_first_imports_is_one_line(command, signum, tmp_path):
    """Each subcommand, and the program's former name."""
    stub = "import os, time\nos.write(1, b'ready')\ntime.sleep(60)"
    (tmp_path / "ml_collections.py").write_text(stub)
    words = ["-m", "gemma_encoder.main"] if command == "main" else ["-m", "gemma_encoder", command]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = stop([sys.executable, *words], signum, env={"PYTHONPATH": path}, cwd=tmp_path)
    assert result == expected(signum)


def streams(redirections: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `gemma-encoder` under a shell with redirections of its standard streams."""
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -m gemma_encoder "$@" {redirections}', sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full", "<&-", "<&- 2>&-"])
def test_results_do_not_depend_on_stderr_or_stdin(redirections):
    plain = streams("", "--help")
    assert plain.returncode == 0 and "usage" in plain.stdout
    assert streams(redirections, "--help").stdout == plain.stdout
    refused = streams(redirections, "no_such_command")
    assert refused.returncode == 2 and not refused.stdout


@pytest.mark.parametrize(
    ("redirections", "reason"), [(">/dev/full", "No space left"), (">&-", "Bad file descriptor")]
)
@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"], ["train", "--help"]])
def test_a_result_that_cannot_be_printed_is_one_line(redirections, reason, arguments):
    refused = streams(redirections, *arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: stdout cannot be written: {reason}")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("redirections", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_becomes_a_closed_stream(redirections, tmp_path):
    code = (
        "from gemma_encoder import stopping; stopping.start(); import os, sys\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); assert file.fileno() > 2\n"
        "print('message', file=sys.stderr); os.write(2, b'native'); sys.stderr.flush()\n"
    )
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirections}', sys.executable, code]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and not (tmp_path / "file").read_text()


def test_a_reader_of_stderr_may_go_away():
    reader, writer = os.pipe()
    command = program("print('one', file=sys.stderr); print('two', file=sys.stderr)")
    process = subprocess.Popen(command, stderr=writer, env=os.environ | {"PYTHONPATH": str(ROOT)})
    os.close(reader)
    os.close(writer)
    assert process.wait(60) == 0
