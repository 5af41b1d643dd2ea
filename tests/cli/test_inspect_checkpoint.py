"""`gemma-encoder inspect PATH`: its output and its exit codes."""

import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from gemma_encoder.cli import inspect

GOLDENS = pathlib.Path(__file__).parents[1] / "weights" / "huggingface"


def test_a_checkpoint_that_loads(capsys):
    assert inspect.main([str(GOLDENS / "gemma3_vision"), "--read"]) == 0
    out = capsys.readouterr().out
    for line in (
        "(gemma3)",
        "parameters  14,624 in 67 tensors, float32",
        "size        custom: 5 layers, width 16, hidden 24, "
        "4 query and 2 key-value heads of 8, vocabulary 48",
        "none in the folder; 'gemma3' is the published one",
        "language_model.model.layers.*.self_attn.q_proj.weight",
        "(32, 16)             float32  x 5",
        "not read    multi_modal_projector (2 tensors), vision_tower (21 tensors)",
        "loads       yes, every tensor was read",
    ):
        assert line in out


def test_problems_of_a_damaged_checkpoint_are_reported(tmp_path, capsys):
    folder = shutil.copytree(GOLDENS / "gemma2_bidirectional", tmp_path / "copy")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(
        {name: value for name, value in tensors.items() if name != "norm.weight"},
        folder / "model.safetensors",
    )
    assert inspect.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert "loads       no\n" in out and "norm.weight is missing" in out
    tensors["norm.weight"] = np.full_like(tensors["norm.weight"], np.nan)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert inspect.main([str(folder)]) == 0
    assert inspect.main([str(folder), "--read"]) == 1
    assert "norm.weight has values that are not finite" in capsys.readouterr().out


def test_a_folder_without_a_checkpoint_is_a_one_line_error(tmp_path, capsys):
    assert inspect.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not a checkpoint")
    with pytest.raises(SystemExit):
        inspect.main(["--read"])


def test_the_readme_contains_the_table_of_sizes(capsys):
    assert inspect.main(["--sizes"]) == 0
    table = capsys.readouterr().out
    assert "| `gemma2_2b` | 2,614,636,800 | 590,118,912 |" in table
    assert table in (pathlib.Path(__file__).parents[2] / "docs" / "weights.md").read_text()
