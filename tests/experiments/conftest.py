"""A tiny decoder, tiny data, one smoke sweep over every study, and constructed results."""

import contextlib
import dataclasses
import io
import pathlib

import numpy as np
import pytest

from gemma_encoder.cli import sweep as program
from gemma_encoder.experiments.studies import results
from gemma_encoder.experiments.studies.results import RunKey

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# Two rows of every study, the baseline among them; most baselines are the same run.
ROWS = {
    "attention": "bidirectional,causal_random",
    "pooling": "mean_bidirectional,attention_query_bidirectional",
    "dropout": "feed_forward_0.1,both_0.1",
    "padding": "packed,left",
    "hyperparameters": "rate_1_rows_1_length_1,rate_3_rows_1_length_1",
    "data_size": "100_percent,1_percent",
    "main_tables": "mini",
    "ranking_loss": "softmax_8,point_ce_4",
}


def write_marco(folder: pathlib.Path) -> None:
    words = ["wings", "heat", "flutter", "shells", "drag", "shock"]
    (folder / "collection.tsv").write_text(
        "".join(f"{10 + i}\ta passage on {word}\n" for i, word in enumerate(words))
    )
    for split, first in (("train", 0), ("dev", 3)):
        queries = range(first, first + 3)
        files = {
            "queries": [f"{i}\twhat is {words[i]}\n" for i in queries],
            "qrels": [f"{i}\t0\t{10 + i}\t1\n" for i in queries],
            "run": [
                f"{i}\t{10 + (i + rank) % 6}\t{rank}\n" for i in queries for rank in range(1, 7)
            ],
        }
        for name, lines in files.items():
            (folder / f"{name}.{split}.tsv").write_text("".join(lines))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """(folder, fields): a tiny decoder in the gemma package's format, and its config changes.

    The fields are those in which its config differs from `gemma3_mini`.
    """
    from flax import nnx

    import gemma_encoder as ge
    from gemma_encoder.inputs.tokenizer import SMALL
    from gemma_encoder.model.sizes import GEMMA_CONFIGS
    from gemma_encoder.model.transformer import Transformer

    small = {
        "num_layers": 2,
        "embed_dim": 32,
        "hidden_dim": 64,
        "head_dim": 8,
        "query_scale": 8**-0.5,
    }
    size = dataclasses.replace(GEMMA_CONFIGS["gemma3_mini"], **small)
    folder = tmp_path_factory.mktemp("decoders") / "mini"
    ge.save_gemma(Transformer(size, rngs=nnx.Rngs(0)), folder)
    (folder / "tokenizer.model").write_bytes(SMALL.read_bytes())
    return folder, small


@pytest.fixture(scope="session")
def laboratory(decoder, prepared, tmp_path_factory):
    """Function that runs a smoke sweep on tiny data; returns its exit code and output."""
    marco = tmp_path_factory.mktemp("marco")
    write_marco(marco)
    folder, small = decoder

    def run(*arguments: str) -> tuple[int, str]:
        output = io.StringIO()
        short = [
            "--config.train_for=2 steps",
            "--config.max_length=64",
            "--config.batch.row_length=64",
            f"--config.model.pretrained={folder}",
            f"--config.model.transformer={small}",
        ]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = program.main([*arguments, "--smoke", "--seeds=1", *short])
        return code, output.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(prepared))
        patch.setenv("MSMARCO_DIR", str(marco))
        patch.chdir(ROOT)
        yield run


@pytest.fixture(scope="session")
def swept(laboratory, tmp_path_factory):
    """(results folder, workdirs folder, output) of a sweep over two rows of every study."""
    folder = tmp_path_factory.mktemp("results")
    workdirs = tmp_path_factory.mktemp("workdirs")
    outputs = []
    for studies, tasks in (
        (tuple(name for name in ROWS if name != "ranking_loss"), "sst2"),
        (("ranking_loss",), "msmarco"),
    ):
        rows = ",".join(dict.fromkeys(",".join(ROWS[name] for name in studies).split(",")))
        code, output = laboratory(
            f"--study={','.join(studies)}",
            f"--tasks={tasks}",
            f"--rows={rows}",
            f"--results={folder}",
            f"--workdirs={workdirs}",
        )
        assert code == 0, output
        outputs.append(output)
    return folder, workdirs, "".join(outputs)


@pytest.fixture
def made(tmp_path):
    """Function that writes a result whose predictions are correct where `right` is true.

    `made("attention", "causal", "sst2", seed, right)` returns the path of the result.
    """
    labels = np.arange(200) % 2

    def make(
        study: str, row: str, task: str, seed: int, right: np.ndarray, **changes
    ) -> pathlib.Path:
        key = RunKey(study, row, task, "mini", seed)
        predictions = np.where(right, labels, 1 - labels).tolist()
        content = {
            **dataclasses.asdict(key),
            "digest": f"{study}{row}{task}{seed}",
            "command": "python -m …",
            "changes": {},
            "kind": "classification",
            "main_metric": "accuracy",
            "metrics": {"accuracy": float(np.mean(right))},
            "outcomes": {"accuracy": {"labels": labels.tolist(), "predictions": predictions}},
            "steps": 1,
            "train_records": 8,
            "parameters": 1000,
            "training_seconds": 1.0,
            "seconds": 2.0,
            "machine": "a machine",
            "versions": {"jax": "0"},
            "date": "2000-01-01",
        } | changes
        path = key.file(tmp_path)
        results.write_result(path, content)
        return path

    return make
