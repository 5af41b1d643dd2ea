"""Small whole files of every kind, made by the library itself."""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

import gemma_encoder as ge
from gemma_encoder import predict_file as file_prediction
from gemma_encoder.data import cache, prepared, registry
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.source import DataOptions
from gemma_encoder.evaluation import leaderboards, submission
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.task import Example, ExampleTable
from gemma_encoder.training import loop
from gemma_encoder.weights.backbone import load_backbone, save_gemma
from tests.evaluation.test_submission import archive
from tests.fuzz import doors
from tests.micro import micro_config

COUNT = 3  # predictions per file of a submission
CHUNK = 6  # texts that a file prediction commits at once
STEPS = (2, 4)  # of the checkpoints
TEXTS = [
    f"the {word} was {'very ' * (i % 5)}good , “naïve” 😀 ."
    for i, word in enumerate(["plot", "music", "cast", "ending"] * 5)
]
DIGESTS = "digests.json"


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Makes everything small while it is made and read: submissions, chunks, cached sources."""
    sizes = {
        name: tuple(dataclasses.replace(file, count=COUNT) for file in files)
        for name, files in leaderboards.BENCHMARKS.items()
    }
    with (
        mock.patch.dict(leaderboards.BENCHMARKS, sizes),
        mock.patch.object(file_prediction, "TEXTS_PER_CHUNK", CHUNK),
        mock.patch.object(cache, "KEEP_FROM", 0),
        mock.patch.object(prepared, "PART", 1000),
    ):
        yield


def make(root: pathlib.Path) -> None:
    """Makes all originals below a folder."""
    with small_files():
        loop.train(config(), root / "run", "the command")
        shutil.copytree(root / "run", root / "older")  # without its newest checkpoint
        shutil.rmtree(root / "older/checkpoints" / str(STEPS[-1]))
        _without_digests(root, "run")
        shutil.copytree(root / "run/checkpoints" / str(STEPS[-1]), root / "checkpoint")
        predictor = ge.Predictor.load(root / "run")
        bare = only_classes(predictor)
        ge.export_huggingface(bare, root / "export")
        _without_digests(root, "export")
        save_gemma(load_backbone(root / "run"), root / "gemma")
        _without_digests(root, "gemma")
        _make_partial_predictions(predictor, root)
        _make_predictions(root / "predictions")
        _make_submissions(root)
        _make_prepared(root, predictor.spec.tokenizer)
        _without_digests(root, "prepared")
        _make_caches(root)
    (root / "complete").touch()


def config(**changes: Any) -> Any:
    """Returns the config of the run."""
    return micro_config(checkpoint_every=f"{STEPS[0]} steps", **changes)


def only_classes(predictor: ge.Predictor) -> ge.Predictor:
    """Returns the predictor with its classification head only, as an export needs."""
    task = predictor.tasks["toy_sentiment"]
    encoder = predictor.spec.encoder
    heads = {task.head: encoder.heads[task.head]}
    spec = dataclasses.replace(
        predictor.spec, encoder=dataclasses.replace(encoder, heads=heads), tasks=(task,)
    )
    parameters = predictor.parameters
    parameters = {**parameters, "heads": {task.head: parameters["heads"][task.head]}}
    return ge.Predictor(spec, parameters)


def _without_digests(root: pathlib.Path, name: str) -> None:
    """Makes the files of an earlier version, which had no digests."""
    shutil.copytree(root / name, root / f"{name}_without_digests")
    for path in (root / f"{name}_without_digests").rglob(DIGESTS):
        path.unlink()


class _InterruptionError(Exception):
    pass


def _make_partial_predictions(predictor: ge.Predictor, root: pathlib.Path) -> None:
    """Interrupts the prediction of a file after two of its chunks, for each output format."""
    (root / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    task = predictor.tasks["toy_sentiment"]
    predict = ge.Predictor.predict
    for suffix in ("jsonl", "csv", "parquet"):
        folder = root / f"part_{suffix}"
        folder.mkdir()
        calls = iter(range(10))

        def predict_two(*arguments: Any, calls: Any = calls, **options: Any) -> np.ndarray:
            if next(calls) == 2:
                raise _InterruptionError
            return predict(*arguments, **options)

        with (
            mock.patch.object(ge.Predictor, "predict", predict_two),
            contextlib.suppress(_InterruptionError),
        ):
            doors.predict_file(predictor, task, root / "texts.txt", folder / f"out.{suffix}")


def _make_predictions(folder: pathlib.Path) -> None:
    """Writes the predictions of all test splits of GLUE, as an evaluation does."""
    for file in leaderboards.BENCHMARKS["glue"]:
        task = registry.get(file.task).task
        table = ExampleTable()
        for index in range(COUNT):
            example = Example({field: "a text" for field in task.template.fields}, -1.0)
            table.add(example._replace(info={"idx": index}))
        rng = np.random.default_rng(len(file.name))
        outputs = rng.random((COUNT, len(task.classes))) if task.classes else rng.random(COUNT)
        Predictions(task, file.split, outputs, table=table).write(folder / "predictions")


def _make_submissions(root: pathlib.Path) -> None:
    (root / "submission_glue").mkdir()
    content = submission.make_submission("glue", [root / "predictions"])
    (root / "submission_glue/submission.zip").write_bytes(content)
    (root / "submission_superglue").mkdir()
    content = archive("superglue", COUNT)  # stored, the other one is compressed
    (root / "submission_superglue/submission.zip").write_bytes(content)


def _make_prepared(root: pathlib.Path, tokenizer: ge.Tokenizer) -> None:
    """Prepares the toy tasks of classification and ranking."""
    for name in ("toy_sentiment", "toy_ranking"):
        source = registry.get(name, DataOptions(max_train_examples=20, max_eval_examples=20))
        if name == "toy_ranking":
            source = _WithQrels(source.task, source.options, source.records)
        folder = root / "prepared" / name
        prepared.begin(folder, prepared.describe_prepared(source, tokenizer, 64))
        for part in prepared.parts(source):
            prepared.write_part(source, part, tokenizer, 64, folder)
        prepared.finish(folder)


class _WithQrels(MemorySource):
    def qrels(self, split: str) -> dict[str, dict[str, float]]:
        return {"q0": {"d0": 2.0, "unseen": 1.0}}


def _make_caches(root: pathlib.Path) -> None:
    """Writes sources, and fills the cache with what is derived from them."""
    (root / "sources").mkdir()
    rows = "".join(f"text {index},{'ab'[index % 2]}\n" for index in range(30))
    (root / "sources/train.csv").write_text(f"text,label\n{rows}")
    for name, size in (("queries", 5), ("collection", 20)):
        lines = "".join(f"{name[0]}-{i * 7919 % 10007:x}\ttext {i}\n" for i in range(size))
        (root / f"sources/{name}.tsv").write_text(lines)
    run = "".join(
        f"q-{i * 7919 % 10007:x}\tc-{(i + j) * 7919 % 10007:x}\t{j + 1}\n"
        for i in range(5)
        for j in range(4)
    )
    (root / "sources/run.tsv").write_text(run)
    (root / "cache").mkdir()
    doors.read_caches(root / "sources", root / "cache")
