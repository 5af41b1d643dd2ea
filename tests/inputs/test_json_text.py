"""Valid JSON, whatever the numbers."""

import ast
import json
import math
import pathlib

import pytest

import gemma_encoder
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import from_json, read_object, to_json

ROOT = pathlib.Path(gemma_encoder.__file__).parent


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null(value):
    nested = {"a": value, "b": [1.5, (value, {"c": value})], "d": "NaN"}
    expected = {"a": None, "b": [1.5, [None, {"c": None}]], "d": "NaN"}
    assert json.loads(to_json(nested)) == expected
    assert to_json(value) == "null"


def test_other_values_are_written_as_by_json():
    value = {"a": [1, 2.5, None, True], "ż": (1,), "c": {}}
    for options in ({}, {"indent": 1}, {"ensure_ascii": False}, {"sort_keys": True}):
        assert to_json(value, **options) == json.dumps(value, **options)
    assert to_json({1}, default=list) == "[1]"


@pytest.mark.parametrize("folder", ["", "experiments", "launch"])
def test_all_json_is_written_by_the_helper(folder):
    """Every call of json.dump and json.dumps in the package forbids NaN."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("json.dump", "json.dumps")
        and "allow_nan" not in [keyword.arg for keyword in node.keywords]
    ]
    assert not calls


@pytest.mark.parametrize("folder", ["", "launch"])
def test_all_json_is_read_by_the_helpers(folder):
    """Deeply nested JSON and integers of many digits are a ValueError everywhere."""
    uses = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "inputs" / "json_text.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads"))
        or (isinstance(node, ast.ImportFrom) and node.module == "json")
    ]
    assert not uses, uses


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "{", b"\xff", "", "nul"])
def test_any_text_that_is_no_json_is_one_error(text, tmp_path):
    with pytest.raises(ValueError):
        from_json(text)
    path = tmp_path / "it.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"it.json cannot be read \(.*; it is damaged"):
        read_object(path)


def test_a_file_that_holds_no_object_is_refused(tmp_path):
    (tmp_path / "it.json").write_text("[]")
    with pytest.raises(InputError, match="it.json holds no JSON object; copy it again"):
        read_object(tmp_path / "it.json", "copy it again")


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_encoder.inputs.untrusted.MAX_BYTES", 1 << 20)
    (tmp_path / "it.json").write_text(" " * (1 << 20) + "{}")
    with pytest.raises(InputError, match="it.json cannot be read .it has more than 1 MB.; it is"):
        read_object(tmp_path / "it.json")
    (tmp_path / "it.json").write_text(" " * ((1 << 20) - 2) + "{}")
    assert read_object(tmp_path / "it.json") == {}
