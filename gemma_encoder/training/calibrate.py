"""Calibrates a run's checkpoint on the validation split, and evaluates with what is stored."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from gemma_encoder import distributed
from gemma_encoder.data.source import Source
from gemma_encoder.evaluation import calibration
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import Label
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.uncertainty import NO_CALIBRATION, Calibration
from gemma_encoder.training.build import Recipe
from gemma_encoder.weights import native

SPLIT = "validation"
FEW = 100  # examples; the standard error of a temperature is then 10 to 20 %


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Calibrations of a checkpoint.

    Attributes:
        calibrations: calibrations by task.
        predictions: predictions by task that they were fitted on; empty if they were stored before.
        notes: a line per task, for the user.
    """

    calibrations: Mapping[str, Calibration]
    predictions: Mapping[str, Sequence[Predictions]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def stored(cls, spec: native.InferenceSpec) -> "Calibrated":
        """Returns what a checkpoint holds."""
        return cls({task.name: task.calibration for task in spec.tasks})

    def applied(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with these calibrations in its tasks."""
        return _with_calibrations(recipe, self.calibrations)


def calibrate_checkpoint(
    recipe: Recipe, mesh: Mesh, parameters: Any, checkpoint: epath.Path, spec: native.InferenceSpec
) -> Calibrated:
    """Fits the calibrations of a checkpoint on the validation split, and stores them in it.

    Args:
        recipe: the tasks with their data, and the checkpoint's encoder.
        mesh: mesh of devices.
        parameters: the checkpoint's parameters, on the mesh.
        checkpoint: its folder.
        spec: its inference spec.

    Raises:
        InputError: no task can be calibrated, or the checkpoint cannot be written.
    """
    stored_tasks = {task.name for task in spec.tasks}
    sources, notes = _calibratable(recipe.sources, stored_tasks)
    plain = _with_calibrations(
        dataclasses.replace(
            recipe,
            sources=sources,
            config=dataclasses.replace(recipe.config, evaluate_split=SPLIT),
        ),
        {},
    )
    evaluation = plain.evaluator(mesh).run(parameters, spec.step)
    calibrations = {task.name: task.calibration for task in spec.tasks}
    fitted = False
    for task, predictions in evaluation.predictions.items():
        if not evaluation.metrics[task]:
            notes.append(f"not calibrated: {task}, whose {SPLIT} split has no labels")
            continue
        calibrations[task], note = _fit(predictions, spec.step)
        notes.append(note)
        fitted = True
    if not fitted:
        raise InputError(f"no task has labels in its {SPLIT} split, which a calibration needs")
    if distributed.is_main_process():
        native.store_calibrations(checkpoint, calibrations)
    return Calibrated(calibrations, evaluation.predictions, tuple(notes))


def _calibratable(
    sources: Sequence[Source], stored_tasks: set[str]
) -> tuple[tuple[Source, ...], list[str]]:
    """Returns the sources that can be calibrated, and a note on each that cannot."""
    usable = []
    notes = []
    for source in sources:
        task = source.task
        if not calibration.can_calibrate(task):
            reason = f"a {task.kind} task has neither probabilities of classes nor targets"
        elif task.name not in stored_tasks:
            reason = "it is not among the checkpoint's tasks"
        elif not source.evaluation_splits(SPLIT):
            reason = f"it has no {SPLIT} split"
        else:
            usable.append(source)
            continue
        notes.append(f"not calibrated: {task.name}: {reason}")
    if not usable:
        raise InputError(f"--calibrate: no task can be calibrated; {'; '.join(notes)}")
    return tuple(usable), notes


def _fit(predictions: Sequence[Predictions], step: int) -> tuple[Calibration, str]:
    """Returns the calibration fitted on all parts of a split, and a line about it."""
    task = predictions[0].task
    scores = np.concatenate([part.scores for part in predictions])
    labels: list[Label] = [label for part in predictions for label in part.table.labels]
    split = " and ".join(part.split for part in predictions)
    fitted = calibration.calibrate(task, split, scores, labels, step)
    note = f"calibrated {task.name}: {fitted.describe(task.kind)}"
    if len(labels) < FEW:
        few = "1 example is" if len(labels) == 1 else f"{len(labels)} examples are"
        note += f"\n  {few} few: what is fitted on them is rough"
    if calibration.has_probabilities(task):
        note += f"\n  {_quality_line(task, fitted, scores, labels)}"
    return fitted, note


def _quality_line(
    task: Task, fitted: Calibration, scores: np.ndarray, labels: Sequence[Label]
) -> str:
    """Returns a line of measures before and after a calibration."""
    before, after = (
        calibration.quality(at, at.kind.postprocess(at, scores), labels)
        for at in (task, dataclasses.replace(task, calibration=fitted))
    )
    line = (
        f"on these examples: log loss {before.log_loss:.3f} -> {after.log_loss:.3f}, Brier score "
        f"{before.brier:.3f} -> {after.brier:.3f}, calibration error "
        f"{before.calibration_error:.3f} -> {after.calibration_error:.3f} (noise floor "
        f"{after.floor.mean:.3f})"
    )
    if task.kind.has_temperature and fitted.temperature == 1:
        line += (
            "\n  the temperature stays 1: the likelihood has no maximum, since all decisions are "
            "right or none is better than chance"
        )
    return line


def _with_calibrations(recipe: Recipe, calibrations: Mapping[str, Calibration]) -> Recipe:
    """Returns the recipe with these calibrations by task, and none for other tasks."""
    sources = []
    for source in recipe.sources:
        calibrated = copy.copy(source)
        calibrated.task = dataclasses.replace(
            source.task, calibration=calibrations.get(source.task.name, NO_CALIBRATION)
        )
        sources.append(calibrated)
    return dataclasses.replace(recipe, sources=tuple(sources))
