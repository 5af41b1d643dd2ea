"""The public doors through which files are read, each returning a comparable answer."""

import contextlib
import functools
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx

import gemma_encoder as ge
from gemma_encoder import predict_file as file_prediction
from gemma_encoder import text_encoder
from gemma_encoder.cli import inspect_checkpoint, report, submit
from gemma_encoder.data import cache, registry
from gemma_encoder.data.files.corpus import Corpus, TsvLayout
from gemma_encoder.data.files.runs import Candidates
from gemma_encoder.data.prepared import PreparedSource, check_prepared
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.evaluation import evaluator
from gemma_encoder.evaluation.forward import compile_forward
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.model.encoder import parameter_dict, parameter_paths
from gemma_encoder.training import loop
from gemma_encoder.training.hooks import Hook
from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.weights.backbone import load_backbone


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Shares compiled programs between predictors of one config."""
    programs: dict[Any, Callable] = {}

    def compile_once(config: Any, mesh: Any) -> Callable:
        key = (json.dumps(config.to_dict(), sort_keys=True, default=str), mesh)
        if key not in programs:
            programs[key] = compile_forward(config, mesh)
        return programs[key]

    with (
        mock.patch.object(text_encoder, "compile_forward", compile_once),
        mock.patch.object(evaluator, "compile_forward", compile_once),
    ):
        yield


def load_predictor(path: pathlib.Path) -> dict[str, Any]:
    """Returns all of a predictor, and predictions of each of its tasks."""
    predictor = ge.Predictor.load(path)
    answer = {
        "description": predictor.spec.description(),
        "tokenizer": predictor.spec.tokenizer.model,
        "parameters": _arrays(predictor.parameters),
    }
    for name, task in predictor.tasks.items():
        fields = {field: "a fine film ." for field in task.template.fields}
        answer[name] = predictor.predict([fields, fields], name, progress=False)
    return answer


def load_transformer(path: pathlib.Path) -> dict[str, Any]:
    """Returns the parameters of a backbone."""
    backbone = load_backbone(path)
    return {
        "config": repr(backbone.config),
        "parameters": _arrays(parameter_dict(nnx.state(backbone))),
    }


def _arrays(parameters: dict) -> dict[str, np.ndarray]:
    leaves = parameter_paths(parameters)
    return {path: np.asarray(leaf) for path, leaf in sorted(leaves.items())}


class _StateAtEnd(Hook):
    def on_end(self, run: Any) -> None:
        self.state = jax.tree.map(np.asarray, run.trainer.state)


def resume(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the training state at the end of a run."""
    hook = _StateAtEnd()
    with _silence():
        result = loop.train(config, workdir, "the command", hooks=[hook])
    return {"step": result.step, "state": jax.tree.leaves(hook.state)}


def evaluate(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the metrics and the predictions of the newest checkpoint."""
    with _silence():
        result = loop.evaluate(config, workdir)
    outputs = {
        name: [np.asarray(part.outputs) for part in parts]
        for name, parts in result.predictions.items()
    }
    return {"step": result.step, "metrics": result.metrics, "outputs": outputs}


def predict_file(
    predictor: ge.Predictor, task: Task, source: pathlib.Path, output: pathlib.Path
) -> bytes:
    """Returns the content of the predictions of a file, of which some may be there already."""
    with _silence():
        file_prediction.predict_file(predictor, task, source, output)
    return output.read_bytes()


def read_log(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl`."""
    return read_metrics(workdir)


def inspect(path: pathlib.Path) -> str:
    """Returns what `gemma-encoder inspect --read` prints; the problem of a tensor is an error."""
    output = _run_program(inspect_checkpoint.main, [str(path), "--read"])
    if problem := output.partition("loads       no\n")[2].strip():
        raise InputError(problem)
    return output


def render_report(workdir: pathlib.Path) -> str:
    """Returns the report on a run."""
    output = workdir.parent / "report.html"
    _run_program(report.main, [str(workdir), f"--output={output}"])
    return output.read_text(encoding="utf-8")


def make_submission(benchmark: str, workdir: pathlib.Path) -> bytes:
    """Returns the submission that is made from predictions."""
    output = workdir.parent / "submission.zip"
    output.unlink(missing_ok=True)
    _run_program(submit.main, ["make", f"--benchmark={benchmark}", f"--output={output}", workdir])
    return output.read_bytes()


def check_submission(folder: pathlib.Path) -> str:
    """Returns what `gemma-encoder submit check` prints."""
    return _run_program(submit.main, ["check", folder / "submission.zip"])


def read_prepared(root: pathlib.Path, tokenizer: ge.Tokenizer) -> dict[str, Any]:
    """Returns everything in prepared tasks."""
    answer = {}
    for name in ("toy_sentiment", "toy_ranking"):
        options = DataOptions(max_train_examples=20, max_eval_examples=20)
        source = PreparedSource(name, root, options)
        check_prepared([source], tokenizer, 64)
        answer[name] = _records(source, ("train", "validation"))
        answer[f"{name} about"] = repr((source.task, source.inferred, source.mixture))
        answer[f"{name} qrels"] = source.qrels("validation")
    return answer


def read_caches(sources: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Returns what is derived from sources, with a cache folder."""
    with mock.patch.dict(os.environ, {"GEMMA_ENCODER_CACHE": str(folder)}):
        own = registry.get("own", DataOptions(own={"train": str(sources / "train.csv")}))
        queries = Corpus(sources / "queries.tsv", TsvLayout("qid", "query"))
        documents = Corpus(sources / "collection.tsv", TsvLayout("pid", "passage"))
        ranked = Candidates(sources / "run.tsv", queries, documents)
        return {
            "rows": _records(own, ("train",)),
            "texts": [documents.text(index) for index in range(len(documents))],
            "indices": [int(documents.ids.index(documents.ids[i])) for i in range(len(documents))],
            "run": [ranked.of(query).tolist() for query in range(len(queries))],
            "fingerprints": [cache.fingerprint(path) for path in sorted(sources.iterdir())],
        }


def _records(source: Source, splits: Sequence[str]) -> dict[str, Any]:
    """Returns all records of some splits, as training and as evaluation read them."""
    return {
        split: [
            _examples(source.record(split, row, training=split == "train"))
            for row in range(source.size(split))
        ]
        for split in splits
    }


def _examples(record: Record) -> list[str]:
    return [repr(record.example(index)) for index in range(len(record.labels))]


def _run_program(program: Callable[[Sequence[str]], int], argv: Sequence[Any]) -> str:
    """Runs a program and returns what it prints; its one line of an error is an InputError."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()) as output:
        code = program(list(map(str, argv)))
    if code not in (0, 1):
        raise InputError(errors.getvalue().removeprefix("error: ").removesuffix("\n"))
    return output.getvalue()


@functools.cache
def _null() -> Any:
    return open(os.devnull, "w")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Discards what programs report on their progress."""
    with contextlib.redirect_stderr(_null()), contextlib.redirect_stdout(_null()):
        yield
