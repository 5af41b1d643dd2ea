"""Dumps diagnostics when the loss or the gradient of a step is NaN or infinite."""

import io
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath

from gemma_encoder import distributed
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.step import StepMetrics
from gemma_encoder.whole_files import write_whole


def report_failure(
    workdir: epath.Path, recipe: Recipe, previous: tuple[int, StepMetrics, Batch], error: str
) -> epath.Path:
    """Dumps diagnostics of a step under `failures/` of the workdir.

    Args:
        workdir: the run's workdir.
        recipe: the run's recipe.
        previous: the step, its metrics and this process's rows of its batch.
        error: the error message.

    Returns:
        The folder, with the metrics of the step and of each task, the rows of the batch, and
        their texts as token pieces.
    """
    step, metrics, batch = previous
    folder = workdir / "failures" / f"step_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    metrics = jax.device_get(metrics)
    tasks = {
        name: {
            "loss_sum": float(part.total),
            "count": float(part.count),
            "examples": float(part.examples),
        }
        for name, part in metrics.tasks.items()
    }
    scalars = {
        name: str(float(getattr(metrics, name)))  # as text: JSON has no NaN
        for name in ("loss", "gradient_norm", "parameter_norm", "texts", "real_tokens")
    }
    report = {"error": error, "step": step, **scalars, "tasks": tasks}
    arrays = io.BytesIO()
    np.savez_compressed(arrays, **batch._asdict())
    write_whole(folder / f"batch.process_{jax.process_index()}.npz", arrays.getvalue())
    if distributed.is_main_process():
        write_whole(folder / "report.json", to_json(report, indent=1))
        texts = "".join(f"{text}\n" for text in _texts(recipe, batch))
        write_whole(folder / "texts.txt", texts)
    return folder


def _texts(recipe: Recipe, batch: Batch) -> Iterator[str]:
    """Yields the texts of a batch as joined token pieces, row by row."""
    for row, segment_ids in zip(batch.tokens, batch.segment_ids, strict=True):
        for segment in range(1, segment_ids.max() + 1):
            yield "".join(recipe.tokenizer.pieces(row[segment_ids == segment]))
