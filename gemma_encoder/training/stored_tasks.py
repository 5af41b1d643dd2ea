"""Tasks of a checkpoint that is resumed or evaluated.

What was inferred from training data is stored with the model. Later commands take it from there,
and never infer it again from the files that they read.
"""

import dataclasses
from collections.abc import Sequence

from absl import logging
from etils import epath

from gemma_encoder.data.source import Source, StoredTask
from gemma_encoder.inputs.errors import InputError, format_value
from gemma_encoder.inputs.task import Task
from gemma_encoder.weights import native
from gemma_encoder.weights.checkpoint_folders import check_is_workdir


@dataclasses.dataclass(frozen=True)
class StoredTasks:
    """The tasks of a checkpoint.

    Attributes:
        checkpoint: the checkpoint.
        spec: its inference spec.
        origin: names the checkpoint, for messages.
    """

    checkpoint: epath.Path
    spec: native.InferenceSpec
    origin: str

    @classmethod
    def of_newest(cls, workdir: epath.PathLike) -> "StoredTasks | None":
        """Returns the tasks of the newest checkpoint of a workdir; None if it has none."""
        check_is_workdir(workdir)
        if not native.checkpoint_steps(workdir):
            return None
        checkpoint = native.find(workdir)
        spec = native.load_inference_spec(checkpoint)
        return cls(checkpoint, spec, f"the run in {workdir}")

    def by_name(self) -> dict[str, StoredTask]:
        """Returns the tasks by name, for `DataOptions.stored`; without their calibrations."""
        inferred = self.spec.record.get("inferred", {})
        return {
            task.name: StoredTask(task.uncalibrated(), inferred.get(task.name, {}), self.origin)
            for task in self.spec.tasks
        }

    def check(self, tasks: Sequence[Task]) -> None:
        """Checks that tasks mean to the model what they meant in training.

        A task that the checkpoint was not trained on must agree with the tasks of its head.

        Raises:
            InputError: a task contradicts the checkpoint, or the checkpoint has no head for it.
        """
        stored = {task.name: task for task in self.spec.tasks}
        for task in tasks:
            if task.head not in self.spec.encoder.heads:
                raise InputError(
                    f"the checkpoint was not trained on {task.name!r}; "
                    f"it was trained on {', '.join(sorted(stored))}"
                )
            for owner in self.spec.tasks:
                if task.name == owner.name:
                    inputs = [
                        field
                        for field in ("template", "role_templates")
                        if getattr(task, field) != getattr(owner, field)
                    ]
                    self._refuse(task, owner, inputs)
                if task.head == owner.head:
                    self._refuse(task, owner, task.output_differences(owner))

    def report_other_records(self, sources: Sequence[Source], split: str) -> None:
        """Logs tasks whose evaluation records are held out otherwise than the run held them out."""
        data = self.spec.record.get("data") or {}
        for source in sources:
            before = data.get(source.task.name)
            for name in source.evaluation_splits(split).values():
                if before is None or not source.is_held_out(name):
                    continue
                if _digests(before.get(name, ())) != _digests(source.fingerprints(name)):
                    logging.warning(
                        "%s: the %s records are held out of the training file, but other ones than "
                        "in training: %s may have been trained on them; name a file to evaluate, "
                        "e.g. --config.own.validation=FILE",
                        source.task.name,
                        name,
                        self.origin,
                    )

    def _refuse(self, task: Task, stored: Task, differences: Sequence[str]) -> None:
        """Raises InputError for the first of the fields in which a task differs."""
        for field in differences:
            raise InputError(
                f"task {task.name!r}: its {field} is {format_value(getattr(task, field))}, but "
                f"{self.origin} trained {stored.name!r} with "
                f"{format_value(getattr(stored, field))}; restore it, or train again in "
                "another workdir"
            )


def _digests(fingerprints: Sequence[Sequence[str]]) -> list[str]:
    return [fingerprint for _, fingerprint in fingerprints]
