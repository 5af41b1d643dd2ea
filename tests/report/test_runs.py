"""Reading the tasks of a run from its newest checkpoint."""

import pathlib
import shutil

import pytest

from gemma_encoder import digests
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.report.runs import RunFiles
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.weights import checkpoint_folders

FIRST = pathlib.Path(__file__).parents[1] / "weights" / "format_1" / "checkpoints" / "4"


@pytest.fixture
def workdir(tmp_path):
    """A workdir with the whole checkpoints 4 and 8."""
    (tmp_path / "config.json").write_text(to_json(TrainConfig().to_dict()))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}\n')
    for step in (4, 8):
        digests.write(shutil.copytree(FIRST, tmp_path / "checkpoints" / str(step)))
    return tmp_path


@pytest.mark.parametrize("has_digests", [True, False])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b'{"tasks": [5]}', b"\xff"])
def test_a_damaged_newest_checkpoint_is_one_line(workdir, content, has_digests):
    assert RunFiles.load(workdir, "run").tasks
    newest = workdir / "checkpoints" / "8"
    path = newest / "inference" / "inference.json"
    if not has_digests:
        (newest / digests.NAME).unlink()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    if content == b"{}" and not has_digests:
        assert not RunFiles.load(workdir, "run").tasks
        return
    with pytest.raises(InputError) as caught:
        RunFiles.load(workdir, "run")
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(newest))


def test_a_newest_folder_without_a_file_is_skipped(workdir):
    (workdir / "checkpoints" / "99" / "inference").mkdir(parents=True)
    assert RunFiles.load(workdir, "run").tasks


def test_a_checkpoint_that_a_run_replaces_is_no_damage(workdir, monkeypatch):
    read = checkpoint_folders.read_description
    folder = workdir / "checkpoints"

    def replacing(checkpoint):
        if checkpoint.name == "8":
            shutil.copytree(folder / "4", folder / "12")
            shutil.rmtree(folder / "8")
        return read(checkpoint)

    monkeypatch.setattr(checkpoint_folders, "read_description", replacing)
    assert RunFiles.load(workdir, "run").tasks
