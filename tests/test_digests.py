"""Damage of any file of a folder is noticed; updates that are killed leave no seeming damage."""

import shutil

import google_crc32c
import pytest

from gemma_encoder import digests
from gemma_encoder.digests import DamagedFileError
from gemma_encoder.inputs.json_text import read_object, to_json

CONTENTS = {"a": b"", "sub/b": b"small", "sub/deep/c": bytes(range(256)) * 4096 * 2}


@pytest.fixture
def folder(tmp_path):
    """A folder with digests, of small and of large files."""
    folder = tmp_path / "it"
    for name, content in CONTENTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    digests.write(folder)
    return folder


def damage(path, how):
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "append":
        path.write_bytes(content + b"\0")
    else:
        position = len(content) * 2 // 3
        changed = bytes([content[position] ^ 1])
        path.write_bytes(content[:position] + changed + content[position + 1 :])


@pytest.mark.parametrize("how", ["delete", "cut", "append", "flip"])
@pytest.mark.parametrize("name", [*CONTENTS, digests.NAME])
def test_damage_of_a_file_is_named(folder, name, how):
    digests.check(folder)
    if name == "a" and how in ("cut", "flip"):
        return  # it is empty
    damage(folder / name, how)
    if (name, how) == (digests.NAME, "delete"):
        digests.check(folder)  # nothing to compare with
        return
    with pytest.raises(DamagedFileError) as caught:
        digests.check(folder)
    assert caught.value.path == folder / name
    assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value)


def test_only_the_files_that_are_read_are_checked(folder):
    damage(folder / "sub" / "b", "flip")
    digests.check(folder, ["a", "sub/deep"])
    with pytest.raises(DamagedFileError):
        digests.check(folder, ["sub"])


def test_the_check_can_be_switched_off(folder, monkeypatch):
    damage(folder / "sub" / "b", "flip")
    monkeypatch.setenv(digests.OFF, "0")
    digests.check(folder)


def test_damage_is_named_rather_than_the_error_it_causes(folder):
    damage(folder / "sub" / "deep" / "c", "flip")
    with pytest.raises(DamagedFileError, match="deep/c is damaged"), digests.verified(folder):
        raise ValueError("a library's message")


def test_an_error_of_whole_files_passes(folder):
    with pytest.raises(ZeroDivisionError), digests.verified(folder):
        raise ZeroDivisionError


@pytest.mark.parametrize("body", [b"", b"\1", b"one body", b"its size" * 999])
def test_files_that_end_with_their_own_crc_differ(folder, body):
    """So do all files of OCDBT, and the CRC-32C of each as a whole is the same."""
    contents = [body, bytes(byte ^ 1 for byte in body)]
    contents = [each + google_crc32c.value(each).to_bytes(4, "little") for each in contents]
    assert len({google_crc32c.value(each) for each in contents}) == 1
    (folder / "a").write_bytes(contents[0])
    digests.write(folder)
    digests.check(folder)
    (folder / "a").write_bytes(contents[1])
    if body:
        with pytest.raises(DamagedFileError, match="a is damaged"):
            digests.check(folder)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("how", ["delete", "cut", "flip"])
def test_one_share_checks_the_content_of_a_large_file(folder, count, how):
    damage(folder / "sub" / "deep" / "c", how)
    seen = []
    for index in range(count):
        try:
            with digests.verified(folder, share=(index, count)):
                pass
        except DamagedFileError:
            seen.append(index)
    assert len(seen) == (1 if how == "flip" else count)
    if how == "flip":
        with digests.verified(folder, share=(0, 0)):
            pass


@pytest.mark.parametrize("name", ["../b", "/etc/passwd", "sub/../../b", "\0"])
def test_names_outside_the_folder_are_refused(folder, name):
    content = read_object(folder / digests.NAME)
    files = content["files"] | {name: ["0-00000000-"]}
    check = digests._digest_of_names(files)
    (folder / digests.NAME).write_text(to_json(content | {"files": files, "digest": check}))
    with pytest.raises(digests.InputError, match="not inside its folder"):
        digests.check(folder)


@pytest.mark.parametrize("entry", [5, "x", ["x"], [5], [None], ["9" * 5000 + "-00000000-"]])
def test_digests_of_another_form_are_damaged(folder, entry):
    content = read_object(folder / digests.NAME)
    files = content["files"] | {"a": entry}
    check = digests._digest_of_names(files)
    (folder / digests.NAME).write_text(to_json(content | {"files": files, "digest": check}))
    with pytest.raises(DamagedFileError, match="digests.json is damaged"):
        digests.check(folder)


def test_a_file_that_is_replaced_meanwhile_is_whole(folder, monkeypatch):
    """A reader has the former digests, and meets the new file."""
    select = digests._select

    def outrun(*arguments):
        selected = select(*arguments)
        digests.update(folder, {"sub/b": b"replaced"})
        return selected

    monkeypatch.setattr(digests, "_select", outrun)
    digests.check(folder)
    monkeypatch.setattr(digests, "_select", select)
    damage(folder / "sub" / "b", "cut")
    with pytest.raises(DamagedFileError):
        digests.check(folder)


class Killed(BaseException):
    """Simulates SIGKILL, which no handler sees."""


@pytest.mark.parametrize("survivors", range(5))
def test_an_update_that_is_killed_leaves_whole_files(folder, tmp_path, killed_after, survivors):
    """After each of its file operations: the digests, two contents, the digests again."""
    new = {"sub/b": b"new", "sub/d": b"another"}
    with killed_after(survivors, Killed):
        if survivors < 4:
            with pytest.raises(Killed):
                digests.update(folder, new)
        else:
            digests.update(folder, new)
    digests.check(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy / "sub" / "b", "delete")
    with pytest.raises(DamagedFileError, match="b is missing"):
        digests.check(copy)
    digests.update(folder, new)
    digests.check(folder)
    assert (folder / "sub" / "b").read_bytes() == b"new"
    damage(folder / "sub" / "b", "flip")
    with pytest.raises(DamagedFileError):
        digests.check(folder)
