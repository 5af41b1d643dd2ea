"""What a run leaves when its loss is no number."""

import json

import jax
import numpy as np
from etils import epath

from gemma_encoder.inputs.batch import Batch
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.step import StepMetrics


def report_failure(
    workdir: epath.Path, recipe: Recipe, previous: tuple[int, StepMetrics, Batch], error: str
) -> epath.Path:
    """Saves what a person needs to see why: the numbers of the step and of each task, and this process's rows of the batch, with texts as pieces."""
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
    if jax.process_index() == 0:
        (folder / "report.json").write_text(json.dumps(report, indent=1))
        with (folder / "texts.txt").open("w") as file:
            for row, ids in zip(batch.tokens, batch.segment_ids, strict=True):
                file.writelines(
                    f"{''.join(recipe.tokenizer.pieces(row[ids == slot]))}\n"
                    for slot in range(1, ids.max() + 1)
                )
    return folder
