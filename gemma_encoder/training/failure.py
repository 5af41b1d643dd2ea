"""Diagnostics of a step whose loss or gradient is NaN or infinite."""

import json

import jax
import numpy as np
from etils import epath

from gemma_encoder import distributed
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.step import StepMetrics


def report_failure(
    workdir: epath.Path, recipe: Recipe, previous: tuple[int, StepMetrics, Batch], error: str
) -> epath.Path:
    """Dumps diagnostics of a step under `failures/` of the workdir.

    Args:
        workdir: of the run.
        recipe: of the run.
        previous: the step, its metrics and this process's rows of its batch.
        error: the message.

    Returns:
        The folder: metrics of the step and of each task, the rows, and their texts as pieces.
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
    norms = {
        name: float(getattr(metrics, name))
        for name in ("loss", "gradient_norm", "parameter_norm", "texts", "real_tokens")
    }
    report = {
        "error": error,
        "step": step,
        **{name: str(value) for name, value in norms.items()},
        "tasks": tasks,
    }
    with (folder / f"batch.process_{jax.process_index()}.npz").open("wb") as file:
        np.savez_compressed(file, **batch._asdict())
    if distributed.is_main_process():
        (folder / "report.json").write_text(json.dumps(report, indent=1))
        with (folder / "texts.txt").open("w") as file:
            for row, ids in zip(batch.tokens, batch.segment_ids, strict=True):
                file.writelines(
                    f"{''.join(recipe.tokenizer.pieces(row[ids == slot]))}\n"
                    for slot in range(1, ids.max() + 1)
                )
    return folder
