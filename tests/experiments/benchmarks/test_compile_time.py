"""Compile time: growth with depth, and the seconds that a start of the program compiles."""

import json
import textwrap

from gemma_encoder.experiments.benchmarks import compile_time, fresh


def test_compile_time(in_process, tmp_path):
    file = tmp_path / "out.json"
    flags = ["--depths=2,4", "--widths=32", "--peer_depths=2", "--repeats=1", "--starts="]
    compile_time.main([*flags, f"--json={file}"])
    table = json.loads(file.read_text())
    assert [row["layers"] for row in table["rows"] if row["arm"] == "ours"] == [2, 4]
    assert any("ours: 4 layers take" in note for note in table["notes"])


def test_start_reports_seconds_of_tracing_and_compiling(in_process, tmp_path):
    config = tmp_path / "config.py"
    source = """
        from gemma_encoder.experiments import quickstart


        def get_config(arg=''):
            config = quickstart.get_config('smoke')
            config.tasks = ('toy_sentiment',)
            config.train_for = '1 steps'
            config.max_eval_examples = 8
            return config
    """
    config.write_text(textwrap.dedent(source))
    figures = fresh.run(
        f"{compile_time.__name__}:start",
        {"config": str(config), "workdir": str(tmp_path / "run"), "cache": ""},
    )
    assert figures["compile"] > 0
    assert figures["trace"] > 0
    assert figures["steps"] > 0
