"""Training numbers between two lines of the log."""

import collections
import math
import time
from collections.abc import Iterator

import jax
import optax
from absl import logging
from jax.sharding import Mesh

from gemma_encoder.inputs.batch import Batch
from gemma_encoder.training import devices
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.step import StepMetrics


class NotFinite(ArithmeticError):
    """The loss or the gradient of a step is not a finite number."""


class Window:
    """Training numbers since the last line of the log: means, not the last step's."""

    def __init__(self, recipe: Recipe, schedule: optax.Schedule, mesh: Mesh):
        self._recipe, self._schedule, self._devices = recipe, schedule, list(mesh.devices.flat)
        self._warned = False
        self.restart()

    def restart(self) -> None:
        """Starts counting anew."""
        self._steps, self._sums, self._began, self._waited = (
            0,
            collections.Counter(),
            time.monotonic(),
            0.0,
        )

    def wait_for(self, stream: Iterator[Batch]) -> Batch:
        """The stream's next batch; the time until it is there counts as waiting."""
        began = time.monotonic()
        batch = next(stream)
        self._waited += time.monotonic() - began
        return batch

    def add(self, step: int, metrics: StepMetrics) -> float:
        """Counts a step and returns its loss; raises NotFinite when it is none, or its gradient."""
        metrics = jax.device_get(metrics)
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite(f"the loss of step {step} is {loss}, its gradient norm {norm}")
        self._steps += 1
        self._norm = float(metrics.parameter_norm)
        self._sums.update(
            loss=loss,
            gradient_norm=norm,
            texts=float(metrics.texts),
            real_tokens=float(metrics.real_tokens),
        )
        for task, part in metrics.tasks.items():
            self._sums.update(
                {
                    f"{task}/total": float(part.total),
                    f"{task}/count": float(part.count),
                    f"{task}/examples": float(part.examples),
                }
            )
        return loss

    def close(self, step: int, counts: dict[str, dict[str, int]]) -> dict[str, float]:
        """The means, rates per second and against the devices' peak, each task's loss, and what was cut so far."""
        seconds, sums, shape = time.monotonic() - self._began, self._sums, self._recipe.stream.shape
        examples = sum(sums[f"{task.name}/examples"] for task in self._recipe.tasks) / self._steps
        values = {
            "loss": sums["loss"] / self._steps,
            "learning_rate": float(self._schedule(step - 1)),
            "gradient_norm": sums["gradient_norm"] / self._steps,
            "parameter_norm": self._norm,
            "examples_per_step": examples,
            "texts_per_second": sums["texts"] / seconds,
            "tokens_per_second": self._steps * shape.rows * shape.row_length / seconds,
            "real_tokens_per_second": sums["real_tokens"] / seconds,
            "waiting_for_data_share": self._waited / seconds,
            "real_token_share": sums["real_tokens"] / (self._steps * shape.rows * shape.row_length),
        }
        peak = devices.peak_flops(self._devices[0])
        if peak and sums["texts"]:
            # A backward pass costs twice a forward pass; what remat computes again is not the model's.
            needed = 3 * self._recipe.encoder.transformer.forward_flops(
                sums["real_tokens"], sums["real_tokens"] / sums["texts"]
            )
            values["model_flop_utilisation"] = needed / (seconds * peak * len(self._devices))
        in_use = devices.memory_in_use(
            next(device for device in self._devices if device.process_index == jax.process_index())
        )
        if in_use:
            values["device_memory_gib"] = in_use / 2**30
        for task in self._recipe.tasks:
            count = sums[f"{task.name}/count"]
            if count:
                values[f"{task.name}/loss"] = sums[f"{task.name}/total"] / count
            if counts[task.name]["texts"]:
                values[f"{task.name}/cut_share"] = (
                    counts[task.name]["cut_texts"] / counts[task.name]["texts"]
                )
        wanted = self._recipe.losses.examples_per_step
        if not self._warned and not 0.75 < examples / wanted < 1.33:
            logging.warning(
                "a batch holds %.0f examples on average, batch.examples_per_step is %d: the loss and the length of an epoch are off by that ratio",
                examples,
                wanted,
            )
            self._warned = True
        return values
