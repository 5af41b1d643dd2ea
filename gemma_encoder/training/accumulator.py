"""Accumulates training metrics between two log lines, and measures training time."""

import collections
import math
import time
from collections.abc import Iterator

import jax
from absl import logging
from jax.sharding import Mesh

from gemma_encoder.inputs.batch import Batch
from gemma_encoder.training import devices
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.step import StepMetrics


class NotFinite(ArithmeticError):
    """The loss or the gradient of a step is NaN or infinite."""


class MetricsAccumulator:
    """Sums the metrics of the steps since the last log line, which reports their means.

    Its clock measures training alone: it starts paused, and is paused for evaluation,
    checkpointing and hooks.

    Args:
        recipe: the recipe being trained.
        mesh: the devices; utilization is relative to their peak FLOP/s.

    Attributes:
        steps: steps since the last restart.
        latest: metrics of the newest step that was added, on the host.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh):
        self.latest: StepMetrics | None = None
        self._recipe = recipe
        self._devices = list(mesh.devices.flat)
        self._warned = False
        self._elapsed = 0.0
        self._resumed_at: float | None = None  # None while the clock is paused
        self.restart()

    def restart(self) -> None:
        """Discards the steps so far."""
        self.steps = 0
        self._sums = collections.Counter()
        self._waited = 0.0
        self._restarted_at = self.seconds

    @property
    def seconds(self) -> float:
        """Seconds of training so far, without pauses."""
        if self._resumed_at is None:
            return self._elapsed
        return self._elapsed + time.monotonic() - self._resumed_at

    def pause(self) -> None:
        """Pauses the clock."""
        self._elapsed = self.seconds
        self._resumed_at = None

    def resume(self) -> None:
        """Starts the clock, or restarts it after a pause."""
        self._resumed_at = time.monotonic()

    def wait_for(self, stream: Iterator[Batch]) -> Batch:
        """Returns the stream's next batch, and counts the time that it took as waiting."""
        start = time.monotonic()
        batch = next(stream)
        self._waited += time.monotonic() - start
        return batch

    def add(self, step: int, metrics: StepMetrics) -> float:
        """Waits for a step to finish on the devices, adds its metrics, and returns its loss.

        Raises:
            NotFinite: its loss or gradient norm is NaN or infinite.
        """
        metrics = jax.device_get(metrics)
        loss = float(metrics.loss)
        norm = float(metrics.gradient_norm)
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

    def close(self, counts: dict[str, dict[str, int]]) -> dict[str, float]:
        """Returns the values of a log line, and restarts the accumulator.

        Args:
            counts: counts of the stream: texts and truncated texts by task.

        Returns:
            Mean losses and norms, throughput per second, model FLOP utilization, and the share of
            texts that were truncated.
        """
        examples = self._examples_per_step()
        values = {
            "loss": self._sums["loss"] / self.steps,
            "learning_rate": float(self.latest.learning_rate),
            "gradient_norm": self._sums["gradient_norm"] / self.steps,
            "parameter_norm": float(self.latest.parameter_norm),
            "examples_per_step": examples,
            **self._rates(self.seconds - self._restarted_at),
            **self._task_values(counts),
        }
        self._warn_once(examples)
        self.restart()
        return values

    def _examples_per_step(self) -> float:
        return sum(self._sums[f"{task.name}/examples"] for task in self._recipe.tasks) / self.steps

    def _rates(self, seconds: float) -> dict[str, float]:
        """Returns throughput, shares of time and of tokens, and device utilization."""
        sums = self._sums
        shape = self._recipe.stream.shape
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
            mean_length = sums["real_tokens"] / sums["texts"]
            transformer = self._recipe.encoder.transformer
            # A backward pass costs two forward passes; recomputation by remat does not count.
            flops = 3 * transformer.forward_flops(sums["real_tokens"], mean_length)
            values["model_flop_utilization"] = flops / (seconds * peak * len(self._devices))
        process = jax.process_index()
        local_device = next(device for device in self._devices if device.process_index == process)
        in_use = devices.memory_in_use(local_device)
        if in_use:
            values["device_memory_gib"] = in_use / 2**30
        return values

    def _task_values(self, counts: dict[str, dict[str, int]]) -> dict[str, float]:
        """Returns the mean loss of each task, and the share of its texts that were truncated.

        A task without a text or list to learn from since the last line has no mean loss.
        """
        values = {}
        for task in self._recipe.tasks:
            count = self._sums[f"{task.name}/count"]
            if count:
                values[f"{task.name}/loss"] = self._sums[f"{task.name}/total"] / count
            texts = counts[task.name]["texts"]
            if texts:
                values[f"{task.name}/cut_share"] = counts[task.name]["cut_texts"] / texts
        return values

    def _warn_once(self, examples: float) -> None:
        expected = self._recipe.losses.examples_per_step
        if self._warned or 0.75 < examples / expected < 1.33:
            return
        logging.warning(
            "batches hold %.0f examples on average, but batch.examples_per_step is %d: the loss "
            "and the length of an epoch are off by this ratio",
            examples,
            expected,
        )
        self._warned = True
