"""What a process needs to have set before JAX, TensorFlow or NumPy start: one place, for every program.

Nothing here is needed for right results; a variable that the user has set is left as it is.
"""

import glob
import os
import platform
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"  # ask the system for pages of 2 MB for large blocks; glibc reads it when a program starts


def quiet() -> None:
    """Keeps libraries from complaining about accelerators that are absent."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported
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


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"))
