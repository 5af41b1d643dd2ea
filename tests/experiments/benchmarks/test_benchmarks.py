"""Every subject of the benchmarks at tiny size: ours always, the peer where torch and transformers are installed.

Arms work in this process here, one after another, so that a test takes seconds; that they take turns in processes of their own is what
tests/experiments/test_harness.py is about.
"""

import dataclasses
import importlib
import json
import pathlib
import sys
import time
import types

import numpy as np
import pytest

from gemma_encoder.experiments.benchmarks import all as every
from gemma_encoder.experiments.benchmarks import (
    attention,
    checkpoint,
    cold_start,
    compile_time,
    finetune_sst2,
    fresh,
    harness,
    input_pipeline,
    many_rows,
    models,
    program_sst2,
    rerank,
    scaling,
    starts,
    train_step,
)
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import sizes

HERE = "tests.experiments.test_benchmarks"
WITH_PEER = harness.missing("torch", "transformers", "sentence-transformers", "accelerate") is None


@pytest.fixture
def here(monkeypatch):
    """The subjects' processes become calls; a model "bench" with one local and one global layer is known."""

    def take_turns(arms, repeats, warmup=1):
        seen = {}
        for arm in arms:
            module, _, function = arm.setup.partition(":")
            run = getattr(importlib.import_module(module), function)(**arm.settings)
            seen[arm.name] = []
            for turn in range(warmup + repeats):
                began = time.perf_counter()
                result = dict(run(turn))
                if turn >= warmup:
                    seen[arm.name].append(
                        {"seconds": time.perf_counter() - began, "gib": 0.0} | result
                    )
        return seen

    def run_fresh(function, settings, environment=None):
        module, _, name = function.partition(":")
        began = time.perf_counter()
        result = getattr(importlib.import_module(module), name)(**settings)
        return {"seconds": time.perf_counter() - began, "gib": 0.0} | result

    small = {
        "num_layers": 2,
        "embed_dim": 32,
        "hidden_dim": 48,
        "head_dim": 8,
        "query_scale": 8**-0.5,
        "sliding_window": 16,
    }
    tiny = dataclasses.replace(sizes.GEMMA_CONFIGS["gemma3_tiny"], **small)
    sizes.register_size("bench", dataclasses.replace(tiny, pattern=("local", "global")))
    monkeypatch.setattr(harness, "take_turns", take_turns)
    monkeypatch.setattr(fresh, "run", run_fresh)
    monkeypatch.setattr(
        models,
        "write",
        lambda folder, size, max_length, task=models.TASK, pooling="mean": models._write(
            folder, size, max_length, task, pooling
        ),
    )
    yield
    del sizes.GEMMA_CONFIGS["bench"]


def figures(file: pathlib.Path) -> dict[str, dict]:
    """The rows of a published table by arm."""
    return {row.get("arm", ""): row for row in json.loads(file.read_text())["rows"]}


def lists_file(folder: pathlib.Path, queries=4, documents=3) -> pathlib.Path:
    """Passages in the layout of top100.dev.tsv."""
    words = ["wing", "flow", "plate", "heat", "mach", "layer", "pressure"]
    rng, lines = np.random.default_rng(0), []
    for query in range(queries):
        for number in range(documents):
            passage = " ".join(rng.choice(words, rng.integers(3, 40)))
            lines.append(f"{query}\t{number}\tquery {query} about a wing\t{passage}")
    (folder / "top100.dev.tsv").write_text("\n".join(lines) + "\n")
    return folder / "top100.dev.tsv"


def test_rerank(here, tmp_path, monkeypatch):
    monkeypatch.setenv("MSMARCO_DIR", str(lists_file(tmp_path).parent))
    rerank.main(
        [
            "--size=bench",
            "--repeats=1",
            "--documents=3",
            "--max_length=32",
            "--batch_sizes=2",
            f"--json={tmp_path / 'out.json'}",
        ]
    )
    found = figures(tmp_path / "out.json")
    assert float(found["ours"]["pairs/s"]) > 0
    assert len(found) == 1 + WITH_PEER and found["ours"]["against the best peer"].endswith(
        "x" if WITH_PEER else ""
    )


def test_rerank_gives_every_arm_the_same_new_lists_each_turn(tmp_path):
    file = str(lists_file(tmp_path))
    first, second = (rerank.pairs_of(file, turn, queries=1, documents=2) for turn in (0, 1))
    assert (
        len(first) == 2
        and first == rerank.pairs_of(file, 0, 1, 2)
        and {query for query, _ in first} != {query for query, _ in second}
    )
    assert rerank.pairs_of(file, 4, 1, 2) == first  # the file is at its end


def test_the_pair_makes_the_tasks_text():
    from gemma_encoder.data.ranking import TEMPLATE

    fields = {"query": "what is {this} ?", "document": "a wing ."}
    assert "".join(rerank.as_pair(*fields.values())) == TEMPLATE.render(fields)[0]


def test_rerank_compares_scores_text_by_text(tmp_path):
    for name, scores in {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0], "c": [2.0, 1.0, 3.0]}.items():
        np.save(tmp_path / f"{name}.1.npy", np.array(scores))
    assert rerank.compare(tmp_path, ["a", "b"], range(1, 2)) == 0.0
    assert rerank.compare(tmp_path, ["a", "b", "c"], range(1, 2)) > 1.0  # the same sum


def test_compile_time(here, tmp_path):
    compile_time.main(
        [
            "--depths=2,4",
            "--widths=32",
            "--peer_depths=2",
            "--repeats=1",
            "--starts=",
            f"--json={tmp_path / 'out.json'}",
        ]
    )
    said = json.loads((tmp_path / "out.json").read_text())
    assert [row["layers"] for row in said["rows"] if row["arm"] == "ours"] == [2, 4] and any(
        "ours: 4 layers take" in note for note in said["notes"]
    )


def test_a_start_says_what_it_compiled(here, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from gemma_encoder.experiments import quickstart\n\n\ndef get_config(arg=''):\n    config = quickstart.get_config('smoke')\n"
        "    config.tasks, config.train_for, config.max_eval_examples = ('toy_sentiment',), '1 steps', 8\n    return config\n"
    )
    found = fresh.run(
        "gemma_encoder.experiments.benchmarks.compile_time:start",
        {"config": str(config), "workdir": str(tmp_path / "run"), "cache": ""},
    )
    assert found["compile"] > 0 and found["trace"] > 0 and found["steps"] > 0


def test_cold_start(here, tmp_path):
    cold_start.main(["--size=bench", "--repeats=1", f"--json={tmp_path / 'out.json'}"])
    found = figures(tmp_path / "out.json")
    assert len(found) == 2 + 2 * WITH_PEER and found["ours"]["predicting"].endswith(" s")


def test_checkpoint(here, tmp_path):
    checkpoint.main(
        [
            "--size=bench",
            "--steps=2",
            "--repeats=1",
            f"--folder={tmp_path}",
            f"--json={tmp_path / 'out.json'}",
        ]
    )
    ours = figures(tmp_path / "out.json")["ours"]
    assert float(ours["on disk after"].split()[0]) > 0 and float(ours["size"].split()[0]) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.json"
    ]  # nothing is left behind


def test_the_stall_is_what_blocks_and_what_later_steps_take_more(tmp_path):
    (tmp_path / "saved").write_bytes(b"12345")
    seconds = iter([1.0, 1.0, 9.0, 1.5, 0.5, 1.0])
    found = checkpoint.figures(
        lambda: next(seconds), 3, lambda: lambda: 7.0, lambda: None, tmp_path / "saved"
    )
    assert found["step"] == 1.0 and found["stall"] == pytest.approx(found["blocked"] + 0.5)
    assert found["on_disk"] == 7.0 and found["bytes"] == 5


def test_attention(here, tmp_path):
    flags = [
        "--size=bench",
        "--lengths=16,32",
        "--windows=0,4,16",
        "--repeats=1",
        f"--json={tmp_path / 'out.json'}",
    ]
    attention.main(flags)
    said = json.loads((tmp_path / "out.json").read_text())
    assert [
        (row["tokens"], row["window"]) for row in said["rows"] if row["arm"] == "ours, xla"
    ] == [(16, "none"), (16, 4), (32, "none"), (32, 4), (32, 16)]
    assert all(
        any(f"'{name}' cannot be used: it needs a" in note for note in said["notes"])
        for name in ("splash", "cudnn", "tokamax")
    )
    if WITH_PEER:
        attention.main([*flags, "--soft_cap=2"])


def test_attention_tells_another_window_from_the_same(here):
    settings = {
        "length": 32,
        "soft_cap": 0.0,
        "heads": (4, 2, 8),
        "dtype": "float32",
        "implementation": "xla",
    }
    arms = [
        harness.Arm(
            f"window {window}",
            "gemma_encoder.experiments.benchmarks.attention:ours",
            {**settings, "window": window},
        )
        for window in (4, 5)
    ]
    seen = harness.take_turns(arms, 1)
    with pytest.raises(SystemExit, match="the arms do not compute the same: output is"):
        harness.same("attention", seen, "output", attention.TOLERANCE["float32"])


def test_scaling_on_devices(here, tmp_path, monkeypatch):
    monkeypatch.setattr(
        scaling, "ours", scaling.training_step
    )  # this process has its eight devices already
    scaling.main(
        [
            "devices",
            "--size=bench",
            "--devices=1,2",
            "--rows=1",
            "--length=16",
            "--repeats=1",
            f"--json={tmp_path / 'out.json'}",
        ]
    )
    said = json.loads((tmp_path / "out.json").read_text())
    assert [(row["axis"], row["devices"], row["rows"]) for row in said["rows"]] == [
        ("data", 1, 1),
        ("data", 2, 2),
        ("fsdp", 1, 1),
        ("fsdp", 2, 2),
    ]


def test_the_planners_arguments():
    said = scaling.command("gemma2_2b", 1024, 8, 512, "out.json")
    assert {
        "--topology=v5e:16x16",
        "--slices=4",
        "--config.mesh=(4,-1,1)",
        "--config.batch.rows=8192",
    } <= set(said)
    assert {
        "--topology=v5e:4x4",
        "--slices=1",
        "--config.mesh=(1,-1,1)",
        "--config.batch.rows=128",
    } <= set(scaling.command("gemma2_2b", 16, 8, 512, "out.json"))
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
    }
    plans = [
        {
            **common,
            "chips": 16,
            "seconds": 2.0,
            "seconds_compute": 2.0,
            "seconds_memory": 1.0,
            "seconds_links": 1.0,
        },
        {
            **common,
            "chips": 64,
            "seconds": 4.0,
            "seconds_compute": 2.0,
            "seconds_memory": 1.0,
            "seconds_links": 4.0,
        },
    ]
    _, second = scaling.efficiency(plans)
    assert second[0] == 64 and "1.00 GiB" in second and second[-3:-1] == ["50.0%", "50.0%"]


def test_program_sst2(here, tmp_path, benchmarks, monkeypatch):
    monkeypatch.setattr(program_sst2, "EVALUATED", 4)
    monkeypatch.setattr(
        program_sst2,
        "ours",
        lambda **settings: lambda turn: {"texts": settings["texts"], "loss": 0.7},
    )  # the program: next test
    program_sst2.main(
        ["--size=bench", "--texts=8", "--rows=1", "--repeats=1", f"--json={tmp_path / 'out.json'}"]
    )
    found = figures(tmp_path / "out.json")
    assert len(found) == 2 + 2 * WITH_PEER and float(found["ours"]["texts/s"]) > 0


def test_program_sst2_runs_the_program(tmp_path, benchmarks):
    models._write(tmp_path / "model", "gemma3_tiny", 128, models.TASK, "last_k")
    found = program_sst2.ours(str(tmp_path), texts=4, rows=1, dtype="float32", kept=False)(0)
    assert found["texts"] == 4 and found["seconds"] > 0 and np.isfinite(found["loss"])


def test_program_sst2_gives_both_arms_the_same_texts(tmp_path, benchmarks):
    program_sst2.write_texts(tmp_path / "texts.jsonl", "train", 5)
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    finetune_sst2.write_tokens(tmp_path / "tokens.npz", 5)
    texts, labels = finetune_sst2.read_tokens(tmp_path / "tokens.npz")
    assert len(texts) == 5 and labels.tolist() == [line["label"] for line in lines]


def test_input_pipeline(tmp_path, benchmarks, monkeypatch):
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", "")  # it is set anew
    monkeypatch.setattr(input_pipeline, "waiting", lambda steps, folder: [])
    file = tmp_path / "out.json"
    input_pipeline.main(["--texts=40", "--repeats=1", f"--json={file}"])
    measured = json.loads(file.read_text())
    assert [row["texts_per_second"] > 0 for row in measured["throughput"]] == [True] * 3
    assert measured["first_reading"] > 0
    for row in measured["states"]:
        assert row["longest_seconds"] >= row["median_seconds"] > 0 and row["bytes"] > 0


def test_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(many_rows, "PER_FILE", 700)
    monkeypatch.setattr(many_rows, "PER_GROUP", 300)
    file = tmp_path / "out.json"
    many_rows.main(["--rows=2000,3000", "--texts=200", f"--folder={tmp_path}", f"--json={file}"])
    first, second = json.loads(file.read_text())["rows"]
    assert (first["rows"], second["rows"]) == ("2,000", "3,000")
    assert float(second["texts/s of batches"].replace(",", "")) > 0
    assert list(tmp_path.iterdir()) == [file]  # nothing is left behind


def test_many_rows_refuses_a_disk_that_is_too_small(tmp_path):
    with pytest.raises(SystemExit, match="GB free; 1000000000000000 rows need some"):
        many_rows.measure(tmp_path, 10**15, 1)


def test_starts(here, tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(harness, "missing", lambda *names: "torch not installed")
    settings = []
    monkeypatch.setattr(
        starts,
        "timed",
        lambda command, environment, mark: (
            settings.append(command) or {"seconds": 2.0, "first_step": 1.0, "processors": 3.0}
        ),
    )
    starts.main(["--only=own,sst2", "--repeats=1", f"--json={tmp_path / 'out.json'}"])
    measured = json.loads((tmp_path / "out.json").read_text())
    assert [row["arm"] for row in measured["rows"]] == [
        "own, ours, first start",
        "own, ours, second start",
    ]
    assert measured["notes"] == [
        "sst2 is left out: TFDS_DATA_DIR is not set",
        "the peer is left out: torch not installed, or name another Python by --peer",
    ]
    assert len(settings) == 4 and "--config=own:classification,smoke" in settings[0]
    with pytest.raises(SystemExit):
        starts.main(["--only=nothing"])


def test_starts_runs_the_program(tmp_path):
    for split, count in (("train", 48), ("validation", 24)):
        starts.write_texts(tmp_path / f"{split}.csv", count, 0)
    figures = starts.ours(tmp_path, "own")
    assert 0 < figures["first_step"] < figures["seconds"]


@pytest.mark.skipif(not WITH_PEER, reason="torch and transformers are not installed")
def test_starts_runs_the_peer(here, tmp_path):
    for split, count in (("train", 48), ("validation", 24)):
        starts.write_texts(tmp_path / f"{split}.csv", count, 0)
    models.write(tmp_path / "model", "bench", 128, pooling="last_k")
    models.as_sequence_classifier(tmp_path / "model", tmp_path / "peer", 2)
    figures = starts.theirs(tmp_path, sys.executable)
    assert 0 < figures["first_step"] < figures["seconds"]


def test_a_timed_process_that_fails_says_why():
    command = [sys.executable, "-c", "import sys; print('early'); sys.exit('no such luck')"]
    with pytest.raises(RuntimeError, match="(?s)exited with 1.*no such luck"):
        starts.timed(command, {}, "early")


def echo(value):
    return {"value": value, "argument": 1.0}


def failing():
    raise InputError("no such luck")


def test_a_turn_of_the_training_step_is_so_many_new_batches(monkeypatch):
    clock, seen = iter([0.0, 3.0, 10.0, 16.0]), []
    monkeypatch.setattr(train_step, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))

    def step(number):
        seen.append(number)
        return {"loss": float(number)}

    run = train_step.in_a_row(step, 3)
    assert [run(turn) for turn in range(2)] == [
        {"seconds": 1.0, "loss": 1.0},
        {"seconds": 2.0, "loss": 4.0},
    ]
    assert seen == [0, 1, 2, 3, 4, 5]


def test_a_fresh_process_is_timed_from_its_start():
    found = fresh.run(f"{HERE}:echo", {"value": 3.5})
    assert found["value"] == 3.5 and found["gib"] > 0 and 0.05 < found["seconds"] < 600


def test_a_fresh_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="(?s)exited with 1.*no such luck"):
        fresh.run(f"{HERE}:failing", {})


def test_figures_that_are_no_numbers_are_not_the_same():
    with pytest.raises(SystemExit, match="loss is"):
        harness.same("step", {"a": [{"loss": float("nan")}], "b": [{"loss": 1.0}]}, "loss", 1e9)
    assert harness.same(
        "step", {"a": [{"loss": 1.0}], "b": [{"loss": 1.5}]}, "loss", 0.5
    ) == pytest.approx(1 / 3)


def test_a_head_with_a_bias_is_no_sequence_classifier(here, tmp_path):
    models.write(tmp_path / "model", "bench", 32)
    with pytest.raises(ValueError, match="linear to 1 without a bias"):
        models.as_sequence_classifier(tmp_path / "model", tmp_path / "peer", 1)
    models.as_sequence_classifier(tmp_path / "model", tmp_path / "two", 2)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (
        config["architectures"] == ["Gemma3TextForSequenceClassification"]
        and len(config["id2label"]) == 2
    )


def test_data_that_is_absent_is_named(monkeypatch):
    monkeypatch.setenv("MSMARCO_DIR", "/nowhere")
    with pytest.raises(
        SystemExit, match="MSMARCO_DIR must name a folder with top100.dev.tsv; /nowhere has none"
    ):
        rerank.main(["--size=bench"])


def test_all_names_every_subject(tmp_path, capsys):
    subjects = {run.subject for run in every.RUNS}
    folder = pathlib.Path(every.__file__).parent
    comparisons = {
        file.stem
        for file in folder.glob("*.py")
        if "harness.parser(" in file.read_text() and file.stem != "harness"
    }
    assert comparisons <= subjects and all(
        (folder / f"{subject}.py").exists() for subject in subjects
    )
    assert every.main(["--device=cuda", "--dtype=bfloat16", "--dry_run", f"--json={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert (
        "gemma_encoder.experiments.benchmarks.train_step --size=gemma2_2b --rows=16 --length=512 --compiled --device=cuda --dtype=bfloat16"
        in printed
    )
    with pytest.raises(SystemExit):
        every.main(["--only=nothing"])


def test_all_says_what_failed(tmp_path, monkeypatch, capsys):
    runs = (
        every.BenchmarkCommand("one", "matmul_limit", "--width=none", None, None, dtype=False),
        every.BenchmarkCommand("two", "rerank", "", None, None, data="NO_SUCH_VARIABLE"),
    )
    monkeypatch.setattr(every, "RUNS", runs)
    assert every.main(["--smoke", f"--json={tmp_path}"]) == 1
    printed = capsys.readouterr().out
    assert (
        "invalid int value: 'none'" in printed
        and "left out: NO_SUCH_VARIABLE is not set" in printed
        and "failed: one" in printed
    )
