"""Damaged, incomplete and empty checkpoints: one line with the file and a whole checkpoint."""

import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import gemma_encoder as ge
from gemma_encoder import digests
from gemma_encoder.cli import inspect
from gemma_encoder.inputs import errors
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.weights import checkpoint_folders, native
from gemma_encoder.weights.backbone import load_tokenizer, open_checkpoint

FIRST = pathlib.Path(__file__).parent / "format_1" / "checkpoints" / "4"
FILES = sorted(path.relative_to(FIRST).as_posix() for path in FIRST.rglob("*") if path.is_file())
READ = [name for name in FILES if name.startswith(("inference/", "parameters/"))]
DAMAGES = ("delete", "cut", "empty", "flip", "swap", "folder")
OTHER = "inference/commit_success.txt"  # the file that is swapped with another
DOORS = {
    "predict": ge.Predictor.load,
    "backbone": ge.load_backbone,
    "tokenizer": load_tokenizer,
    "open": open_checkpoint,
}


@pytest.fixture
def workdir(tmp_path):
    """A workdir with whole checkpoints of the steps 4, 8 and 12, and their digests."""
    for step in (4, 8, 12):
        folder = shutil.copytree(FIRST, tmp_path / "run" / "checkpoints" / str(step))
        digests.write(folder)
    return tmp_path / "run"


@pytest.fixture
def small_is_large(monkeypatch):
    """Treats nearly all files as large: their content is checked while they are read."""
    monkeypatch.setattr(digests, "SMALL", 100)


def damage(path, how):
    """Damages a file of the checkpoint 12."""
    content = path.read_bytes()
    if how in ("delete", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flip":
        generator = random.Random(path.name)
        flipped = bytearray(content)
        for _ in range(20):
            flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(flipped))
    elif how == "swap":
        other = next(parent for parent in path.parents if parent.name == "12") / OTHER
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)


@pytest.fixture
def damaged(workdir):
    """`damaged(name)` yields each damage of a file of the newest checkpoint, which it repairs."""
    newest = workdir / "checkpoints" / "12"

    def each(name):
        for how in DAMAGES:
            damage(newest / name, how)
            yield how
            shutil.rmtree(newest / name, ignore_errors=True)
            for path in (name, OTHER):
                shutil.copy(FIRST / path, newest / path)

    return each


def refusal(door, path):
    """Returns the one line with which a door refuses a path."""
    with pytest.raises(InputError) as caught:
        DOORS[door](path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [name for name in READ if "commit_success" not in name])
def test_damage_is_one_line_that_names_file_and_remedy(workdir, damaged, name, small_is_large):
    newest = workdir / "checkpoints" / "12"
    for how in damaged(name):
        for door in ("predict", "backbone"):
            line = refusal(door, workdir)
            assert f"{newest / name} is" in line or (how == "swap" and OTHER in line)
            assert f"before it is {newest.with_name('8')}: name that one to predict" in line
            assert f"or move {newest} away to resume" in line


@pytest.mark.parametrize("off", [False, True], ids=["absent", "off"])
@pytest.mark.parametrize("name", READ)
def test_without_digests_damage_is_no_traceback(workdir, damaged, name, off, monkeypatch):
    if off:
        monkeypatch.setenv(digests.OFF, "0")
    else:
        for path in workdir.rglob(digests.NAME):
            path.unlink()
    for how in damaged(name):
        try:
            ge.Predictor.load(workdir)
        except InputError as error:
            line = str(error)
            assert "\n" not in line and str(workdir / "checkpoints" / "12") in line, how
            assert f"before it is {workdir / 'checkpoints' / '8'}" in line, how


@pytest.mark.parametrize("door", DOORS)
def test_each_door_refuses_a_checkpoint_in_part(workdir, door):
    """A folder with some of its files is never skipped, and never taken for another format."""
    newest = workdir / "checkpoints" / "12"
    for part in ("inference", "parameters"):
        shutil.move(newest / part, workdir.parent / part)
        for path in (workdir, newest):
            line = refusal(door, path)
            assert f"{newest / part}" in line and "is missing" in line
        shutil.move(workdir.parent / part, newest / part)
    shutil.rmtree(newest / "inference")
    (newest / digests.NAME).unlink()
    assert f"{newest}/inference/inference.json cannot be read" in refusal(door, newest)


def test_the_newest_whole_checkpoint_is_searched(workdir):
    folder = workdir / "checkpoints"
    damage(folder / "12" / "inference" / "inference.json", "flip")
    damage(folder / "8" / "parameters" / "_METADATA", "cut")
    line = refusal("predict", workdir)
    assert f"before it is {folder / '4'}: " in line
    assert line.endswith(f"move {folder / '12'} and {folder / '8'} away to resume")
    assert f"before it is {folder / '4'}: " in refusal("backbone", folder / "8")
    (folder / "4" / digests.NAME).unlink()  # of an older version: taken as it is
    assert f"before it is {folder / '4'}: " in refusal("predict", workdir)
    (folder / "4" / "inference" / "tokenizer.model").unlink()
    assert "there is no whole checkpoint before it" in refusal("predict", workdir)
    copy = shutil.copytree(folder / "12", workdir / "copy")
    assert refusal("predict", copy).endswith("restore it, or use another checkpoint")


@pytest.mark.parametrize("content", ["", "inference", "inference parameters/d"])
def test_a_newer_folder_without_a_file_is_skipped(workdir, content, caplog):
    newer = workdir / "checkpoints" / "99"
    newer.mkdir()
    for name in content.split():
        (newer / name).mkdir(parents=True)
    assert native.checkpoint_steps(workdir) == [4, 8, 12]
    assert native.find(workdir).name == "12"
    assert ge.Predictor.load(workdir).spec.step == 4
    assert f"{newer} holds no file and is skipped" in caplog.text
    (newer / "x").write_text("")
    assert f"{newer / 'inference/inference.json'} cannot be read" in refusal("predict", workdir)
    assert f"before it is {newer.with_name('12')}: " in refusal("predict", workdir)


def test_other_names_are_no_checkpoints(workdir):
    for name in ("12.orbax-checkpoint-tmp", "012", "x", "²", "12.orbax-checkpoint-tmp-whole"):
        (workdir / "checkpoints" / name / "y").mkdir(parents=True)
        (workdir / "checkpoints" / name / "z").write_text("")
    (workdir / "checkpoints" / "77").write_text("a file")
    assert native.checkpoint_steps(workdir) == [4, 8, 12]
    assert native.checkpoint_steps(workdir / "nowhere") == []


def test_each_large_file_is_digested_once_a_load(workdir, small_is_large, monkeypatch):
    names = []
    digest_of_file = digests._digest_of_file

    def counted(path, *arguments):
        names.append(path.name)
        return digest_of_file(path, *arguments)

    monkeypatch.setattr(digests, "_digest_of_file", counted)
    large = [path for path in (FIRST / "parameters").rglob("*") if path.is_file()]
    large = [path.name for path in large if path.stat().st_size >= digests.SMALL]
    for load in (ge.Predictor.load, ge.load_backbone):
        load(workdir)
        assert sorted(name for name in names if name in large) == sorted(large)
        names.clear()
    checkpoint = open_checkpoint(workdir)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for name in checkpoint.tensors:
        checkpoint.read(name, device)
    assert sorted(name for name in names if name in large) == sorted(large)


def test_inspect_names_a_damaged_file_once(workdir, small_is_large, capsys):
    chunk = max((workdir / "checkpoints/12/parameters").rglob("*"), key=lambda p: p.stat().st_size)
    damage(chunk, "flip")
    assert inspect.main([str(workdir)]) == 0
    assert inspect.main([str(workdir), "--read"]) == 1
    assert capsys.readouterr().out.count(f"{chunk} is damaged") == 1


@pytest.mark.parametrize("large", ["share", "check", "skip"])
def test_an_error_of_whole_files_is_not_damage(workdir, large):
    checkpoint = native.find(workdir)

    def fail(error, message):
        reading = checkpoint_folders.reading(checkpoint, large=large)
        with pytest.raises(InputError, match=message), reading:
            raise error

    fail(KeyError("no"), "12 cannot be read: 'no'; its files are as they were written")
    fail(InputError("of another model"), "^of another model$")
    (checkpoint / digests.NAME).unlink()
    fail(KeyError("no"), "it is damaged or belongs to another run; the newest whole checkpoint")


def test_too_little_memory_is_not_damage(workdir, monkeypatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")

    def restore(*_):
        raise error

    monkeypatch.setattr(native, "_restore", restore)
    for load in (ge.Predictor.load, ge.load_backbone):
        with pytest.raises(InputError, match=f"Out of memory.*; {errors.TOO_LARGE}$"):
            load(workdir)


def test_a_checkpoint_that_a_run_deletes_is_not_damaged(workdir):
    newest = workdir / "checkpoints" / "12"
    with (
        pytest.raises(InputError, match="12 was deleted meanwhile, as a run does .*: try again"),
        checkpoint_folders.reading(newest),
    ):
        shutil.rmtree(newest)
        (newest / "inference" / "tokenizer.model").read_bytes()


def test_a_damaged_description_is_not_calibrated(workdir):
    path = workdir / "checkpoints" / "12" / "inference" / "inference.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"toy_ranking", b"toy_rankinG", 1))
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"inference.json is damaged"):
        native.store_calibrations(native.find(workdir), {})
    assert path.read_bytes() == before
    path.write_bytes(content)
    native.store_calibrations(native.find(workdir), {})
    digests.check(workdir / "checkpoints" / "12")


def test_whole_checkpoints_load_the_same_with_and_without(workdir, monkeypatch):
    checked = nnx.state(ge.load_backbone(workdir))
    monkeypatch.setenv(digests.OFF, "0")
    unchecked = nnx.state(ge.load_backbone(workdir))
    jax.tree.map(np.testing.assert_array_equal, checked, unchecked)


def test_a_workdir_that_has_no_checkpoint_yet_says_so(tmp_path):
    """Its config.json is not that of a Hugging Face folder."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="has no checkpoint; give the workdir of a training run"):
        open_checkpoint(tmp_path)
