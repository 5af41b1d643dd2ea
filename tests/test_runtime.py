"""What a program sets before it starts, and that it starts itself again only where that helps."""

import os
import sys

import pytest

from gemma_encoder import runtime


@pytest.fixture
def started(monkeypatch):
    """What the program was started again with, on a machine that knows huge pages; None where it was not."""
    calls = []
    monkeypatch.setattr(
        os,
        "execv",
        lambda program, argv: calls.append((program, argv, os.environ.get("GLIBC_TUNABLES"))),
    )
    monkeypatch.setattr(runtime.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "gemma_encoder.main", "--mode=eval"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("GLIBC_TUNABLES")
    return calls


def test_the_same_command_starts_again_with_huge_pages(started):
    runtime.use_huge_pages()
    assert started == [
        (
            sys.executable,
            [sys.executable, "-m", "gemma_encoder.main", "--mode=eval"],
            runtime.HUGE_PAGES,
        )
    ]
    runtime.use_huge_pages()  # the second start
    assert len(started) == 1


@pytest.mark.parametrize(
    "reason",
    ["an accelerator", "an old glibc", "another C library", "tuned by the user", "interactive"],
)
def test_else_it_goes_on(started, monkeypatch, reason):
    if reason == "an accelerator":
        monkeypatch.setenv("JAX_PLATFORMS", "")
        monkeypatch.setattr(
            runtime.glob, "glob", lambda pattern: [pattern] if "nvidia" in pattern else []
        )
    elif reason == "an old glibc":
        monkeypatch.setattr(runtime.platform, "libc_ver", lambda: ("glibc", "2.31"))
    elif reason == "another C library":
        monkeypatch.setattr(runtime.platform, "libc_ver", lambda: ("", ""))
    elif reason == "tuned by the user":
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    else:
        monkeypatch.setattr(sys, "orig_argv", ["python"])
    runtime.use_huge_pages()
    assert not started


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    monkeypatch.setattr(runtime.glob, "glob", lambda pattern: [])
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-1")
    runtime.quiet()
    assert (
        os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
        and os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
        and os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    )
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
