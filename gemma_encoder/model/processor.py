"""The processor of this machine, and the dtype of activations that is fastest on it.

Settings are not read: products choose their instructions whatever `--xla_cpu_max_isa` of XLA says
(experiments/benchmarks/NOTES.md).
"""

import functools
import pathlib
from collections.abc import Callable

import jax

from gemma_encoder import activity, distributed
from gemma_encoder.model.config import AUTO, COMPUTE_DTYPES, check_compute_dtype

CPU_INFO = pathlib.Path("/proc/cpuinfo")
FEATURE_LINES = ("flags", "Features")  # on x86, and on ARM
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last on ARM
NO_BFLOAT16 = "no fast bfloat16 (AVX512_BF16, AMX) was detected on this processor"
SLOW = f"bfloat16 is slower than float32 here: {NO_BFLOAT16}"
_reported: list[str] = []  # lines of this process about slow bfloat16


@functools.cache
def features() -> frozenset[str]:
    """Returns the names of the processor's instruction sets; none where Linux does not list them.

    That is on macOS and Windows.
    """
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for name, _, words in (line.partition(":") for line in lines):
        if name.strip() in FEATURE_LINES:
            return frozenset(words.split())  # of the first core
    return frozenset()


def fastest_dtype(platform: str) -> str:
    """Returns the dtype of activations that is faster here: "bfloat16" or "float32".

    A CPU without instructions for bfloat16 computes it in float32, after a conversion.

    Args:
        platform: "cpu", "gpu" or "tpu".
    """
    is_slow = platform == "cpu" and BFLOAT16.isdisjoint(features())
    return "float32" if is_slow else "bfloat16"


def resolve_compute_dtype(compute_dtype: str, platform: str) -> str:
    """Returns the dtype of activations: for "auto" the faster one, in which all processes agree.

    Args:
        compute_dtype: "auto", "bfloat16" or "float32".
        platform: as in `fastest_dtype`.

    Raises:
        InputError: the name is none of these.
    """
    check_compute_dtype(compute_dtype, (AUTO, *COMPUTE_DTYPES))
    if compute_dtype != AUTO:
        return compute_dtype
    is_float32 = fastest_dtype(platform) == "float32"
    if platform == "cpu" and jax.distributed.is_initialized():  # processors may differ
        is_float32 = distributed.decided_by_main(is_float32)
    return "float32" if is_float32 else "bfloat16"


def report_slow(line: str, say: Callable[[str], None] = activity.print_line) -> None:
    """Says in a line that bfloat16 is slow, unless this process or another one of the run did.

    Args:
        line: the line.
        say: prints it.
    """
    if not _reported and distributed.is_main_process():
        _reported.append(line)
        say(line)
