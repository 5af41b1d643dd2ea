"""Texts, paths and files of strangers have no effect outside of where they belong."""

import os
import pathlib

import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.untrusted import html_text, inside, printable, read_bounded


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


@pytest.mark.parametrize("kind", ["pipe", "device", "large file"])
def test_files_without_an_end_are_not_read(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("gemma_encoder.inputs.untrusted.MAX_BYTES", 1 << 20)
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(OSError, match="more than 1 MB|a pipe or a device") as caught:
        read_bounded(path)
    assert caught.value.filename == str(path)
    path.unlink()
    path.write_bytes(bytes(1 << 20))
    assert read_bounded(path) == bytes(1 << 20)


def test_texts_of_html_are_no_markup():
    text = html_text("<b title='x'>\x1b[2J\u202e & \"é\"\n")
    assert text == "&lt;b title=&#x27;x&#x27;&gt;\\x1b[2J\\u202e &amp; &quot;é&quot;\n"
