"""Submissions to the leaderboards, from raw records to the files of an archive."""

import io
import json
import zipfile

import numpy as np
import pytest

from gemma_encoder.cli import submit
from gemma_encoder.data import registry
from gemma_encoder.data.tasks import glue, superglue
from gemma_encoder.evaluation import leaderboards, submission
from gemma_encoder.evaluation.predictions import Predictions, score_split
from gemma_encoder.inputs.errors import InputError
from tests import official

NAMES = (*glue.TASKS, *superglue.TASKS)


@pytest.fixture(scope="module")
def predicted(tables, tmp_path_factory):
    """A workdir with random predictions for all test splits, and these predictions.

    They are (info, query id, output) by task and split.
    """
    workdir = tmp_path_factory.mktemp("predicted")
    predictions = {}
    for name in NAMES:
        task = registry.get(name).task
        for split in [split for split in registry.get(name).splits if split.startswith("test")]:
            batches, table = tables(name, split)
            scores = (
                np.random.default_rng(len(predictions))
                .standard_normal((len(table.labels), task.num_outputs))
                .astype(np.float32)
                * 2
            )

            def forward(batch, task=task, scores=scores):
                return {task.head: scores[batch.example_id]}, batch.example_id, batch.weight

            scores = score_split(task, iter(batches), forward)
            outputs = task.kind.postprocess(task, scores)
            Predictions(task, split, outputs, table).write(workdir / "predictions")
            predictions[name, split] = [
                (info, table.query_ids[i], outputs[i]) for i, info in enumerate(table.infos)
            ]
    return workdir, predictions


SIZES = {
    "glue": {file.name: official.TEST for file in leaderboards.BENCHMARKS["glue"]},
    "superglue": {file.name: official.TEST for file in leaderboards.BENCHMARKS["superglue"]}
    | {"MultiRC.jsonl": 10},
}


@pytest.mark.parametrize("benchmark", ["glue", "superglue"])
def test_submissions_contain_the_predictions(benchmark, predicted):
    workdir, predictions = predicted
    content = submission.make_submission(benchmark, [workdir])
    assert submission.check_submission(content, benchmark, SIZES[benchmark]) == SIZES[benchmark]
    read = submission.read_submission(content, benchmark)
    words = {
        "CoLA.tsv": ("0", "1"),
        "SST-2.tsv": ("0", "1"),
        "MRPC.tsv": ("0", "1"),
        "QQP.tsv": ("0", "1"),
        "WNLI.tsv": ("0", "1"),
        "MNLI-m.tsv": ("entailment", "neutral", "contradiction"),
        "MNLI-mm.tsv": ("entailment", "neutral", "contradiction"),
        "AX.tsv": ("entailment", "neutral", "contradiction"),
        "QNLI.tsv": ("entailment", "not_entailment"),
        "RTE.tsv": ("entailment", "not_entailment"),
        "RTE.jsonl": ("entailment", "not_entailment"),
        "AX-b.jsonl": ("entailment", "not_entailment"),
        "AX-g.jsonl": ("entailment", "not_entailment"),
        "BoolQ.jsonl": ("false", "true"),
        "WiC.jsonl": ("false", "true"),
        "WSC.jsonl": ("False", "True"),
        "CB.jsonl": ("entailment", "contradiction", "neutral"),
        "MultiRC.jsonl": (0, 1),
    }
    for file in leaderboards.BENCHMARKS[benchmark]:
        lines = predictions[file.task, file.split]
        if file.name == "STS-B.tsv":
            expected = {info["idx"]: f"{min(max(output, 0), 5):.3f}" for info, _, output in lines}
        elif file.name in ("COPA.jsonl", "ReCoRD.jsonl"):
            expected = {}
            for question in {query for _, query, _ in lines}:
                of_question = [line for line in lines if line[1] == question]
                options = [
                    (output, -index, info) for index, (info, _, output) in enumerate(of_question)
                ]
                _, index, info = max(options, key=lambda option: option[:2])
                expected[info["idx"]] = -index if file.name == "COPA.jsonl" else info["option"]
        else:
            expected = {
                tuple(info["idx"].values())
                if isinstance(info["idx"], dict)
                else info["idx"]: words[file.name][int(output.argmax())]
                for info, _, output in lines
            }
        assert read[file.name] == expected, file.name


def test_files_have_the_format_of_the_leaderboards(predicted):
    workdir, _ = predicted
    with zipfile.ZipFile(io.BytesIO(submission.make_submission("glue", [workdir]))) as archive:
        assert set(archive.namelist()) == {
            f"{name}.tsv"
            for name in [
                "CoLA",
                "SST-2",
                "MRPC",
                "STS-B",
                "MNLI-m",
                "MNLI-mm",
                "QNLI",
                "QQP",
                "RTE",
                "WNLI",
                "AX",
            ]
        }
        lines = archive.read("AX.tsv").decode().splitlines()
        assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [
            "0",
            "1",
            "2",
            "3",
        ]
    with zipfile.ZipFile(io.BytesIO(submission.make_submission("superglue", [workdir]))) as archive:
        assert set(archive.namelist()) == {
            f"{name}.jsonl"
            for name in [
                "BoolQ",
                "CB",
                "COPA",
                "MultiRC",
                "ReCoRD",
                "RTE",
                "WiC",
                "WSC",
                "AX-b",
                "AX-g",
            ]
        }
        first = json.loads(archive.read("MultiRC.jsonl").decode().splitlines()[0])
        assert first.keys() == {"idx", "passage"} and [
            question["idx"] for question in first["passage"]["questions"]
        ] == [0, 1]
        assert [answer["idx"] for answer in first["passage"]["questions"][1]["answers"]] == [3, 4]
        assert all(
            json.loads(line).keys() == {"idx", "label"}
            for line in archive.read("ReCoRD.jsonl").decode().splitlines()
        )


def test_missing_and_ambiguous_predictions_are_errors(predicted, tmp_path):
    workdir, _ = predicted
    with pytest.raises(InputError, match="two workdirs"):
        submission.make_submission("glue", [workdir, workdir])
    with pytest.raises(
        InputError,
        match=r"no predictions of glue_cola.test, .*glue_mnli.test_matched.*"
        r"--config.evaluate_split=test",
    ):
        submission.make_submission("glue", [tmp_path])
    with pytest.raises(InputError, match="did you mean 'superglue'"):
        submission.make_submission("superglu", [workdir])


def test_submissions_must_have_the_official_sizes(predicted, tmp_path, capsys):
    workdir, _ = predicted
    assert (
        submit.main(["make", "--benchmark=superglue", f"--output={tmp_path}/s.zip", str(workdir)])
        == 2
    )
    assert "BoolQ.jsonl holds 4 predictions, expected 3245" in capsys.readouterr().err
    assert not (tmp_path / "s.zip").exists()
