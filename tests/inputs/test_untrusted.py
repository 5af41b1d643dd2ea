"""Texts and paths of strangers have no effect outside of where they belong."""

import pathlib

import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.untrusted import inside, printable


def test_control_characters_are_shown_as_escapes():
    assert printable("a\x1b[31mred\x1b[0m") == r"a\x1b[31mred\x1b[0m"
    assert printable("\x9b2J\x07\r\u202eabc\ud800") == r"\x9b2J\x07\r\u202eabc\ud800"
    assert printable("tab\tline\n") == "tab\tline\n"
    assert printable("tab\tline\n", allowed="") == r"tab\tline\n"


def test_other_characters_stay():
    text = "naïve 日本語 👩\u200d👩 e\u0301 \u00a0"
    assert printable(text) == text


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/x", "//x", "a\0b", 3, None, ["a"]])
def test_paths_that_leave_the_folder_are_refused(name):
    with pytest.raises(InputError, match=r"index.json names .*, which is not inside its folder"):
        inside(pathlib.Path("folder"), name, "index.json")


def test_paths_inside_the_folder():
    folder = pathlib.Path("folder")
    assert inside(folder, "", "x") == folder
    assert inside(folder, "1_Dense/model.safetensors", "x") == folder / "1_Dense/model.safetensors"
