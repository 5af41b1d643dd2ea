"""The processor's instruction sets, and the dtype of activations that is chosen for them."""

import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import processor
from gemma_encoder.model.processor import resolve_compute_dtype

CPU_INFO = """processor\t: 0
model name\t: Some \xe9 CPU with amx_bf16
{name}\t\t: fpu {words}
bugs\t\t: bf16

processor\t: 1
{name}\t\t: avx512_bf16
"""


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("flags", "avx2 fma", "float32"),
        ("flags", "avx512f avx512_vnni", "float32"),
        ("flags", "avx512f avx512_bf16", "bfloat16"),
        ("flags", "avx2 amx_bf16 amx_tile", "bfloat16"),
        ("Features", "asimd bf16 i8mm", "bfloat16"),
        ("Features", "asimd", "float32"),
    ],
)
def test_auto_is_the_dtype_of_the_processor(name, words, expected, monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_bytes(CPU_INFO.format(name=name, words=words).encode("latin-1"))
    monkeypatch.setattr(processor, "CPU_INFO", file)
    features = processor.features.__wrapped__()
    assert features == {"fpu", *words.split()}
    monkeypatch.setattr(processor, "features", lambda: features)
    assert resolve_compute_dtype("auto", "cpu") == expected
    for platform in ("gpu", "tpu"):
        assert resolve_compute_dtype("auto", platform) == "bfloat16"
    for dtype in ("float32", "bfloat16"):
        assert resolve_compute_dtype(dtype, "cpu") == dtype


@pytest.mark.parametrize("content", [None, "processor : 0\n"])
def test_a_processor_that_is_not_described_is_slow(content, monkeypatch, tmp_path):
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor, "features", processor.features.__wrapped__)
    assert not processor.features()
    assert resolve_compute_dtype("auto", "cpu") == "float32"


def test_processes_of_a_run_agree(monkeypatch):
    """The main process decides where the processors of CPU hosts differ."""
    monkeypatch.setattr(processor, "features", frozenset)
    monkeypatch.setattr(processor.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processor.distributed, "decided_by_main", lambda answer: not answer)
    assert resolve_compute_dtype("auto", "cpu") == "bfloat16"
    assert resolve_compute_dtype("auto", "tpu") == "bfloat16"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("float16", "float16 is refused"),
        (
            "aut",
            "unknown compute_dtype 'aut'; did you mean 'auto'.* Valid: auto, bfloat16, float32",
        ),
    ],
)
def test_other_dtypes_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        resolve_compute_dtype(name, "cpu")
