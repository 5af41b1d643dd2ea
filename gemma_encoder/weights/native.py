"""Our own checkpoints: what is in them, and reading what inference needs.

WORKDIR/checkpoints/STEP/inference/inference.json   encoder, tasks, templates, lengths, format version
WORKDIR/checkpoints/STEP/inference/tokenizer.model  the SentencePiece model
WORKDIR/checkpoints/STEP/parameters/                Orbax
WORKDIR/checkpoints/STEP/training/, data/           what only resuming needs
"""

import dataclasses
import json
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.model.encoder import skeleton

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Everything but the parameters that turns text into predictions.

    Attributes:
        encoder: the model.
        tasks: the mixture it was trained on.
        tokenizer: text to ids.
        max_length: tokens of a text, bos and eos included.
        row_length: tokens of a row in training.
        padding: the side that padding took.
        step: updates taken.
    """

    encoder: EncoderConfig
    tasks: tuple[Task, ...]
    tokenizer: Tokenizer
    max_length: int
    row_length: int
    padding: str
    step: int

    def files(self) -> dict[str, bytes]:
        """The files of the `inference` folder."""
        description = {
            "format_version": FORMAT_VERSION,
            "encoder": self.encoder.to_dict(),
            "tasks": [task.to_dict() for task in self.tasks],
            "tokenizer": self.tokenizer.name,
            "max_length": self.max_length,
            "row_length": self.row_length,
            "padding": self.padding,
            "step": self.step,
        }
        return {"inference.json": json.dumps(description, indent=1).encode(), "tokenizer.model": self.tokenizer.model}


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root, which is what Orbax wants; a `gs://` path is that already."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def checkpoint_steps(workdir: epath.PathLike) -> list[int]:
    """Steps of the whole checkpoints under a workdir, in order; half-written ones are not among them."""
    folder = absolute(workdir) / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def find(path: epath.PathLike) -> epath.Path:
    """The checkpoint that `path` means: itself, or the newest one of a workdir. Raises InputError where there is none."""
    path = absolute(path)
    if (path / "inference" / "inference.json").exists():
        return path
    steps = checkpoint_steps(path)
    if not steps:
        what = "does not exist" if not path.exists() else "holds no checkpoint"
        raise InputError(f"{path} {what}; give the workdir of a training run, or one of its checkpoints/STEP folders")
    return path / "checkpoints" / str(steps[-1])


def load_bundle(checkpoint: epath.Path) -> Bundle:
    """What a checkpoint says about itself; raises InputError when it was written by another version of the format."""
    try:
        values = json.loads((checkpoint / "inference" / "inference.json").read_text())
        tokenizer = Tokenizer((checkpoint / "inference" / "tokenizer.model").read_bytes(), values.get("tokenizer", "tokenizer.model"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{checkpoint}: the inference folder is incomplete ({type(error).__name__}); the checkpoint is damaged or was copied in part"
        ) from error
    if values.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{checkpoint} has format version {values.get('format_version')}, this library reads version {FORMAT_VERSION}; "
            "use the version of gemma_encoder that wrote it, or train again"
        )
    return Bundle(
        encoder=EncoderConfig.from_dict(values["encoder"]),
        tasks=tuple(Task.from_dict(task) for task in values["tasks"]),
        tokenizer=tokenizer,
        max_length=values["max_length"],
        row_length=values["row_length"],
        padding=values["padding"],
        step=values["step"],
    )


def load_parameters(checkpoint: epath.Path, config: EncoderConfig, sharding: Any = None) -> dict:
    """The parameters of a checkpoint, restored straight to where they go.

    Args:
        checkpoint: as `find` gives it.
        config: the encoder that it holds.
        sharding: one sharding for all, or a nested dict of them; by default the first device.
    """
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = skeleton(config).shapes
    places = sharding if isinstance(sharding, dict) else jax.tree.map(lambda _: sharding, shapes)
    target = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(checkpoint / "parameters", target)
