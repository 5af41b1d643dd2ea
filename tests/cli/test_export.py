"""`gemma-encoder export` to both formats."""

import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder import cli


@pytest.fixture(scope="module")
def exported(random_predictor, tmp_path_factory):
    """A checkpoint to export: an export of random weights."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    ge.export_huggingface(random_predictor(), folder, heads=False)
    return folder


def test_to_hugging_face_and_to_gemma(exported, tmp_path, capsys):
    again = tmp_path / "again"
    gemma = tmp_path / "gemma"
    words = ["export", f"--workdir={exported}"]
    assert cli.main([*words, f"--output={again}", "--heads=false"]) == 0
    assert f"wrote {again}" in capsys.readouterr().out
    texts = ["a fine film .", "a dull one ."]
    np.testing.assert_array_equal(
        ge.Predictor.load(again).embed(texts), ge.Predictor.load(exported).embed(texts)
    )
    assert cli.main([*words, f"--output={gemma}", "--format=gemma"]) == 0
    tokens = np.ones((1, 4), np.int32)
    np.testing.assert_array_equal(
        ge.load_backbone(gemma)(tokens, attention="causal"),
        ge.load_backbone(exported)(tokens, attention="causal"),
    )
    assert ge.load_tokenizer(gemma).model == ge.load_tokenizer(exported).model
    # An existing folder is not overwritten.
    for output, output_format in ((again, "huggingface"), (gemma, "gemma")):
        assert cli.main([*words, f"--output={output}", f"--format={output_format}"]) == 2
        error = capsys.readouterr().err
        assert "name a new folder" in error and error.count("\n") == 1
