"""Process-wide settings: logs, memory pages, the compilation cache, optional packages.

Importing this module is fast. None of the settings affects results, and environment variables that
the user has set are respected.
"""

import contextlib
import gc
import glob
import importlib
import importlib.util
import logging
import os
import pathlib
import platform
import re
import sys
import tempfile
import types
from collections.abc import Iterator

from gemma_encoder import stopping, terminal
from gemma_encoder.inputs.errors import InputError, reason
from gemma_encoder.stopping import EXIT_PREEMPTED as EXIT_PREEMPTED

# Environment variables by which the processes of a run find each other; set all three or none.
COORDINATOR_ADDRESS = "JAX_COORDINATOR_ADDRESS"
NUM_PROCESSES = "JAX_NUM_PROCESSES"
PROCESS_ID = "JAX_PROCESS_ID"

# Requests pages of 2 MB for large blocks; glibc reads the setting when a program starts.
HUGE_PAGES = "glibc.malloc.hugetlb=1"

# Lines that TensorFlow writes to stderr on import, regardless of its logging settings.
START_UP_NOTE = re.compile(rb"[IWE]\d{4} .*\.cc:\d+\]|WARNING: All log messages before absl")

# Import names of the packages of the extra `train`.
TRAINING = (
    "clu",
    "grain",
    "ir_measures",
    "optax",
    "rax",
    "scipy",
    "sklearn",
    "tensorboardX",
)

MIN_COMPILE_SECONDS = 0.1  # programs that compile faster are not written to the cache
MAX_CACHE_BYTES = 5 << 30  # of the user's cache; the least recently used programs are evicted
_cache: list[str | None] = [None]  # the folder that this module set last, rather than the user


def quiet_compiler() -> None:
    """Silences the logs of XLA and TensorFlow on stderr; call it before jaxlib is imported.

    Otherwise XLA warns for each program from the cache that it may have been compiled for another
    kind of machine, although the kind of machine is part of the program's key.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def quiet() -> None:
    """Silences warnings of libraries about absent accelerators."""
    quiet_compiler()
    if not _has_tpu():
        ignore_tpus()


def collect_garbage_rarely() -> None:
    """Makes Python look for unreachable cycles less often; for programs, not for a library.

    Imports and traced programs make millions of objects that stay: with Python's default, looking
    through them is a fifth of the time of imports, and a tenth of that of tracing and compiling.
    """
    gc.set_threshold(20_000, 20, 20)


def ignore_tpus() -> None:
    """Keeps libtpu, if installed, from a slow and noisy search for TPUs in cloud metadata."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    }.items():
        os.environ.setdefault(name, value)


def import_quietly(name: str) -> types.ModuleType:
    """Imports TensorFlow, or a package that depends on it, without its messages on stderr.

    Raises:
        InputError: the package is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise InputError(
            f"{name} is not installed, but needed for seqio tasks and for reading prepared "
            "TensorFlow Datasets for the first time; pip install 'gemma_encoder[tfds]'"
        )
    with without_start_up_notes():
        return importlib.import_module(name)


@contextlib.contextmanager
def without_start_up_notes() -> Iterator[None]:
    """Drops the lines that TensorFlow's C++ code writes to stderr during import."""
    try:
        stderr = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    terminal.flush_messages()
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            terminal.flush_messages()
            os.dup2(stderr, 2)
            written.seek(0)
            lines = [line for line in written if not START_UP_NOTE.match(line)]
            with contextlib.suppress(OSError):  # its reader has exited, or it is full
                os.write(stderr, b"".join(lines))
            os.close(stderr)


def use_huge_pages() -> None:
    """Re-executes this command with huge pages for large blocks, if that helps: on CPUs with glibc.

    A training step on a CPU allocates and frees gigabytes; with pages of 4 kB, page faults take a
    tenth to a third of its time. Call this first in a program, and only there: the state of the
    process is lost.
    """
    has_accelerator = _has_tpu() or glob.glob("/dev/nvidia*")
    on_cpu = os.environ.get("JAX_PLATFORMS", "") == "cpu" or not has_accelerator
    is_configured = "GLIBC_TUNABLES" in os.environ
    if not on_cpu or not _glibc_has_huge_pages() or is_configured or not sys.orig_argv[1:]:
        return
    os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
    stopping.hold_signals()
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    finally:
        stopping.release_signals()


def _glibc_has_huge_pages() -> bool:
    library, version = platform.libc_ver()
    return library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


def require_training() -> None:
    """Raises InputError if packages that training needs are not installed."""
    missing = [name for name in TRAINING if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"training and evaluation need packages that are not installed ({', '.join(missing)}); "
            "pip install 'gemma_encoder[train]'"
        )


def require_retrieval(*packages: str) -> None:
    """Raises InputError if packages of the extra `retrieval` are not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"this needs packages that are not installed ({', '.join(missing)}); pip install "
            "'gemma_encoder[retrieval]'"
        )


def cache_folder() -> pathlib.Path:
    """Returns the cache folder: `GEMMA_ENCODER_CACHE`, by default `~/.cache/gemma_encoder`."""
    folder = os.environ.get("GEMMA_ENCODER_CACHE") or "~/.cache/gemma_encoder"
    return pathlib.Path(folder).expanduser()


def enable_compilation_cache(setting: str = "auto") -> None:
    """Enables JAX's cache of compiled programs on disk, which processes share.

    A folder in the environment (`JAX_COMPILATION_CACHE_DIR`) takes precedence over any setting, and
    a folder that the user has set in `jax.config` over "auto". Programs are stored if they take 0.1
    s to compile: with JAX's default of 1 s, the evaluation of a small model would be compiled at
    each start.

    Args:
        setting: "auto" for the user's cache folder, which all runs and predictors share and whose
            size is limited; a folder, local or `gs://`, without a limit; "" for no cache.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    current = jax.config.jax_compilation_cache_dir
    if setting == "auto" and current not in (None, _cache[0]):
        return
    folder = setting or None
    max_bytes = -1  # no limit
    if setting == "auto":
        folder = None
        shared = cache_folder() / "compiled"
        if _is_usable(shared):
            folder = os.fspath(shared)
            max_bytes = MAX_CACHE_BYTES
    _cache[0] = folder
    if current != folder:
        compilation_cache.reset_cache()  # JAX reads the setting once, when it first compiles
        jax.config.update("jax_compilation_cache_dir", folder)
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            jax.config.update("jax_compilation_cache_max_size", max_bytes)


def _is_usable(folder: pathlib.Path) -> bool:
    """Prepares the shared cache; warns and returns False if it cannot be written."""
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.fspath(folder).encode()  # JAX takes no other paths
        with (
            contextlib.suppress(filelock.Timeout),
            filelock.FileLock(folder / ".lockfile", timeout=1),
        ):
            _remove_truncated(folder)
    except (OSError, UnicodeEncodeError) as error:
        logging.getLogger(__name__).warning(
            "compiled programs cannot be stored in %s (%s), so each start compiles anew; set "
            "GEMMA_ENCODER_CACHE to another folder",
            folder,
            reason(error),
        )
        return False
    return True


def _remove_truncated(folder: pathlib.Path) -> None:
    """Removes programs that a killed process left truncated, on which JAX would fail.

    JAX writes a program and then, under the same lock, its access time: a program without access
    time is truncated.
    """
    for program in folder.glob("*-cache"):
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink(missing_ok=True)


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"))
