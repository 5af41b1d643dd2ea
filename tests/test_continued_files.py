"""A file that is continued after any kill is that of an unbroken run; damage is one line."""

import pathlib

import pytest

from gemma_encoder import continued_files, whole_files
from gemma_encoder.continued_files import ContinuedFile
from gemma_encoder.inputs.errors import InputError

SETTINGS = {"model": "a", "level": 0.9, "keep": ["id"]}
CHUNKS = [b"one\n", "zwölf\n".encode(), b"three\n" * 100, b"four\n"]
WHOLE = b"".join(CHUNKS)


def write(output, settings=SETTINGS, stop=4, convert=None):
    """Writes the chunks that are left, a commit each, and returns how many there were before."""
    with ContinuedFile(output, settings, f"--output={output}") as file:
        before = (file.read() or {"chunks": 0})["chunks"]
        file.begin()
        for index in range(before, stop):
            file.write(CHUNKS[index])
            file.commit({"chunks": index + 1})
        if stop == len(CHUNKS):
            file.finish(convert)
    return before


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stop", range(4))
def test_it_is_continued_after_the_last_commit(tmp_path, stop):
    output = tmp_path / "o"
    write(output, stop=stop)
    assert names(tmp_path) == (["o.part", "o.part.json"] if stop else [])
    with (tmp_path / "o.part").open("ab") as file:
        file.write(b"half a li")
    assert write(output) == stop
    assert output.read_bytes() == WHOLE and names(tmp_path) == ["o"]


def test_it_may_be_converted_at_the_end(tmp_path):
    def convert(source, target):
        target.write_bytes(source.read_bytes().upper())

    def failing(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"--output=.*o cannot be written: No space.*to resume"):
        write(tmp_path / "o", convert=failing)
    assert names(tmp_path) == ["o.part", "o.part.json"]
    assert write(tmp_path / "o", convert=convert) == len(CHUNKS)
    assert (tmp_path / "o").read_bytes() == WHOLE.upper() and names(tmp_path) == ["o"]


@pytest.mark.parametrize(
    "settings", [{**SETTINGS, "model": "b"}, {"model": "a"}, {**SETTINGS, "new": 1}]
)
def test_other_settings_are_refused(tmp_path, settings):
    write(tmp_path / "o", stop=2)
    before = (tmp_path / "o.part").read_bytes()
    with pytest.raises(InputError, match=r"o.part was left by another command \(.*->"):
        write(tmp_path / "o", settings)
    assert (tmp_path / "o.part").read_bytes() == before
    assert write(tmp_path / "o") == 2


@pytest.mark.parametrize("name", ["o.part", "o.part.json"])
def test_every_flipped_byte_is_noticed(tmp_path, name):
    write(tmp_path / "o", stop=2)
    path = tmp_path / name
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (1, 64):
            flipped = bytes([content[position] ^ bit])
            path.write_bytes(content[:position] + flipped + content[position + 1 :])
            with pytest.raises(InputError, match=r"do not match.*remove both") as caught:
                write(tmp_path / "o")
            assert "\n" not in str(caught.value)
    path.write_bytes(content)
    assert write(tmp_path / "o") == 2 and (tmp_path / "o").read_bytes() == WHOLE


@pytest.mark.parametrize("name", ["o.part", "o.part.json"])
@pytest.mark.parametrize("size", [0, 5, None])
def test_cut_and_missing_files_are_noticed(tmp_path, name, size):
    write(tmp_path / "o", stop=2)
    path = tmp_path / name
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:size])
    if (name, size) == ("o.part.json", None):
        assert write(tmp_path / "o") == 0  # bytes alone are of no use
        assert (tmp_path / "o").read_bytes() == WHOLE
        return
    with pytest.raises(InputError, match=r"do not match.*remove both"):
        write(tmp_path / "o")
    (tmp_path / "o.part").unlink(missing_ok=True)
    (tmp_path / "o.part.json").unlink(missing_ok=True)
    assert write(tmp_path / "o") == 0 and (tmp_path / "o").read_bytes() == WHOLE


class Killed(BaseException):
    """Simulates SIGKILL, after which nothing is tidied up."""


@pytest.mark.parametrize("convert", [None, lambda source, target: target.write_bytes(WHOLE)])
def test_a_kill_between_any_two_operations_is_harmless(tmp_path, monkeypatch, convert):
    """Each operation on files is the last one once."""
    counter = {"left": 0}

    def counted(function):
        def call(*arguments, **options):
            if not counter["left"]:
                raise Killed
            counter["left"] -= 1
            return function(*arguments, **options)

        return call

    for kill in range(40):
        folder = tmp_path / str(kill)
        folder.mkdir()
        counter["left"] = kill
        with monkeypatch.context() as patch:
            for owner, name in [
                (whole_files.os, "replace"),
                (continued_files.os, "fsync"),
                (pathlib.Path, "unlink"),
            ]:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                write(folder / "o", convert=convert)
            except Killed:
                pass
            else:
                break
        write(folder / "o", convert=convert)
        assert (folder / "o").read_bytes() == WHOLE
        assert set(names(folder)) <= {"o", "o.lock", ".o.tmp", ".o.part.json.tmp"}
    assert kill > 15


def test_a_full_disk_is_one_line_and_the_rest_is_written_later(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    write(tmp_path / "o", stop=2)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(continued_files.os, name, full)
            with pytest.raises(InputError, match=r"No space left.*o.part, rerun the command"):
                write(tmp_path / "o")
    assert write(tmp_path / "o") == 2 and (tmp_path / "o").read_bytes() == WHOLE


def test_without_a_commit_nothing_is_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(continued_files.os, "fsync", full)
        with pytest.raises(InputError, match=r"o cannot be written: No space.*device; rerun the"):
            write(tmp_path / "o")
    assert not names(tmp_path)


def test_a_link_in_a_shared_folder_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("safe")
    (tmp_path / "o.part").symlink_to("target")
    with pytest.raises(InputError, match="o cannot be written"):
        write(tmp_path / "o")
    assert (tmp_path / "target").read_text() == "safe"
