"""Tokenizes the data of a config ahead of training: an Apache Beam pipeline.

`gemma-encoder prepare` is the program.
"""

import functools
from collections.abc import Sequence

from etils import epath

from gemma_encoder.data import mixtures, prepared, registry
from gemma_encoder.data.seqio_source import task_name
from gemma_encoder.data.source import Source
from gemma_encoder.inputs.errors import InputError, one_line
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.config import import_modules


def prepare(recipe: Recipe, output: epath.PathLike, pipeline_options: Sequence[str]) -> None:
    """Writes the prepared folder of every task of a recipe under `output`.

    Args:
        recipe: what will be trained, built for training.
        output: where.
        pipeline_options: Beam's flags.

    Raises:
        InputError: Beam is not installed, a folder holds something else, or the data cannot be used.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(
            f"preparing needs Apache Beam, which is not installed ({one_line(error)}); make prepare-setup makes an environment that has it"
        ) from error
    jobs = _begun(recipe, output)
    names = {name for name, _ in jobs}
    if jobs:
        pipeline = beam.Pipeline(options=PipelineOptions(list(pipeline_options)))
        _ = (
            pipeline
            | "Parts" >> beam.Create(jobs)
            | "Spread" >> beam.Reshuffle()
            | "Write" >> beam.Map(_Writer(recipe, output))
        )
        try:
            result = pipeline.run()
            result.wait_until_finish()
        except Exception as error:  # runners wrap what a worker raised, each in its own way
            if message := _input_error(error):
                raise InputError(message) from error
            raise
        totals = {
            counter.key.metric.name: counter.committed
            for counter in result.metrics().query()["counters"]
            if counter.key.metric.namespace == __name__
        }
        print(", ".join(f"{totals.get(name, 0):,} {what}" for name, what in _TOTALS.items()))
    for name in sorted(names):
        prepared.finish(epath.Path(output) / task_name(name))
    print(f"next, train: add --config.prepared={output} to the command")


def _begun(recipe: Recipe, output: epath.PathLike) -> list[tuple[str, prepared.Part]]:
    """The files that are yet to be written, as (task, part), in folders that are begun."""
    jobs = []
    for name, source in zip(
        mixtures.expand_mixtures(recipe.config.tasks), recipe.sources, strict=True
    ):
        folder = epath.Path(output) / source.task.name
        description = prepared.describe_prepared(source, recipe.tokenizer, recipe.config.max_length)
        if prepared.begin(folder, description):
            jobs += [(name, part) for part in prepared.parts(source)]
        else:
            print(f"{source.task.name}: {folder} is whole already")
    return jobs


_TOTALS = {"records": "records", "texts": "texts", "tokens": "tokens", "cut_texts": "texts cut"}


def _input_error(error: BaseException | None) -> str:
    """The message of the InputError that lies under `error`, or under its cause; "" where there is none."""
    while error is not None:
        if isinstance(error, InputError):
            return str(error).split(" [while running")[0]
        for line in str(error).splitlines():
            if "InputError: " in line:
                return line.split("InputError: ", 1)[1].split(" [while running")[0]
        error = error.__cause__ or error.__context__
    return ""


class _Writer:
    """Writes one file of one task; each worker opens the sources once."""

    def __init__(self, recipe: Recipe, output: epath.PathLike):
        self._options, self._output = recipe.sources[0].options, str(output)
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
        for what, value in counts.items():
            Metrics.counter(__name__, what).inc(value)
