"""Tokenizes the data of a config ahead of training: an Apache Beam pipeline.

This is the library behind `gemma-encoder prepare`.
"""

import functools
from collections.abc import Sequence
from typing import Any

from etils import epath

from gemma_encoder import terminal
from gemma_encoder.data import mixtures, prepared, registry
from gemma_encoder.data.seqio_source import task_name
from gemma_encoder.data.source import Source
from gemma_encoder.inputs.errors import InputError, one_line
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.config import import_modules


def prepare(recipe: Recipe, output: epath.PathLike, pipeline_options: Sequence[str]) -> None:
    """Writes the prepared folder of every task of a recipe under `output`.

    Complete folders are skipped, and incomplete ones are continued.

    Args:
        recipe: the recipe that will be trained, built for training.
        output: folder that receives one folder per task.
        pipeline_options: command-line flags of Beam.

    Raises:
        InputError: Beam is not installed, a folder was prepared for another config, or the data are
            invalid.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(
            f"preparing data needs Apache Beam, which is not installed ({one_line(error)}); run "
            "make prepare-setup to create an environment with it"
        ) from error
    jobs = _start_folders(recipe, output)
    if jobs:
        pipeline = beam.Pipeline(options=PipelineOptions(list(pipeline_options)))
        _ = (
            pipeline
            | "Parts" >> beam.Create(jobs)
            | "Spread" >> beam.Reshuffle()
            | "Write" >> beam.Map(_PartWriter(recipe, output))
        )
        _run_pipeline(pipeline)
    for name in sorted({name for name, _ in jobs}):
        prepared.finish(epath.Path(output) / task_name(name))
    terminal.print_note(f"next, train: add --config.prepared={output} to the command")


def _start_folders(recipe: Recipe, output: epath.PathLike) -> list[tuple[str, prepared.Part]]:
    """Creates the incomplete folders, and returns their files to write as (task, part)."""
    jobs = []
    names = mixtures.expand_mixtures(recipe.config.tasks)
    for name, source in zip(names, recipe.sources, strict=True):
        folder = epath.Path(output) / source.task.name
        description = prepared.describe_prepared(source, recipe.tokenizer, recipe.config.max_length)
        if prepared.begin(folder, description):
            jobs += [(name, part) for part in prepared.parts(source)]
        else:
            terminal.print_note(f"{source.task.name}: {folder} is already complete")
    return jobs


def _run_pipeline(pipeline: Any) -> None:
    """Runs a Beam pipeline and prints its totals; raises the InputError of a worker."""
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as error:  # each runner wraps a worker's error in its own way
        if message := _input_error_message(error):
            raise InputError(message) from error
        raise
    totals = {
        counter.key.metric.name: counter.committed
        for counter in result.metrics().query()["counters"]
        if counter.key.metric.namespace == __name__
    }
    counts = (f"{totals.get(name, 0):,} {label}" for name, label in _TOTALS.items())
    terminal.print_note(", ".join(counts))


# Counters of `prepared.write_part`, and their names in the summary.
_TOTALS = {
    "records": "records",
    "texts": "texts",
    "tokens": "tokens",
    "cut_texts": "truncated texts",
}


def _input_error_message(error: BaseException | None) -> str:
    """Returns the message of an InputError in a chain of exceptions, "" if there is none."""
    while error is not None:
        if isinstance(error, InputError):
            return str(error).split(" [while running")[0]
        for line in str(error).splitlines():
            if "InputError: " in line:
                return line.split("InputError: ", 1)[1].split(" [while running")[0]
        error = error.__cause__ or error.__context__
    return ""


class _PartWriter:
    """Writes one file of one task. Each worker opens a source once."""

    def __init__(self, recipe: Recipe, output: epath.PathLike):
        self._options = recipe.sources[0].options
        self._output = str(output)
        self._max_length = recipe.config.max_length
        self._model = recipe.tokenizer.model, recipe.tokenizer.name
        self._modules = recipe.config.modules
        self._sources: dict[str, Source] = {}

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(*self._model)

    def __call__(self, job: tuple[str, prepared.Part]) -> None:
        from apache_beam.metrics import Metrics

        name, part = job
        if name not in self._sources:
            import_modules(self._modules)
            self._sources[name] = registry.get(name, self._options)
            self._sources[name].fit(self._tokenizer, self._max_length)
        counts = prepared.write_part(
            self._sources[name],
            prepared.Part(*part),
            self._tokenizer,
            self._max_length,
            epath.Path(self._output) / task_name(name),
        )
        for counter, value in counts.items():
            Metrics.counter(__name__, counter).inc(value)
