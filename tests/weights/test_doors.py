"""Folders of strangers: damaged, hostile or huge ones are refused in one line, in little memory."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from gemma_encoder import digests
from gemma_encoder.inference import Predictor, export_huggingface
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model.config import HeadConfig, PoolingConfig
from gemma_encoder.weights import export
from gemma_encoder.weights.backbone import load_backbone, save_gemma
from gemma_encoder.weights.native import find, load_inference_spec
from tests.fuzz.cases import peak_of_memory, start_of_memory
from tests.weights.test_formats import FIRST
from tests.weights.test_huggingface_export import TRANSFORMERS, make_predictor

LOADERS = {"export": Predictor.load, "gemma": load_backbone, "native": Predictor.load}
DESCRIPTIONS = {
    "export": "gemma_encoder.json",
    "gemma": "transformer.json",
    "native": "checkpoints/4/inference/inference.json",
}
EXTREME = {
    "brackets": "[" * 100_000,
    "digits": '{"a": ' + "1" * 5_000 + "}",
    "list": "[]",
    "object": "{}",
    "null": "null",
    "empty": "",
    "not UTF-8": b'{"a": "\xff"}',
    "list of a number": "[1]",
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """An export in several files with all kinds of modules, and a gemma folder, by format."""
    folder = tmp_path_factory.mktemp("originals")
    predictor = make_predictor(
        TRANSFORMERS["gemma3"],
        heads={"t": HeadConfig(2, hidden_dims=(12,))},
        pooling=PoolingConfig("mean", projection=(20, 8)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "MAX_FILE", 250_000)
        export_huggingface(predictor, folder / "export")
    backbone = load_backbone(folder / "export")
    save_gemma(backbone, folder / "gemma", Tokenizer.load("small"))
    return {"export": folder / "export", "gemma": folder / "gemma", "native": FIRST}


@pytest.fixture
def copied(originals, tmp_path):
    """`copied(format)`: a copy that a test may damage."""

    def copy(kind, *, with_digests=False):
        folder = shutil.copytree(originals[kind], tmp_path / kind)
        if not with_digests:
            (folder / digests.NAME).unlink(missing_ok=True)
        return folder

    return copy


def parameters(kind, folder):
    if kind == "gemma":
        return jax.tree.leaves(nnx.state(load_backbone(folder)))
    return jax.tree.leaves(Predictor.load(folder).parameters)


def refusal(kind, folder, within=100e6):
    """Returns the message with which a folder is refused, in little memory of the host."""
    before = start_of_memory()  # not by tracemalloc: with threads of TensorStore it may crash
    with pytest.raises(InputError) as caught:
        LOADERS[kind](folder)
    assert peak_of_memory() - before < within
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 3_000
    return str(caught.value)


@pytest.mark.parametrize("kind", ["export", "gemma"])
def test_damage_of_each_file_that_is_read_is_named(copied, kind):
    folder = copied(kind, with_digests=True)
    before = parameters(kind, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for index, path in enumerate(files):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) * 2 // 3] ^= 4
        damages = (None, bytes(flipped), content[: len(content) // 2])
        # The library of the gemma package's arrays takes its time to fail.
        for damaged in damages if kind == "export" else [damages[index % 3]]:
            path.unlink(missing_ok=True)  # not written over: the arrays' library may have it mapped
            if damaged is not None:
                path.write_bytes(damaged)
            if path.name in FOR_OTHERS or (path.name, damaged) == (digests.NAME, None):
                jax.tree.map(np.testing.assert_array_equal, parameters(kind, folder), before)
            else:
                message = refusal(kind, folder)
                assert path.name in message and "it again" in message
                if path.name == "config.json":  # which may be edited on purpose
                    assert f"delete {digests.NAME}" in message
        path.unlink(missing_ok=True)
        path.write_bytes(content)


FOR_OTHERS = (
    *("README.md", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"),
    "config_sentence_transformers.json",
)


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_modules", fail)
    with pytest.raises(InputError, match="out cannot be written: No space left on device; free"):
        export_huggingface(make_predictor(TRANSFORMERS["gemma3"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_may_replace_an_empty_folder_or_its_link(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    export_huggingface(make_predictor(TRANSFORMERS["gemma3"]), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / digests.NAME).exists()


@pytest.mark.parametrize("content", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("export", "config.json"),
        ("export", "gemma_encoder.json"),
        ("export", "model.safetensors.index.json"),
        ("export", "modules.json"),
        ("export", "1_Pooling/config.json"),
        ("export", "2_Dense/config.json"),
        ("export", "tokenizer.model"),
        ("gemma", "transformer.json"),
        ("gemma", "_METADATA"),
        ("native", "checkpoints/4/inference/inference.json"),
    ],
)
def test_extreme_files_are_refused_in_one_line(copied, kind, file, content):
    folder = copied(kind)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(folder) in refusal(kind, folder) or file == "tokenizer.model"


VALUES = (None, "x", [], {}, -1, 0, 10**30, True, [[]], ["x"], 0.5, "../../x")
FIELDS = {
    "config.json": (
        "num_hidden_layers",
        "hidden_size",
        "layer_types",
        "rope_parameters",
        "head_dim",
    ),
    "modules.json": ("0.path", "1.type", "1.idx", "2.path", "1"),
    "model.safetensors.index.json": ("weight_map", "weight_map.norm.weight"),
    "gemma_encoder.json": (
        *("encoder", "encoder.heads", "encoder.heads.t", "encoder.heads.t.hidden_dims"),
        *("encoder.pooling", "encoder.transformer", "encoder.transformer.pattern", "tasks"),
        *("tasks.0", "tasks.0.template", "tasks.0.classes", "tasks.0.kind", "tasks.0.metrics"),
        *("max_length", "row_length", "padding", "format_version", "record", "tasks.0.calibration"),
    ),
}


@pytest.mark.parametrize("file", FIELDS)
def test_values_of_wrong_types_are_right_or_one_line(copied, file):
    folder = copied("export")
    original = (folder / file).read_text()
    outcomes = set()
    for name in FIELDS[file]:
        for value in VALUES:
            content = json.loads(original)
            *parents, last = name.split(".", 2 if file.endswith("index.json") else -1)
            if file.endswith("index.json"):
                parents, last = name.split(".")[:1] * ("." in name), name.partition(".")[2] or name
            node = content
            for parent in parents:
                node = node[int(parent) if isinstance(node, list) else parent]
            node[int(last) if isinstance(node, list) else last] = value
            (folder / file).write_text(json.dumps(content))
            try:
                Predictor.load(folder)
                outcomes.add("right")
            except InputError as error:
                outcomes.add("refused")
                assert "\n" not in str(error)
    assert "refused" in outcomes


HUGE = {
    "num_layers": 10**9,
    "vocab_size": 10**12,
    "embed_dim": 10**12,
    "hidden_dim": 10**12,
    "num_heads": 10**9,
    "sliding_window": 10**12,
    "pattern": ["local"] * 100_000,
}
HUGE_OUTSIDE = {
    "row_length": 10**9,
    "max_length": 10**9,
    "encoder.pooling.projection": [10**9],
    "encoder.pooling.probes": 10**9,
    "encoder.lora": {"rank": 10**9, "alpha": 1.0},
    "encoder.heads": {"toy_sentiment": {"outputs": 10**9}, "t": {"outputs": 10**9}},
}


@pytest.mark.parametrize("field", [*HUGE, *HUGE_OUTSIDE])
@pytest.mark.parametrize("kind", LOADERS)
def test_huge_declared_sizes_are_refused(copied, kind, field):
    if kind == "gemma" and field not in HUGE:
        pytest.skip("the format has no such field")
    folder = copied(kind)
    path = folder / DESCRIPTIONS[kind]
    content = json.loads(path.read_text())
    node = content
    parents = ["encoder", "transformer"] if field in HUGE and kind != "gemma" else []
    *more, last = field.split(".")
    for parent in parents + more:
        node = node[parent]
    node[last] = (HUGE | HUGE_OUTSIDE)[field]
    if kind == "native" and field == "encoder.heads":
        content["format_version"] = 3
        content["encoder"].pop("head_hidden", None)
    path.write_text(json.dumps(content))
    refusal(kind, folder)


def test_a_parameter_of_another_shape_is_named(copied):
    folder = copied("native")
    spec = load_inference_spec(find(folder))
    path = folder / DESCRIPTIONS["native"]
    content = json.loads(path.read_text())
    content["encoder"]["transformer"]["hidden_dim"] *= 2
    path.write_text(json.dumps(content))
    assert "has shape" in refusal("native", folder)
    assert dataclasses.is_dataclass(spec)


@pytest.mark.parametrize("name", ["../export/config.json", "/etc/passwd", 3, None, ["a"], "a\0b"])
@pytest.mark.parametrize("file", ["model.safetensors.index.json", "modules.json"])
def test_paths_that_leave_an_export_are_refused(copied, file, name):
    folder = copied("export")
    content = json.loads((folder / file).read_text())
    if file == "modules.json":
        content[1]["path"] = name
    else:
        content["weight_map"]["norm.weight"] = name
    (folder / file).write_text(json.dumps(content))
    message = refusal("export", folder)
    assert "is not inside its folder" in message or "no valid 'path'" in message


def test_arrays_without_data_are_refused(copied):
    """Zarr fills absent chunks with zeros, so that a small folder may declare gigabytes."""
    from gemma_encoder.weights.doors import check_bytes
    from gemma_encoder.weights.tensors import Tensor

    folder = copied("gemma")
    tensor = Tensor((1 << 20, 1 << 10), np.dtype(np.float32))
    with pytest.raises(InputError, match="its tensors have 4.29e.09 bytes, but its files only"):
        check_bytes(folder, [tensor], folder)


@pytest.mark.parametrize("damage", ["pipe", "device", "sparse"])
@pytest.mark.parametrize("kind", LOADERS)
def test_files_without_an_end_are_refused(copied, kind, damage):
    folder = copied(kind)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        if damage == "pipe":
            os.mkfifo(path)
        elif damage == "device":
            path.symlink_to("/dev/zero")
        else:
            path.touch()
            os.truncate(path, 20 << 30)
        if _is_read(kind, path):
            assert path.name in refusal(kind, folder, within=200e6)
        path.unlink()
        path.write_bytes(content)


def _is_read(kind, path):
    """Returns True for files that a door reads as a whole, or opens itself."""
    if kind == "native":
        return path.name in ("inference.json", "tokenizer.model", "_METADATA")
    if kind == "gemma":
        return path.name in ("transformer.json", "_METADATA", "manifest.ocdbt")
    return path.name not in (*FOR_OTHERS, "config_sentence_transformers.json")
