"""Checkpoints of a run: written by Orbax in the background, each one whole or absent, one folder enough to resume and to predict."""

import dataclasses

import jax
import orbax.checkpoint as ocp
from etils import epath

from gemma_encoder.training.state import TrainState
from gemma_encoder.weights.native import Bundle, absolute


class FilesHandler(ocp.CheckpointHandler):
    """An Orbax handler for small files that are bytes already; every process writes its own."""

    def save(self, directory: epath.Path, args: "FilesSave") -> None:
        """Writes each file."""
        for name, content in args.files.items():
            (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: "FilesRestore | None" = None) -> dict[str, bytes]:
        """Reads the files that this process asked for, or all."""
        names = args.names if args and args.names else [path.name for path in directory.iterdir() if not path.name.startswith("_")]
        return {name: (directory / name).read_bytes() for name in names}


@ocp.args.register_with_handler(FilesHandler, for_save=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
    """What to write: content by file name."""

    files: dict[str, bytes]


@ocp.args.register_with_handler(FilesHandler, for_restore=True)
@dataclasses.dataclass
class FilesRestore(ocp.args.CheckpointArgs):
    """Which files to read; all by default."""

    names: list[str] = dataclasses.field(default_factory=list)


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: local or `gs://`.
        keep: how many of the newest stay.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(absolute(workdir) / "checkpoints", options=options)
        self.folder = self._manager.directory

    def save(self, state: TrainState, bundle: Bundle, data: dict[str, bytes]) -> None:
        """Starts saving; returns when the state may change again.

        Args:
            state: parameters, optimiser state and step.
            bundle: what inference needs.
            data: the state of this process's readers.
        """
        inference = bundle.files() if jax.process_index() == 0 else {}
        self._manager.save(
            bundle.step,
            args=ocp.args.Composite(
                parameters=ocp.args.StandardSave(state.parameters),
                training=ocp.args.StandardSave({"optimizer": state.optimizer, "step": state.step}),
                data=FilesSave(data),
                inference=FilesSave(inference),
            ),
        )

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def restore(self, step: int, abstract: TrainState, readers: list[str]) -> tuple[TrainState, dict[str, bytes]]:
        """The state of training at `step`, each array where `abstract` says, and the data readers' states.

        Args:
            step: of an existing checkpoint.
            abstract: shapes and shardings.
            readers: the files of this process's readers.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                parameters=ocp.args.StandardRestore(abstract.parameters),
                training=ocp.args.StandardRestore({"optimizer": abstract.optimizer, "step": abstract.step}),
                data=FilesRestore(readers),
            ),
        )
        training = restored["training"]
        return TrainState(restored["parameters"], training["optimizer"], training["step"]), restored["data"]

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()
