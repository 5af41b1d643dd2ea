"""Orbax checkpoints of a run: written atomically, each enough to resume and to predict."""

import asyncio
import contextlib
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from orbax.checkpoint.checkpoint_utils import construct_restore_args

from gemma_encoder import digests
from gemma_encoder.digests import DamagedFileError
from gemma_encoder.inputs.errors import InputError, in_one_line, reason
from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.training.state import TrainState
from gemma_encoder.weights import array_store, checkpoint_folders, native
from gemma_encoder.weights.checkpoint_folders import DESCRIPTION, absolute, reading
from gemma_encoder.weights.native import InferenceSpec
from gemma_encoder.whole_files import is_remote, move_whole, sync_tree

RESCUE_MILLISECONDS = 10_000  # to wait for the other processes after a failure
METRICS = "metrics/metrics"  # as Orbax's CheckpointManager names the file


class FilesHandler(ocp.CheckpointHandler):
    """Orbax handler of small files, given as bytes; every process writes its own."""

    def save(self, directory: epath.Path, args: "FilesSave") -> None:
        """Writes each file."""
        for name, content in args.files.items():
            (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        """Restores nothing: files are read directly."""


@ocp.args.register_with_handler(FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
    """Files to write: content by name."""

    files: dict[str, bytes]


class DigestedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Temporary folder of a checkpoint, which gets its final name together with its digests."""

    async def finalize(self) -> None:
        """Writes the last files, then their digests, and renames the folder.

        Orbax calls it on the main process, once all processes have written their files; and before
        that for each item of the checkpoint, whose folders have names rather than steps.
        """
        final = self._final_path
        if not final.name.isdigit():
            await super().finalize()
            return
        # Orbax writes two files itself and renames at once: here to another temporary name.
        whole = self.get().with_name(f"{self.get().name}-whole")
        shutil.rmtree(whole, ignore_errors=True)  # of a save of this step that failed
        self._final_path = whole
        try:
            await super().finalize()
            await asyncio.to_thread(digests.write, whole)
            whole.rename(final)
        finally:
            self._final_path = final


def _trees(state: TrainState) -> dict[str, Any]:
    """Returns the trees of arrays of a checkpoint, by the names of their folders."""
    training = {"optimizer": state.optimizer, "step": state.step}
    return {"parameters": state.parameters, "training": training}


class Deleter:
    """Deletes local checkpoints for Orbax, under a temporary name: a kill leaves none in part."""

    def __init__(self, folder: epath.Path):
        self._folder = folder

    def delete(self, step: int) -> None:
        """Deletes the checkpoint of a step, on the main process."""
        if jax.process_index() != 0:
            return
        removed = self._folder / f"{step}{checkpoint_folders.TEMPORARY}-removed"
        shutil.rmtree(removed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / str(step)).rename(removed)
            shutil.rmtree(removed)

    def delete_steps(self, steps: Sequence[int]) -> None:
        """Deletes several checkpoints."""
        for step in steps:
            self.delete(step)

    def close(self) -> None:
        """Does nothing: no deletion is pending."""


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: local or `gs://`.
        keep: number of newest checkpoints to keep, besides the best one.
        lowest: whether the best value is the lowest (perplexity) rather than the highest.
        background: whether training continues while a checkpoint is written; by default on all
            backends but the CPU. On a CPU the writer reads the buffers that the next step would
            reuse for its result, so the step must allocate as much again: that takes longer than
            writing, and memory grows with each save (experiments/benchmarks/README.md).
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        keep: int = 2,
        *,
        lowest: bool = False,
        background: bool | None = None,
    ):
        if keep < 1:
            raise InputError(f"keep_checkpoints must be at least 1, got {keep}")
        best = BestN(
            get_metric_fn=lambda metrics: metrics["best"],
            n=1,
            reverse=lowest,
            keep_checkpoints_without_metrics=False,
        )
        if background is None:
            background = jax.default_backend() != "cpu"
        self.folder = absolute(workdir) / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            create=True,
            enable_async_checkpointing=background,
            temporary_path_class=None if is_remote(self.folder) else DigestedPath,
        )
        # A process that has all arrays in its own memory writes them from there.
        self._writes_directly = not background and array_store.is_local(self.folder)
        self._saving: int | None = None  # step of the newest save
        self._keep = keep
        self._sign = -1 if lowest else 1
        with in_one_line(f"{self.folder} cannot be opened"):
            self._check_before_opening()
            self._manager = ocp.CheckpointManager(self.folder, options=options)
            if not is_remote(self.folder):
                self._manager._checkpoint_deleter = Deleter(self.folder)

    def _check_before_opening(self) -> None:
        """Removes what killed saves left, and checks what Orbax reads of every checkpoint."""
        if not is_remote(self.folder) and self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is no folder; move it away, or choose another workdir")
        if jax.process_index() == 0:
            checkpoint_folders.remove_unfinished(self.folder.parent)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("unfinished_checkpoints_are_removed")
        for step in native.checkpoint_steps(self.folder.parent):
            checkpoint = self.folder / str(step)
            with reading(checkpoint, [METRICS]):
                if (checkpoint / METRICS).exists():
                    _check_metrics(checkpoint / METRICS)

    def save(
        self,
        state: TrainState,
        spec: InferenceSpec,
        data: dict[str, bytes],
        metrics: Mapping[str, float],
    ) -> None:
        """Saves a checkpoint, or starts to; returns once the state may be modified.

        Args:
            state: parameters, optimizer state and step.
            spec: the inference spec.
            data: the state of this process's readers, by file name.
            metrics: "best" and the value that selects the best checkpoint; empty without an
                evaluation.

        Raises:
            InputError: this checkpoint, or the one before it, could not be written. Earlier ones
                remain complete.
        """
        files = {"data": data, "inference": spec.files() if jax.process_index() == 0 else {}}
        save = self._save_directly if self._writes_directly else self._save_by_orbax
        with self._writing():
            self._manager.check_for_errors()
            self._saving = spec.step
            save(spec.step, _trees(state), files)
        if metrics:
            self.add_evaluation(spec, metrics)

    def _save_by_orbax(
        self, step: int, trees: Mapping[str, Any], files: Mapping[str, dict[str, bytes]]
    ) -> None:
        """Saves trees of arrays and files, by the names of their folders, or starts to."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items |= {name: FilesSave(contents) for name, contents in files.items()}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _save_directly(
        self, step: int, trees: Mapping[str, Any], files: Mapping[str, dict[str, bytes]]
    ) -> None:
        """Saves what Orbax would, without its copies; it is on disk when this returns."""
        final = pathlib.Path(self.folder) / str(step)
        unfinished = final.with_name(f"{step}{checkpoint_folders.TEMPORARY}-direct")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a save of this step that failed
        computed = {}
        for name, tree in trees.items():
            (unfinished / name).mkdir(parents=True)
            written = array_store.write_arrays(unfinished / name, tree)
            computed |= {f"{name}/{file}": digest for file, digest in written.items()}
        for name, contents in files.items():
            (unfinished / name).mkdir()
            FilesHandler().save(unfinished / name, FilesSave(contents))
        handlers = dict.fromkeys(trees, ocp.StandardCheckpointHandler.typestr())
        handlers |= dict.fromkeys(files, FilesHandler.typestr())
        description = {"item_handlers": handlers, "commit_timestamp_nsecs": time.time_ns()}
        (unfinished / "_CHECKPOINT_METADATA").write_bytes(to_json(description).encode())
        digests.write(unfinished, computed)
        sync_tree(unfinished)
        move_whole(unfinished, final)
        self._manager.reload()
        self._delete_surplus()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns errors of writing into an InputError."""
        try:
            yield
        except Exception as error:
            raise InputError(
                f"the checkpoint of step {self._saving} could not be written to {self.folder}: "
                f"{reason(error)}; earlier checkpoints are complete. "
                "Free disk space or repair the folder, then rerun the same command"
            ) from error

    def add_evaluation(self, spec: InferenceSpec, metrics: Mapping[str, float]) -> None:
        """Adds an evaluation to the checkpoint of its step, which was saved before it.

        Then older checkpoints are deleted if this one is the new best. Files are replaced one by
        one, each as a whole: a kill in between leaves a complete checkpoint.

        Args:
            spec: the inference spec, whose record holds the evaluation.
            metrics: as in `save`.

        Raises:
            InputError: the checkpoint could not be written, or changed.
        """
        self.wait()
        folder = self.folder / str(spec.step)
        problem = f"{self.folder} cannot be updated with the evaluation of step {spec.step}"
        with in_one_line(problem):
            if jax.process_index() == 0:
                contents = {DESCRIPTION: spec.files()["inference.json"]}
                if metrics:
                    (folder / METRICS).parent.mkdir(exist_ok=True)
                    contents[METRICS] = to_json(dict(metrics)).encode()
                digests.update(folder, contents)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"evaluation_of_step_{spec.step}")
            for info in self._manager._checkpoints:
                if info.step == spec.step:
                    info.metrics = self._manager.metrics(spec.step)
            self._delete_surplus()

    def _delete_surplus(self) -> None:
        """Deletes the checkpoints that are neither among the newest nor the best."""
        steps = sorted(self._manager.all_steps())
        best = self.best()
        for step in steps[: -self._keep]:
            if best is None or step != best[0]:
                self._manager.delete(step)

    def has_evaluation(self, step: int) -> bool:
        """Returns True if the checkpoint of a step has a value of the best metric."""
        return any(info.step == step and info.metrics for info in self._manager._checkpoints)

    def wait(self) -> None:
        """Waits until all checkpoints are written; raises InputError if one could not be."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def can_save_after_a_failure(self, step: int) -> bool:
        """Returns True if all processes call this for the same step within 10 seconds.

        Saving needs every process. After a failure the others may be elsewhere, and waiting for
        them in the middle of a save would take minutes.
        """
        try:
            ocp.multihost.get_barrier_sync_fn()(
                key=f"save_after_a_failure_{step}", timeout_ms=RESCUE_MILLISECONDS
            )
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None without one."""
        return self._manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """Returns step and value of the best checkpoint on disk; None if none has a value."""
        signed_values = [
            (self._sign * info.metrics["best"], info.step)
            for info in self._manager._checkpoints
            if info.metrics and "best" in info.metrics
        ]
        if not signed_values:
            return None
        signed_value, step = max(signed_values)
        return step, self._sign * signed_value

    def restore(
        self, step: int, abstract: TrainState, readers: list[str]
    ) -> tuple[TrainState, dict[str, bytes]]:
        """Restores the training state at `step` on the mesh, and the states of the data readers.

        Args:
            step: step of an existing checkpoint.
            abstract: shapes and shardings of the state.
            readers: file names of this process's readers.

        Raises:
            InputError: the checkpoint is damaged, or belongs to another model.
        """
        checkpoint = epath.Path(self.folder) / str(step)
        with reading(checkpoint, large="share"):
            if native.has_former_names(checkpoint):
                abstract = native.rename_remainder(abstract, "remainder", "rest")
            trees = {
                name: array_store.restore(checkpoint / name, construct_restore_args(tree))
                for name, tree in _trees(abstract).items()
            }
            data = {name: (checkpoint / "data" / name).read_bytes() for name in readers}
        training = trees["training"]
        if int(training["step"]) != step:
            raise InputError(
                f"{checkpoint} holds step {int(training['step'])} under another name; rename it, "
                "or move it away, to resume"
            )
        state = TrainState(trees["parameters"], training["optimizer"], training["step"])
        return native.rename_remainder(state, "rest", "remainder"), data

    def close(self) -> None:
        """Finishes writing and releases the folder; errors are logged, `wait` raises them."""
        try:
            self._manager.close()
        except Exception:
            logging.warning("the last checkpoint of %s may not have been written", self.folder)


def _check_metrics(path: epath.Path) -> None:
    """Raises DamagedFileError if a file has no value of the best metric."""
    try:
        float(read_object(path)["best"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(path, "is damaged: it has no value of the best metric") from error
