"""One process at a time writes to a workdir or an output; the lock of a killed one is free."""

import concurrent.futures
import contextlib
import errno
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from gemma_encoder import whole_files
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.predict_file import predict_file
from gemma_encoder.training import loop
from gemma_encoder.training.workdir import LOCK, exclusive_workdir
from gemma_encoder.whole_files import claim, whole_file, whole_folder, write_whole

HOLDER = """
import pathlib, sys, time
from gemma_encoder.whole_files import claim
with claim(pathlib.Path(sys.argv[1]), "it", ""):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock `it.lock`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "it.lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_holder_is_named_and_a_killed_one_is_gone(tmp_path, holder):
    lock = tmp_path / "it.lock"
    message = f"the output is in use by process {holder.pid} on {socket.gethostname()}, since 2"
    with (
        pytest.raises(InputError, match=rf"{message}.*; wait for it"),
        claim(lock, "the output", "wait for it"),
    ):
        pass
    assert lock.exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock.exists()  # the file is left, but not the lock
    with claim(lock, "the output", "wait for it"):
        assert str(os.getpid()) in lock.read_text()
    assert not lock.exists()


def test_a_lock_that_was_removed_meanwhile_is_opened_again(tmp_path, monkeypatch):
    """Its holder may end between the opening of the file and its locking."""
    lock = tmp_path / "it.lock"
    flock = whole_files.fcntl.flock
    calls = []

    def slow(file, operation):
        if not calls:
            lock.unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(whole_files.fcntl, "flock", slow)
    with claim(lock, "it", ""):
        assert len(calls) == 2 and lock.exists()
    assert not lock.exists()


def test_a_claim_that_cannot_be_written_is_one_line(tmp_path):
    with (
        pytest.raises(InputError, match="it cannot be written: No such file or directory"),
        claim(tmp_path / "missing" / "it.lock", "it", ""),
    ):
        pass


def test_the_claim_ends_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "it.lock", "it", ""):
        raise ZeroDivisionError
    with claim(tmp_path / "it.lock", "it", ""):
        pass


def test_a_workdir_in_use_is_neither_trained_nor_evaluated_in(micro, tmp_path):
    config = micro(train_for="1 steps", log_every="1 steps")
    workdir = tmp_path / "run"
    with exclusive_workdir(workdir, ""):
        with pytest.raises(InputError, match=r"run is in use by process \d+ .*another workdir"):
            loop.train(config, workdir)
        assert [path.name for path in workdir.iterdir()] == [LOCK]
    loop.train(config, workdir)
    before = (workdir / "metrics.jsonl").read_text()
    message = r"run is in use by process .*a copy of the workdir"
    with exclusive_workdir(workdir, ""), pytest.raises(InputError, match=message):
        loop.evaluate(config, workdir)
    assert (workdir / "metrics.jsonl").read_text() == before
    loop.evaluate(config, workdir)
    assert not (workdir / LOCK).exists()


def test_an_output_in_use_is_not_written(random_predictor, tmp_path):
    predictor = random_predictor()
    (tmp_path / "a.txt").write_text("good .\n")
    output = tmp_path / "o.jsonl"
    task = predictor.task("toy_sentiment")
    message = r"o.jsonl is in use by .*; wait for it, or name"
    lock = tmp_path / "o.jsonl.lock"
    with claim(lock, "another", ""), pytest.raises(InputError, match=message):
        predict_file(predictor, task, tmp_path / "a.txt", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]
    assert predict_file(predictor, task, tmp_path / "a.txt", output) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "o.jsonl"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "it"
    write_whole(path, "früher")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_bytes() == "früher".encode() and os.listdir(tmp_path) == ["it"]
    write_whole(path, b"\0")
    assert path.read_bytes() == b"\0" and os.listdir(tmp_path) == ["it"]


def test_the_leftover_of_a_killed_process_is_overwritten(tmp_path):
    (tmp_path / ".it.tmp").write_text("a long text that was left")
    write_whole(tmp_path / "it", "short")
    assert (tmp_path / "it").read_text() == "short" and os.listdir(tmp_path) == ["it"]


def test_a_link_is_replaced_and_a_device_is_written(tmp_path):
    (tmp_path / "target").write_text("safe")
    (tmp_path / "link").symlink_to("target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "safe"
    assert (tmp_path / "link").read_text() == "new" and not (tmp_path / "link").is_symlink()
    (tmp_path / ".trap.tmp").symlink_to("target")
    with pytest.raises(OSError):  # a name that was set up in a shared folder
        write_whole(tmp_path / "trap", "new")
    assert (tmp_path / "target").read_text() == "safe"
    write_whole(pathlib.Path("/dev/null"), "gone")
    assert not pathlib.Path("/dev/null").is_file()


def test_writers_of_one_file_take_turns(tmp_path):
    def write(index):
        for _ in range(20):
            write_whole(tmp_path / "it", str(index) * 100_000)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(set((tmp_path / "it").read_text())) == 1
    assert os.listdir(tmp_path) == ["it"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "it", "")
    finally:
        os.umask(before)
    assert (tmp_path / "it").stat().st_mode & 0o777 == 0o640


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "it"
    with pytest.raises(ZeroDivisionError), whole_folder(path, "wait") as folder:
        (folder / "file").write_text("half")
        folder.with_name(f"{folder.name}.temporary-file-of-a-library").touch()
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "new" / ".it.tmp").mkdir()
    (tmp_path / "new" / ".it.tmp" / "left").write_text("by a killed process")
    path.mkdir()
    with (
        whole_folder(path, "wait") as folder,
        pytest.raises(InputError, match="it is in use by process .*; wait"),
        whole_folder(path, "wait"),
    ):
        pass
    with whole_folder(path, "wait") as folder:
        (folder / "file").write_text("whole")
        assert os.listdir(path) == []
    assert os.listdir(path) == ["file"] and os.listdir(tmp_path / "new") == ["it"]


def test_a_folder_that_cannot_be_flushed_does_not_appear(tmp_path, monkeypatch):
    """File systems on a network may tell only then that they are full."""

    def fail(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(OSError, match="quota"), whole_folder(tmp_path / "it", "wait") as folder:
        (folder / "file").write_text("whole")
        monkeypatch.setattr(os, "fsync", fail)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_still_written_to_is_removed(tmp_path):
    end = time.monotonic() + 0.3

    def write_on(folder):
        while time.monotonic() < end:
            for index in range(50):
                with contextlib.suppress(OSError):
                    (folder / str(index)).touch()

    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "it", "wait") as folder:
        writer = threading.Thread(target=write_on, args=[folder])
        writer.start()
        raise ZeroDivisionError
    writer.join()
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(whole_files.fcntl, "flock", unsupported)
    with claim(tmp_path / "it.lock", "it", ""):
        write_whole(tmp_path / "it", "text")
    assert (tmp_path / "it").read_text() == "text"
    assert "without locks" in caplog.text


def test_an_empty_folder_that_must_stay_is_filled(tmp_path, monkeypatch):
    """A volume that is mounted, or a folder that somebody else has made for this user."""
    path = tmp_path / "volume"
    path.mkdir()
    inode = path.stat().st_ino
    monkeypatch.setattr(os.path, "ismount", lambda folder: folder == path)
    with pytest.raises(ZeroDivisionError), whole_folder(path, "wait") as folder:
        (folder / "file").write_text("half")
        raise ZeroDivisionError
    assert os.listdir(path) == []
    with whole_folder(path, "wait") as folder:
        (folder / "file").write_text("whole")
        (folder / "sub").mkdir()
    assert sorted(os.listdir(path)) == ["file", "sub"] and path.stat().st_ino == inode
    assert os.listdir(tmp_path) == ["volume"]
