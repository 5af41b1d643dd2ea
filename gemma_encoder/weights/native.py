"""Our own checkpoints: what is in them, and reading what inference needs.

WORKDIR/checkpoints/STEP/inference/inference.json   encoder, tasks, templates, lengths, format version
WORKDIR/checkpoints/STEP/inference/tokenizer.model  the SentencePiece model
WORKDIR/checkpoints/STEP/parameters/                Orbax
WORKDIR/checkpoints/STEP/training/, data/           what only resuming needs
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding

from gemma_encoder.inputs.descriptions import check_mapping, from_fields
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model.config import EncoderConfig, TransformerConfig
from gemma_encoder.model.encoder import abstract_encoder, parameter_paths
from gemma_encoder.model.heads import check_heads
from gemma_encoder.model.lora import is_adapter, merge_backbone_lora
from gemma_encoder.weights.tensors import Checkpoint, Tensor

FORMAT_VERSION = 3  # rises whenever a field is added or renamed


@dataclasses.dataclass(frozen=True)
class InferenceSpec:
    """Everything but the parameters that turns text into predictions.

    Attributes:
        encoder: the model.
        tasks: the mixture it was trained on.
        tokenizer: text to ids.
        max_length: tokens of a text, bos and eos included.
        row_length: tokens of a row in training.
        padding: the side that padding took.
        step: updates taken.
        record: how it came about, for people to read: "command", "config", "examples" (training records by task) and "metrics" (the
            latest line of `metrics.jsonl` of each task and split). Empty where nobody wrote it down.
    """

    encoder: EncoderConfig
    tasks: tuple[Task, ...]
    tokenizer: Tokenizer
    max_length: int
    row_length: int
    padding: str
    step: int
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def description(self) -> dict[str, Any]:
        """All of it but the tokenizer's model, JSON-ready; `from_description` is its inverse."""
        return {
            "format_version": FORMAT_VERSION,
            "encoder": self.encoder.to_dict(),
            "tasks": [task.to_dict() for task in self.tasks],
            "tokenizer": self.tokenizer.name,
            "max_length": self.max_length,
            "row_length": self.row_length,
            "padding": self.padding,
            "step": self.step,
            "record": dict(self.record),
        }

    @classmethod
    def from_description(
        cls, values: Mapping[str, Any], model: bytes, where: epath.Path
    ) -> "InferenceSpec":
        """The bundle that `description` and the tokenizer's model describe.

        Descriptions of former formats are read, too.

        Raises:
            InputError: a newer version of the format wrote it, or a field is not known here.
        """
        try:
            check_mapping(values, "a checkpoint", "format_version", "encoder", "tasks")
            if not isinstance(values["tasks"], list | tuple):
                raise InputError("the description's tasks are no list; it is damaged")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        version = values["format_version"]
        if version not in range(1, FORMAT_VERSION + 1):
            raise InputError(
                f"{where} has format version {version!r}, this library reads versions 1 to "
                f"{FORMAT_VERSION}; use the version of gemma_encoder that wrote it, or train again"
            )
        if version == 1:
            values = _upgrade(values)
        try:
            fields = {
                "encoder": EncoderConfig.from_dict(values["encoder"]),
                "tasks": tuple(Task.from_dict(task) for task in values["tasks"]),
                "tokenizer": Tokenizer(model, values.get("tokenizer", "tokenizer.model")),
            }
            check_heads(fields["encoder"])
            _check_tasks(fields["tasks"], fields["encoder"])
        except InputError as error:
            if absent := _absent_modules(values):
                raise InputError(
                    f"{where}: {error}; import {', '.join(absent)} first (--modules), as training "
                    "did"
                ) from None
            raise InputError(f"{where}: {error}") from None
        rest = {name: value for name, value in values.items() if name != "format_version"}
        try:
            record = rest.pop("record", {})
            spec = from_fields(cls, {**rest, **fields}, "a checkpoint")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return dataclasses.replace(spec, record=record)

    def files(self) -> dict[str, bytes]:
        """The files of the `inference` folder."""
        return {
            "inference.json": json.dumps(self.description(), indent=1).encode(),
            "tokenizer.model": self.tokenizer.model,
        }


def _absent_modules(values: Mapping[str, Any]) -> list[str]:
    """Modules that the training run imported and this process did not."""
    modules = values.get("record", {}).get("config", {}).get("modules", ())
    return [name for name in modules if name not in sys.modules]


def _check_tasks(tasks: Sequence[Task], encoder: EncoderConfig) -> None:
    """Raises InputError where a task has no head, or one of another width."""
    for task in tasks:
        head = encoder.heads.get(task.head)
        if head is None or head.outputs != task.num_outputs:
            has = "none" if head is None else f"{head.outputs}"
            raise InputError(
                f"task {task.name!r} needs a head {task.head!r} of {task.num_outputs} outputs, the "
                f"encoder has {has}; the description is damaged"
            )


def _upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """A description of format version 1, whose heads were widths with settings beside them."""
    encoder = dict(values["encoder"])
    hidden_dims, language = encoder.pop("head_hidden", ()), encoder.pop("language_heads", ())
    encoder["heads"] = {
        name: {"outputs": outputs, "kind": "language_model"}
        if name in language
        else {"outputs": outputs, "hidden_dims": hidden_dims}
        for name, outputs in encoder["heads"].items()
    }
    return {**values, "encoder": encoder}


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
        raise InputError(
            f"{path} {what}; give the workdir of a training run, or one of its checkpoints/STEP folders"
        )
    return path / "checkpoints" / str(steps[-1])


def load_inference_spec(checkpoint: epath.Path) -> InferenceSpec:
    """What a checkpoint says about itself; raises InputError when it is damaged, or was written by another version of the format."""
    folder = checkpoint / "inference"
    try:
        values, model = (
            json.loads((folder / "inference.json").read_text()),
            (folder / "tokenizer.model").read_bytes(),
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint}: the inference folder is incomplete ({type(error).__name__}); the checkpoint is damaged or was copied in part"
        ) from error
    return InferenceSpec.from_description(values, model, checkpoint)


def load_parameters(checkpoint: epath.Path, config: EncoderConfig, sharding: Any = None) -> dict:
    """The parameters of a checkpoint, restored straight to where they go.

    Args:
        checkpoint: as `find` gives it.
        config: the encoder that it holds.
        sharding: one sharding for all, or a nested dict of them; by default the first device.
    """
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = abstract_encoder(config).shapes
    places = sharding if isinstance(sharding, dict) else jax.tree.map(lambda _: sharding, shapes)
    return _restore(checkpoint, shapes, places, None)


def load_part(checkpoint: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Some parameters of a checkpoint by their paths, as a nested dict, each with the sharding of its entry."""
    shapes: dict = {}
    for path, leaf in wanted.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, shapes)[name] = leaf
    return _restore(checkpoint, shapes, jax.tree.map(lambda leaf: leaf.sharding, shapes), None)


def rename_remainder(tree: Any, former: str, current: str) -> Any:
    """Renames the group of parameters after the repeated pattern, wherever a tree holds a backbone.

    Formats 1 and 2 call it `rest`, format 3 `remainder`. The tree may be an optimizer's state.
    """

    def renamed(node: Any) -> Any:
        if not _holds_backbone(node):
            return node
        backbone = {current if key == former else key: x for key, x in node["backbone"].items()}
        return {**node, "backbone": backbone}

    return jax.tree.map(renamed, tree, is_leaf=_holds_backbone)


def _holds_backbone(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("backbone"), dict)


@functools.cache
def has_former_names(checkpoint: epath.Path) -> bool:
    """Tells checkpoints of formats 1 and 2, whose parameters have names of their own."""
    description = json.loads((checkpoint / "inference" / "inference.json").read_text())
    return description["format_version"] < 3


def _restore(checkpoint: epath.Path, shapes: dict, shardings: dict, dtype: Any) -> dict:
    """A part of a checkpoint's parameters, each with its sharding."""
    if has_former_names(checkpoint):
        shapes = rename_remainder(shapes, "remainder", "rest")
        shardings = rename_remainder(shardings, "remainder", "rest")
    arguments = jax.tree.map(
        lambda leaf, sharding: ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=leaf.shape, dtype=dtype
        ),
        shapes,
        shardings,
    )
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    item = jax.tree.map(lambda _: 0, shapes)
    restored = reader.restore(
        checkpoint / "parameters",
        args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True),
    )
    return rename_remainder(restored, "rest", "remainder")


def replicated_like(sharding: Sharding) -> Sharding:
    """The whole of an array on every device that `sharding` names."""
    return (
        jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        if isinstance(sharding, jax.sharding.NamedSharding)
        else sharding
    )


class NativeCheckpoint(Checkpoint):
    """The backbone of one of our own checkpoints; its pooler and heads are what is skipped.

    Args:
        path: a workdir, or one of its checkpoints.
    """

    def __init__(self, path: epath.PathLike):
        self.folder = find(path)
        self.spec = load_inference_spec(self.folder)
        self.description = f"the fine-tuned checkpoint {self.folder}"
        metadata = ocp.PyTreeCheckpointHandler().metadata(self.folder / "parameters").tree
        metadata = rename_remainder(dict(metadata), "rest", "remainder")
        found = {
            name: leaf for name, leaf in parameter_paths(metadata).items() if not is_adapter(name)
        }
        self.tensors = {
            name.removeprefix("backbone/"): Tensor(tuple(leaf.shape), np.dtype(leaf.dtype))
            for name, leaf in found.items()
            if name.startswith("backbone/")
        }
        self.skipped = tuple(name for name in found if not name.startswith("backbone/"))

    def config(self, hint: TransformerConfig | None = None) -> TransformerConfig:
        """The transformer that the checkpoint says."""
        del hint
        return self.spec.encoder.transformer

    def expected(self, config: TransformerConfig) -> dict[str, list[tuple[int, ...]]]:
        """Our own parameters."""
        return {
            name: [leaf.shape]
            for name, leaf in parameter_paths(
                abstract_encoder(EncoderConfig(config)).shapes["backbone"]
            ).items()
        }

    def read(self, name: str, sharding: Sharding) -> jax.Array:
        """One parameter."""
        nested: Any = Tensor(*self.tensors[name])
        place: Any = sharding
        for key in reversed(("backbone", *name.split("/"))):
            nested, place = {key: nested}, {key: place}
        shapes = jax.tree.map(
            lambda tensor: jax.ShapeDtypeStruct(*tensor),
            nested,
            is_leaf=lambda node: isinstance(node, Tensor),
        )
        return next(iter(jax.tree.leaves(_restore(self.folder, shapes, place, None))))

    def load(
        self, config: TransformerConfig, shapes: dict, shardings: dict, dtype: jnp.dtype
    ) -> dict:
        """Restored straight to where it goes: nothing has to be rearranged, but adapters are added to their matrices."""
        self.check(config)
        lora = self.spec.encoder.lora
        if lora.rank:
            own = parameter_paths(shapes)
            place = replicated_like(next(iter(jax.tree.leaves(shardings))))
            everything = abstract_encoder(self.spec.encoder).shapes["backbone"]
            places = {
                **{path: place for path in parameter_paths(everything)},
                **dict(zip(own, jax.tree.leaves(shardings), strict=True)),
            }
            nested = jax.tree.unflatten(
                jax.tree.structure(everything),
                [places[path] for path in parameter_paths(everything)],
            )
            return merge_backbone_lora(
                _restore(self.folder, {"backbone": everything}, {"backbone": nested}, dtype)[
                    "backbone"
                ],
                lora,
            )
        return _restore(self.folder, {"backbone": shapes}, {"backbone": shardings}, dtype)[
            "backbone"
        ]
