"""Scaling: a row per axis and number of devices, the planner's arguments, and efficiencies."""

import json

import pytest

from gemma_encoder.experiments.benchmarks import scaling


def test_scaling_on_devices(in_process, tmp_path, monkeypatch):
    # This process has eight devices already.
    monkeypatch.setattr(scaling, "ours", scaling.training_step)
    file = tmp_path / "out.json"
    flags = ["--size=bench", "--devices=1,2", "--rows=1", "--length=16", "--repeats=1"]
    scaling.main(["devices", *flags, f"--json={file}"])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["axis"], row["devices"], row["rows"]) for row in rows] == [
        ("data", 1, 1),
        ("data", 2, 2),
        ("fsdp", 1, 1),
        ("fsdp", 2, 2),
    ]


def test_arguments_of_the_planner():
    four_slices = scaling.command("gemma2_2b", 1024, 8, 512, "out.json")
    assert {
        "--topology=v5e:16x16",
        "--slices=4",
        "--config.mesh=(4,-1,1)",
        "--config.batch.rows=8192",
    } <= set(four_slices)
    part_of_a_slice = scaling.command("gemma2_2b", 16, 8, 512, "out.json")
    assert {
        "--topology=v5e:4x4",
        "--slices=1",
        "--config.mesh=(1,-1,1)",
        "--config.batch.rows=128",
    } <= set(part_of_a_slice)
    with pytest.raises(SystemExit, match="or a multiple of 256, got 300"):
        scaling.command("gemma2_2b", 300, 8, 512, "out.json")


def test_weak_scaling_efficiency():
    common = {
        "slices": 1,
        "topology": "v5e:4x4",
        "mesh": (1, 16, 1),
        "rows": 8,
        "collectives": [{"traffic": 2.0**30}],
        "peak": 2**30,
        "memory": 2**34,
        "fits": True,
        "seconds_compute": 2.0,
        "seconds_memory": 1.0,
    }
    plans = [
        {**common, "chips": 16, "seconds": 2.0, "seconds_links": 1.0},
        {**common, "chips": 64, "seconds": 4.0, "seconds_links": 4.0},
    ]
    _, second = scaling.efficiency(plans)
    assert second[0] == 64
    assert "1.00 GiB" in second
    assert second[-3:-1] == ["50.0%", "50.0%"]
