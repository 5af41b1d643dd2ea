"""Topologies, and the code that workers and images install."""

import io
import subprocess
import tarfile

import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.launch import cluster, tpu_vm, xpk
from gemma_encoder.launch.topology import Topology


@pytest.mark.parametrize(
    ("text", "accelerator_type", "chips", "tpu_vms", "pods"),
    [
        ("v5e:1x1", "v5litepod-1", 1, 1, 1),
        ("v5e:2x4", "v5litepod-8", 8, 1, 2),
        ("v5e:4x4", "v5litepod-16", 16, 4, 4),
        ("v6e:8x8", "v6e-64", 64, 16, 16),
        ("v5p:2x2x1", "v5p-8", 4, 1, 1),
        ("v5p:4x4x4", "v5p-128", 64, 16, 16),
        ("v4:2x2x2", "v4-16", 8, 2, 2),
    ],
)
def test_topology_has_accelerator_type_and_hosts(text, accelerator_type, chips, tpu_vms, pods):
    """v4 and v5p count cores and have four chips per host; only v5e and v6e have hosts of eight."""
    topology = Topology.parse(text)
    assert (topology.accelerator_type, topology.chips) == (accelerator_type, chips)
    assert topology.hosts(tpu_vm.MAX_CHIPS_PER_VM) == tpu_vms
    assert topology.hosts(xpk.MAX_CHIPS_PER_NODE) == pods


@pytest.mark.parametrize(
    "text", ["", "v5e", "8x8", "v5e:64", "v5p:8x8", "v5p:2x4x8", "v5e:8x8x1", "V5E:8x8"]
)
def test_shape_without_accelerator_type_is_rejected(text):
    """v5p-128 is 4x4x4, so a request for 2x4x8 would yield another slice than the planned one."""
    with pytest.raises(InputError, match="topology"):
        Topology.parse(text)


def test_workers_and_images_install_the_locked_libtpu():
    lock = (cluster.ROOT / "requirements" / "py311-test.txt").read_text()
    assert "\nlibtpu==" in lock and "\njax==" in lock
    for file in ("Dockerfile", "worker.py"):
        text = (cluster.ROOT / "launch" / file).read_text()
        assert "requirements/py311-test.txt" in text and ".[train,tpu]" in text


def test_archive_preserves_the_symbolic_links_of_the_package(tmp_path):
    """Workers and images unpack `git archive HEAD`; the package contains links to two folders."""
    pack = ["git", "-C", str(cluster.ROOT), "archive", "HEAD", "gemma_encoder", "launch"]
    archive = subprocess.run(pack, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        file.extractall(tmp_path)
    assert (tmp_path / "gemma_encoder" / "launch" / "worker.py").is_file()
