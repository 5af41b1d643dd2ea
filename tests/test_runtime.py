"""Process-wide settings: huge pages, the compilation cache, logs, and missing packages."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from gemma_encoder import runtime
from gemma_encoder.inputs.errors import InputError


@pytest.fixture
def started(monkeypatch):
    """The (program, argv, tunables) of each re-execution, on a machine that has huge pages."""
    calls = []

    def execv(program, argv):
        calls.append((program, argv, os.environ.get("GLIBC_TUNABLES")))

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(runtime.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "gemma_encoder.main", "--mode=eval"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("GLIBC_TUNABLES")
    return calls


def test_the_command_is_re_executed_with_huge_pages(started):
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
def test_the_command_is_not_re_executed_without_need(started, monkeypatch, reason):
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


def test_variables_of_the_user_are_respected(monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    monkeypatch.setattr(runtime.glob, "glob", lambda pattern: [])
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-1")
    runtime.quiet()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")


@pytest.mark.parametrize("module", ["gemma_encoder.__main__", "gemma_encoder.main"])
def test_programs_look_for_garbage_rarely(module):
    code = f"""
import gc, importlib, sys
before = gc.get_threshold()
program = importlib.import_module("{module}")
assert gc.get_threshold() == before, "importing is no program"
sys.argv = ["program", "--version"]
getattr(program, "_main" if program.__name__.endswith("__main__") else "_program")()
assert gc.get_threshold()[0] > 10 * before[0]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """The user's cache folder, empty, in a process without another setting of the cache."""
    shared = os.environ["JAX_COMPILATION_CACHE_DIR"]
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    with monkeypatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR")
        patch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path))
        runtime.enable_compilation_cache("")
        yield tmp_path / "compiled"
        runtime.enable_compilation_cache(shared)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def compile_something(factor: float) -> None:
    function = jax.jit(lambda x: jax.numpy.sin(x) * factor)
    assert function(2.0) == pytest.approx(factor * np.sin(2.0))
    jax.clear_caches()


def test_compiled_programs_are_stored_and_reused(own_cache, monkeypatch):
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    runtime.enable_compilation_cache()
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    assert seconds == runtime.MIN_COMPILE_SECONDS
    assert jax.config.jax_compilation_cache_max_size == runtime.MAX_CACHE_BYTES
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # as JAX does on import
    runtime.enable_compilation_cache("auto")
    compile_something(3)
    assert "/jax/compilation_cache/cache_hits" not in events
    compile_something(3)
    assert "/jax/compilation_cache/cache_hits" in events and list(own_cache.glob("*-cache"))


def test_other_settings_of_the_cache(own_cache, monkeypatch, tmp_path):
    runtime.enable_compilation_cache(str(tmp_path / "mine"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert jax.config.jax_compilation_cache_max_size == -1  # the user's folder has no limit
    runtime.enable_compilation_cache("auto")
    assert jax.config.jax_compilation_cache_dir == str(own_cache)
    runtime.enable_compilation_cache("")
    assert jax.config.jax_compilation_cache_dir is None
    with monkeypatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
        runtime.enable_compilation_cache("auto")
    assert jax.config.jax_compilation_cache_dir is None, "the environment's folder is left alone"
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of the user"))
    runtime.enable_compilation_cache("auto")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "of the user")


def test_an_unwritable_cache_is_a_warning(own_cache, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "file"))
    runtime.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "compiled programs cannot be stored" in caplog.text
    assert "GEMMA_ENCODER_CACHE" in caplog.text


def test_truncated_programs_are_removed_from_the_cache(own_cache):
    own_cache.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (own_cache / name).write_bytes(bytes(8))
    runtime.enable_compilation_cache()
    assert {path.name for path in own_cache.iterdir()} >= {"whole-cache", "whole-atime"}
    assert not (own_cache / "torn-cache").exists()


def test_concurrent_processes_share_the_cache_silently(tmp_path):
    """Three processes fill an empty cache; a fourth compiles nothing, and none logs."""
    code = """
import gemma_encoder, jax
from gemma_encoder import runtime
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
runtime.enable_compilation_cache()
for n in range(5):
    assert float(jax.jit(lambda x: jax.numpy.sin(x) * n)(2.0)) is not None
print(events.count("/jax/compilation_cache/cache_hits"))
"""
    environment = os.environ | {
        "GEMMA_ENCODER_CACHE": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    del environment["JAX_COMPILATION_CACHE_DIR"], environment["TF_CPP_MIN_LOG_LEVEL"]

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    for process in [start() for _ in range(3)]:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and not errors, errors
    output, errors = start().communicate(timeout=120)
    assert int(output) >= 5 and not errors
    programs = {path.stem for path in (tmp_path / "compiled").glob("*-cache")}
    assert len(programs) >= 5


def test_training_without_its_packages_is_one_line(monkeypatch):
    runtime.require_training()
    monkeypatch.setattr(runtime, "TRAINING", (*runtime.TRAINING, "no_such_package"))
    with pytest.raises(InputError, match=r"no_such_package.*pip install 'gemma_encoder\[train\]'"):
        runtime.require_training()


def test_a_missing_package_for_tfrecords_is_one_line():
    with pytest.raises(InputError, match=r"no_such is not installed.*gemma_encoder\[tfds\]"):
        runtime.import_quietly("no_such")
    assert runtime.import_quietly("json").dumps(1) == "1"


def test_only_messages_of_tensorflow_are_dropped(capfd):
    with runtime.without_start_up_notes():
        os.write(2, b"I0000 00:00:17.246537    34 port.cc:153] oneDNN custom operations are on.\n")
        os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called\n")
        print("a module's own words", file=sys.stderr)
    with pytest.raises(ValueError), runtime.without_start_up_notes():
        print("before it failed", file=sys.stderr)
        raise ValueError
    assert capfd.readouterr().err == "a module's own words\nbefore it failed\n"


def test_a_missing_package_of_retrieval_names_its_extra():
    runtime.require_retrieval("json")
    with pytest.raises(InputError, match=r"no_such.*pip install 'gemma_encoder\[retrieval\]'"):
        runtime.require_retrieval("json", "no_such")
