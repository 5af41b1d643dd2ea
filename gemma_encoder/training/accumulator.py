"""Training metrics between two lines of the log, and the time that training takes."""

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
    """The loss or the gradient of a step is NaN or infinite."""


class MetricsAccumulator:
    """Sums the metrics of steps since the last line of the log, which gets their means.

    Its clock counts training alone: it stands still until `resume`, and whoever does something
    else than training pauses it.

    Args:
        recipe: what is trained.
        schedule: the learning rate by step.
        mesh: the devices whose peak the rates are compared with.

    Attributes:
        steps: steps since the last restart.
        latest: the metrics of the newest step that was added, on the host.
    """

    def __init__(self, recipe: Recipe, schedule: optax.Schedule, mesh: Mesh):
        self._recipe, self._schedule, self._devices = recipe, schedule, list(mesh.devices.flat)
        self._warned = False
        self.latest: StepMetrics | None = None
        self._elapsed, self._resumed = 0.0, None
        self.restart()

    def restart(self) -> None:
        """Forgets the steps so far."""
        self.steps, self._sums, self._waited = 0, collections.Counter(), 0.0
        self._began = self.seconds

    @property
    def seconds(self) -> float:
        """Seconds of training so far, pauses left out."""
        running = 0.0 if self._resumed is None else time.monotonic() - self._resumed
        return self._elapsed + running

    def pause(self) -> None:
        """Stops the clock."""
        self._elapsed, self._resumed = self.seconds, None

    def resume(self) -> None:
        """Starts the clock again."""
        self._resumed = time.monotonic()

    def wait_for(self, stream: Iterator[Batch]) -> Batch:
        """The stream's next batch; the time until it is there counts as waiting."""
        began = time.monotonic()
        batch = next(stream)
        self._waited += time.monotonic() - began
        return batch

    def add(self, step: int, metrics: StepMetrics) -> float:
        """Adds a step, once the devices have finished it, and returns its loss.

        Raises:
            NotFinite: its loss or gradient norm is NaN or infinite.
        """
        metrics = jax.device_get(metrics)
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite(f"the loss of step {step} is {loss}, its gradient norm {norm}")
        self.steps += 1
        self.latest = metrics
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
        """The values of a line of the log, after which counting starts anew.

        Args:
            step: the newest step.
            counts: the stream's: texts and cut texts by task.

        Returns:
            Mean losses and norms, rates per second and against the devices' peak, and the share
            of texts that were cut.
        """
        examples = self._examples_per_step()
        values = {
            "loss": self._sums["loss"] / self.steps,
            "learning_rate": float(self._schedule(step - 1)),
            "gradient_norm": self._sums["gradient_norm"] / self.steps,
            "parameter_norm": float(self.latest.parameter_norm),
            "examples_per_step": examples,
            **self._rates(self.seconds - self._began),
            **self._task_values(counts),
        }
        self._warn_once(examples)
        self.restart()
        return values

    def _examples_per_step(self) -> float:
        return sum(self._sums[f"{task.name}/examples"] for task in self._recipe.tasks) / self.steps

    def _rates(self, seconds: float) -> dict[str, float]:
        """Throughput, shares of time and of tokens, and use of the devices."""
        sums, shape = self._sums, self._recipe.stream.shape
        tokens = self.steps * shape.rows * shape.row_length
        values = {
            "texts_per_second": sums["texts"] / seconds,
            "tokens_per_second": tokens / seconds,
            "real_tokens_per_second": sums["real_tokens"] / seconds,
            "waiting_for_data_share": self._waited / seconds,
            "real_token_share": sums["real_tokens"] / tokens,
        }
        peak = devices.peak_flops(self._devices[0])
        if peak and sums["texts"]:
            # A backward pass costs twice a forward pass; what remat recomputes is not counted.
            flops = 3 * self._recipe.encoder.transformer.forward_flops(
                sums["real_tokens"], sums["real_tokens"] / sums["texts"]
            )
            values["model_flop_utilization"] = flops / (seconds * peak * len(self._devices))
        in_use = devices.memory_in_use(
            next(device for device in self._devices if device.process_index == jax.process_index())
        )
        if in_use:
            values["device_memory_gib"] = in_use / 2**30
        return values

    def _task_values(self, counts: dict[str, dict[str, int]]) -> dict[str, float]:
        """The loss of each task, and its share of texts that were cut."""
        values = {}
        for task in self._recipe.tasks:
            count = self._sums[f"{task.name}/count"]
            if count:
                values[f"{task.name}/loss"] = self._sums[f"{task.name}/total"] / count
            if counts[task.name]["texts"]:
                values[f"{task.name}/cut_share"] = (
                    counts[task.name]["cut_texts"] / counts[task.name]["texts"]
                )
        return values

    def _warn_once(self, examples: float) -> None:
        expected = self._recipe.losses.examples_per_step
        if self._warned or 0.75 < examples / expected < 1.33:
            return
        logging.warning(
            "a batch holds %.0f examples on average, batch.examples_per_step is %d: the loss and "
            "the length of an epoch are off by that ratio",
            examples,
            expected,
        )
        self._warned = True
