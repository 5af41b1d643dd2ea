"""Checkpoints of a run, by Orbax: each whole or absent, each enough to resume and predict."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training.state import TrainState
from gemma_encoder.weights import native
from gemma_encoder.weights.native import InferenceSpec, absolute

RESCUE_MILLISECONDS = 10_000


class FilesHandler(ocp.CheckpointHandler):
    """An Orbax handler for small files that are bytes already; every process writes its own."""

    def save(self, directory: epath.Path, args: "FilesSave") -> None:
        """Writes each file."""
        for name, content in args.files.items():
            (directory / name).write_bytes(content)

    def restore(
        self, directory: epath.Path, args: "FilesRestore | None" = None
    ) -> dict[str, bytes]:
        """Reads the files that this process asked for, or all."""
        names = (
            args.names
            if args and args.names
            else [path.name for path in directory.iterdir() if not path.name.startswith("_")]
        )
        return {name: (directory / name).read_bytes() for name in names}


@ocp.args.register_with_handler(FilesHandler, for_save=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
    """Files to write: content by name."""

    files: dict[str, bytes]


@ocp.args.register_with_handler(FilesHandler, for_restore=True)
@dataclasses.dataclass
class FilesRestore(ocp.args.CheckpointArgs):
    """Names of the files to read; all by default."""

    names: list[str] = dataclasses.field(default_factory=list)


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: local or `gs://`.
        keep: how many of the newest stay, besides the best one.
        lowest: whether the best one has the lowest value (perplexity) rather than the highest.
        background: whether training goes on while a checkpoint is written; by default everywhere
            but on a CPU. There the writer reads the very memory that the next step reuses for its
            result, so that the step has to allocate as much again: that takes longer than writing
            does, and the process grows from save to save (experiments/benchmarks/README.md).
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
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=lambda metrics: metrics["best"],
            best_mode="min" if lowest else "max",
            create=True,
            enable_async_checkpointing=jax.default_backend() != "cpu"
            if background is None
            else background,
        )
        self.folder = absolute(workdir) / "checkpoints"
        self._saving: int | None = None
        self._sign = -1 if lowest else 1
        with self._refusing("opened"):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Turns errors of Orbax, TensorStore and the file system into one line."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self.folder} cannot be {what}: {_reason(error)}") from error

    def save(
        self,
        state: TrainState,
        spec: InferenceSpec,
        data: dict[str, bytes],
        chosen_by: Mapping[str, float],
    ) -> None:
        """Saves, or starts to; returns once the state may change again.

        Args:
            state: parameters, optimizer state and step.
            bundle: what inference needs.
            data: the state of this process's readers.
            chosen_by: "best" and the value by which the best checkpoint is selected; empty where
                there was no evaluation.

        Raises:
            InputError: this checkpoint, or the one before it, could not be written. Earlier ones
                stay whole.
        """
        with self._writing():
            self._manager.check_for_errors()
            self._saving = spec.step
            inference = spec.files() if jax.process_index() == 0 else {}
            self._manager.save(
                spec.step,
                args=ocp.args.Composite(
                    parameters=ocp.args.StandardSave(state.parameters),
                    training=ocp.args.StandardSave(
                        {"optimizer": state.optimizer, "step": state.step}
                    ),
                    data=FilesSave(data),
                    inference=FilesSave(inference),
                ),
                metrics=dict(chosen_by) or None,
                force=True,
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise InputError(
                f"the checkpoint of step {self._saving} could not be written to {self.folder}: "
                f"{_reason(error)}; those before it are whole. "
                "Make room, or mend the folder, and start the same command again"
            ) from error

    def wait(self) -> None:
        """Waits until all is written; raises InputError where it could not be."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def can_save_after_a_failure(self, step: int) -> bool:
        """Whether all processes ask for this step within some seconds.

        Saving needs every process. After a failure the others may be elsewhere: waiting for them
        in the middle of a save would take minutes.
        """
        try:
            ocp.multihost.get_barrier_sync_fn()(
                key=f"save_after_a_failure_{step}", timeout_ms=RESCUE_MILLISECONDS
            )
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """Step and value of the best checkpoint on disk; None where none has a value."""
        valued = [
            (self._sign * info.metrics["best"], info.step)
            for info in self._manager._checkpoints
            if info.metrics and "best" in info.metrics
        ]
        return (max(valued)[1], self._sign * max(valued)[0]) if valued else None

    def restore(
        self, step: int, abstract: TrainState, readers: list[str]
    ) -> tuple[TrainState, dict[str, bytes]]:
        """The training state at `step`, on the mesh, and the states of the data readers.

        Args:
            step: of an existing checkpoint.
            abstract: shapes and shardings of the state.
            readers: the files of this process's readers.

        Raises:
            InputError: the checkpoint is damaged, or of another model.
        """
        away = (
            f"choose another workdir, or move {self.folder / str(step)} away to go on from "
            "the one before"
        )
        with self._refusing(f"read at step {step}, which is damaged or of another run ({away})"):
            if native.has_former_names(epath.Path(self.folder) / str(step)):
                abstract = native.rename_remainder(abstract, "remainder", "rest")
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    parameters=ocp.args.StandardRestore(abstract.parameters),
                    training=ocp.args.StandardRestore(
                        {"optimizer": abstract.optimizer, "step": abstract.step}
                    ),
                    data=FilesRestore(readers),
                ),
            )
        training = restored["training"]
        state = TrainState(restored["parameters"], training["optimizer"], training["step"])
        return native.rename_remainder(state, "rest", "remainder"), restored["data"]

    def close(self) -> None:
        """Finishes writing and releases the folder; `wait` is what reports errors."""
        try:
            self._manager.close()
        except Exception:
            logging.warning("the last checkpoint of %s may not have been written", self.folder)


def _reason(error: BaseException) -> str:
    """The error's message without the C++ source lines that TensorStore adds."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(" [tensorstore_spec")[0].split(" [source locations")[0][:300]
