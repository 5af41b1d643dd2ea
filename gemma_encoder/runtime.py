"""Process-wide settings: logs, memory pages, the cache of compiled programs, optional packages.

Importing this is light. Nothing here is needed for right results, and a variable that the user has
set is left as it is.
"""

import contextlib
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

from gemma_encoder.inputs.errors import InputError

# Exit code of a program that was told to stop and has saved a checkpoint: rerun it to resume
# (EX_TEMPFAIL of sysexits.h).
EXIT_PREEMPTED = 75

# Environment variables by which the processes of a run find each other; set all three or none.
COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)

HUGE_PAGES = "glibc.malloc.hugetlb=1"  # ask the system for pages of 2 MB for large blocks; glibc reads it when a program starts


# What TensorFlow writes to stderr when it is imported, whatever its logging switches say.
START_UP_NOTE = re.compile(rb"[IWE]\d{4} .*\.cc:\d+\]|WARNING: All log messages before absl")

# Packages of the extra `train` that training imports, by the names that they are imported by.
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
MAX_CACHE_BYTES = 5 << 30  # of the user's cache of compiled programs; the least recently used go
_cache: list[str | None] = [None]  # the folder that was set here last, not by the user


def quiet_compiler() -> None:
    """Keeps XLA and TensorFlow from logging to stderr; call it before jaxlib is imported.

    XLA otherwise doubts, at each program that it finds in the cache, that it was compiled for this
    kind of machine, although the program's key holds the machine's kind.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def quiet() -> None:
    """Keeps libraries from complaining about accelerators that are absent."""
    quiet_compiler()
    if not _has_tpu():
        ignore_tpus()


def ignore_tpus() -> None:
    """Keeps libtpu, where it is installed, from looking for a TPU in the cloud's metadata, at length and with complaints."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    }.items():
        os.environ.setdefault(name, value)


def import_quietly(name: str) -> types.ModuleType:
    """Imports TensorFlow or a package that stands on it.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise InputError(
            f"{name} is not installed, which reading prepared TensorFlow Datasets for the first "
            "time and tasks of seqio need; pip install 'gemma_encoder[tfds]'"
        )
    with without_start_up_notes():
        return importlib.import_module(name)


@contextlib.contextmanager
def without_start_up_notes() -> Iterator[None]:
    """Holds back the lines that TensorFlow's C++ code writes to stderr while it is imported."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            written.seek(0)
            lines = [line for line in written if not START_UP_NOTE.match(line)]
            os.write(stderr, b"".join(lines))
            os.close(stderr)


def use_huge_pages() -> None:
    """Starts this very command again with huge pages for large blocks, where that helps: on a CPU, under Linux.

    Each step of a CPU takes and gives back gigabytes; with pages of 4 kB, faults cost a tenth to a third of its time. Call it first
    of all in a program, and only there: what the process has done so far is lost.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS", "") == "cpu" or not (
        _has_tpu() or glob.glob("/dev/nvidia*")
    )
    library, version = platform.libc_ver()
    knows = library == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= (2, 35)
    if not on_cpu or not knows or "GLIBC_TUNABLES" in os.environ or not sys.orig_argv[1:]:
        return
    os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def require_training() -> None:
    """Raises InputError, saying what to install, where packages that training needs are absent."""
    missing = [name for name in TRAINING if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"training and evaluation need packages that are not installed ({', '.join(missing)}); "
            "pip install 'gemma_encoder[train]'"
        )


def write_whole(path: pathlib.PurePath, text: str) -> None:
    """Writes a file that never exists half written, and never through a link that lies there."""
    if "://" in str(path):
        path.write_text(text)  # an object in the cloud is whole or absent
        return
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_folder() -> pathlib.Path:
    """Returns the folder of derived files: `GEMMA_ENCODER_CACHE`, else `~/.cache/gemma_encoder`."""
    return pathlib.Path(
        os.environ.get("GEMMA_ENCODER_CACHE") or "~/.cache/gemma_encoder"
    ).expanduser()


def enable_compilation_cache(setting: str = "auto") -> None:
    """Lets JAX store compiled programs on disk, where other processes find them.

    A folder in the environment (`JAX_COMPILATION_CACHE_DIR`) wins over any setting, and one that the
    user has set in `jax.config` wins over "auto". Stored is what takes 0.1 s to compile: by JAX's own
    limit of a second, a small model's evaluation would be compiled at each start.

    Args:
        setting: "auto" for the user's cache folder, which all runs and predictors share and whose
            size is bounded; a folder, local or `gs://`, without bound; "" for none.
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
    folder, bound = setting or None, -1
    if setting == "auto":
        own = cache_folder() / "compiled"
        folder, bound = (os.fspath(own), MAX_CACHE_BYTES) if _usable(own) else (None, -1)
    _cache[0] = folder
    if current != folder:
        compilation_cache.reset_cache()  # JAX reads the setting once, when it first compiles
        jax.config.update("jax_compilation_cache_dir", folder)
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            jax.config.update("jax_compilation_cache_max_size", bound)


def _usable(folder: pathlib.Path) -> bool:
    """Makes the shared cache ready; logs a warning and returns False where it cannot be written."""
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            contextlib.suppress(filelock.Timeout),
            filelock.FileLock(folder / ".lockfile", timeout=1),
        ):
            _remove_truncated(folder)
    except OSError as error:
        logging.getLogger(__name__).warning(
            "compiled programs cannot be stored in %s (%s), so each start compiles anew; let "
            "GEMMA_ENCODER_CACHE name another folder",
            folder,
            error.strerror or error,
        )
        return False
    return True


def _remove_truncated(folder: pathlib.Path) -> None:
    """Removes what a killed process left half written, as JAX, which would fail on it, does not.

    JAX writes a program and then, under the same lock, the time of its last use: a program without
    one was cut off.
    """
    for program in folder.glob("*-cache"):
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink(missing_ok=True)


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"))
