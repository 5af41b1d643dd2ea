"""Our own checkpoints: their contents, their former formats, and restoring their parameters.

WORKDIR/checkpoints/STEP/
    inference/inference.json    encoder, tasks, templates, lengths, format version
    inference/tokenizer.model   the SentencePiece model
    parameters/                 Orbax
    training/, data/            state that only resuming needs
    metrics/                    the value of best_metric, if it was evaluated
    digests.json                size and digest of every file, see `gemma_encoder.digests`
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding

from gemma_encoder import digests
from gemma_encoder.digests import DamagedFileError
from gemma_encoder.inputs.descriptions import check_mapping, described_at, from_fields
from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.inputs.uncertainty import Calibration
from gemma_encoder.inputs.untrusted import read_bounded
from gemma_encoder.model.config import EncoderConfig, TransformerConfig
from gemma_encoder.model.encoder import abstract_encoder, parameter_paths
from gemma_encoder.model.heads import check_heads
from gemma_encoder.model.lora import is_adapter, merge_backbone_lora
from gemma_encoder.weights import array_store, doors
from gemma_encoder.weights.checkpoint_folders import DESCRIPTION, find, read_description, reading
from gemma_encoder.weights.checkpoint_folders import absolute as absolute
from gemma_encoder.weights.checkpoint_folders import check_encoding as check_encoding
from gemma_encoder.weights.checkpoint_folders import checkpoint_steps as checkpoint_steps
from gemma_encoder.weights.tensors import Checkpoint, Tensor

# Increased whenever a field or a parameter is added, renamed or given another meaning.
# Format 1 is upgraded by `_upgrade_heads`. Fields renamed since format 2 have the metadata
# `former`; its parameters are renamed by `rename_remainder`.
FORMAT_VERSION = 3
PARAMETER_FILES = (DESCRIPTION, "parameters")  # that are read to restore parameters


@dataclasses.dataclass(frozen=True)
class InferenceSpec:
    """All that inference needs besides the parameters.

    Attributes:
        encoder: the model's config.
        tasks: tasks of the training mixture.
        tokenizer: tokenizer of the model.
        max_length: maximum number of tokens of a text, bos and eos included.
        row_length: tokens per row in training.
        padding: padding side, "right" or "left".
        step: number of updates.
        record: provenance: "command", "config", "examples" (training records by task), "metrics"
            (the latest line of `metrics.jsonl` of each task and split), "data" (fingerprints of
            the files by task and split, compared when a run resumes) and "inferred" (decisions made
            from the training data by task, see `data.source.Source`). Empty if not recorded.
        prompts: texts to put before others, by name, of a sentence-transformers folder.
        default_prompt: name of the prompt for texts without another; "" for none.
        similarity: the folder's `similarity_fn_name`; "" for none.
    """

    encoder: EncoderConfig
    tasks: tuple[Task, ...]
    tokenizer: Tokenizer
    max_length: int
    row_length: int
    padding: str
    step: int
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str = ""
    similarity: str = ""

    def description(self) -> dict[str, Any]:
        """Returns all but the tokenizer's model, JSON-ready; inverse of `from_description`."""
        names = ("prompts", "default_prompt", "similarity")
        optional = {name: getattr(self, name) for name in names if getattr(self, name)}
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
        } | optional

    @classmethod
    def from_description(
        cls, values: Mapping[str, Any], model: bytes, where: epath.Path
    ) -> "InferenceSpec":
        """Creates a spec from a description, of this or an earlier format version.

        Args:
            values: the description returned by `description`.
            model: the serialized SentencePiece model.
            where: the checkpoint, for messages.

        Raises:
            InputError: the description is damaged, or a newer version wrote it.
        """
        with described_at(where):
            check_mapping(values, "a checkpoint", "format_version", "encoder", "tasks")
            if not isinstance(values["tasks"], list | tuple):
                raise InputError("the description's tasks are not a list; it is damaged")
        version = values["format_version"]
        if version not in range(1, FORMAT_VERSION + 1):
            raise InputError(
                f"{where} has format version {version!r}, this library reads versions 1 to "
                f"{FORMAT_VERSION}; use the version of gemma_encoder that wrote it, or train again"
            )
        with described_at(where):
            absent = _absent_modules(values)
            hint = f"import {', '.join(absent)} first (--modules), as training did"
            with described_at(advice=hint if absent else ""):
                values = _upgrade_heads(values) if version == 1 else values
                fields = _parse_fields(values, model)
            plain = {name: value for name, value in values.items() if name != "format_version"}
            check_mapping(values.get("record", {}), "a record")
            spec = from_fields(cls, {**plain, **fields, "record": {}}, "a checkpoint")
            doors.check_lengths(spec.max_length, spec.row_length)
        return dataclasses.replace(spec, record=values.get("record", {}))

    def files(self) -> dict[str, bytes]:
        """Returns the files of the `inference` folder, by name."""
        return {
            "inference.json": to_json(self.description(), indent=1).encode(),
            "tokenizer.model": self.tokenizer.model,
        }


def _parse_fields(values: Mapping[str, Any], model: bytes) -> dict[str, Any]:
    """Returns the fields of InferenceSpec that are objects; raises InputError if one is damaged."""
    fields = {
        "encoder": EncoderConfig.from_dict(values["encoder"]),
        "tasks": tuple(Task.from_dict(task) for task in values["tasks"]),
        "tokenizer": Tokenizer(model, values.get("tokenizer", "tokenizer.model")),
    }
    check_heads(fields["encoder"])
    _check_tasks(fields["tasks"], fields["encoder"])
    return fields


def _absent_modules(values: Mapping[str, Any]) -> list[str]:
    """Returns the modules that the training run imported and this process did not."""
    config = _mapping(_mapping(values.get("record")).get("config"))
    return [name for name in config.get("modules") or () if name not in sys.modules]


def _mapping(value: Any) -> Mapping[str, Any]:
    """Returns a value if it is a mapping, else an empty one: records are not checked."""
    return value if isinstance(value, Mapping) else {}


def _check_tasks(tasks: Sequence[Task], encoder: EncoderConfig) -> None:
    """Raises InputError if a task's head is missing or has another number of outputs."""
    for task in tasks:
        head = encoder.heads.get(task.head)
        # A width of 0 stands for that of the encoder's vectors, which the head itself checks.
        if head is None or task.num_outputs not in (0, head.outputs):
            actual = "none" if head is None else f"{head.outputs}"
            raise InputError(
                f"task {task.name!r} needs a head {task.head!r} of {task.num_outputs} outputs, the "
                f"encoder has {actual}; the description is damaged"
            )


def _upgrade_heads(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a description of format version 1, in which a head was only its number of outputs.

    All MLP heads shared the field `head_hidden`; language models were listed in `language_heads`.
    """
    encoder = dict(values["encoder"])
    hidden_dims = encoder.pop("head_hidden", ())
    language = encoder.pop("language_heads", ())
    encoder["heads"] = {
        name: {"outputs": outputs, "kind": "language_model"}
        if name in language
        else {"outputs": outputs, "hidden_dims": hidden_dims}
        for name, outputs in encoder["heads"].items()
    }
    return {**values, "encoder": encoder}


def load_inference_spec(checkpoint: epath.Path) -> InferenceSpec:
    """Loads the spec of a checkpoint.

    Raises:
        InputError: the checkpoint is damaged, or a newer version of the format.
    """
    with reading(checkpoint, ["inference"]):
        values = read_description(checkpoint)
        tokenizer_file = checkpoint / "inference" / "tokenizer.model"
        model = read_bounded(tokenizer_file)
        try:
            return InferenceSpec.from_description(values, model, checkpoint)
        except InputError:
            _check_tokenizer(tokenizer_file, model)
            raise


def _check_tokenizer(path: epath.Path, model: bytes) -> None:
    """Raises DamagedFileError if a stored tokenizer is damaged."""
    try:
        Tokenizer(model, path.name)
    except InputError as error:
        raise DamagedFileError(path, f"is damaged ({error})") from error


def store_calibrations(checkpoint: epath.Path, calibrations: Mapping[str, Calibration]) -> None:
    """Stores calibrations by task in a checkpoint; its `inference.json` is replaced atomically."""
    with reading(checkpoint, [DESCRIPTION]):
        values = read_description(checkpoint)
        for task in values["tasks"]:
            if task["name"] in calibrations:
                task["calibration"] = dataclasses.asdict(calibrations[task["name"]])
    with in_one_line(f"{checkpoint / DESCRIPTION} cannot be written", errors=OSError):
        digests.update(checkpoint, {DESCRIPTION: to_json(values, indent=1).encode()})


def load_parameters(checkpoint: epath.Path, config: EncoderConfig, sharding: Any = None) -> dict:
    """Restores the parameters of a checkpoint straight to their devices.

    Args:
        checkpoint: folder returned by `find`.
        config: the checkpoint's encoder.
        sharding: one sharding for all, or a nested dict of them; by default the first device.
    """
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = abstract_encoder(config).shapes
    shardings = sharding if isinstance(sharding, dict) else jax.tree.map(lambda _: sharding, shapes)
    with reading(checkpoint, PARAMETER_FILES, "share"):
        return _restore(checkpoint, shapes, shardings, None)


def load_part(checkpoint: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Restores some parameters of a checkpoint, whose files are checked.

    Args:
        checkpoint: folder returned by `find`.
        abstract: shape and sharding of each parameter, by path.

    Returns:
        A nested dict of the parameters.
    """
    with reading(checkpoint, PARAMETER_FILES, "share"):
        return restore_part(checkpoint, abstract)


def restore_part(checkpoint: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Restores some parameters, without a check; see `load_part`."""
    shapes: dict = {}
    for path, leaf in abstract.items():
        *parents, name = path.split("/")
        node = shapes
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return _restore(checkpoint, shapes, jax.tree.map(lambda leaf: leaf.sharding, shapes), None)


def rename_remainder(tree: Any, old: str, new: str) -> Any:
    """Renames the group of layers after the repeated pattern in every backbone of a tree.

    Formats 1 and 2 call it `rest`, format 3 `remainder`. The tree may be an optimizer's state.
    """

    def renamed(node: Any) -> Any:
        if not _holds_backbone(node):
            return node
        backbone = {new if key == old else key: x for key, x in node["backbone"].items()}
        return {**node, "backbone": backbone}

    return jax.tree.map(renamed, tree, is_leaf=_holds_backbone)


def _holds_backbone(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("backbone"), dict)


def has_former_names(checkpoint: epath.Path) -> bool:
    """Returns True for checkpoints of formats 1 and 2, which name some parameters differently."""
    return read_description(checkpoint)["format_version"] < 3


def _restore(checkpoint: epath.Path, shapes: dict, shardings: dict, dtype: Any) -> dict:
    """Restores the parameters in `shapes`, a nested dict, each with its sharding.

    `dtype` converts them; None keeps the stored one.
    """
    if has_former_names(checkpoint):
        shapes = rename_remainder(shapes, "remainder", "rest")
        shardings = rename_remainder(shardings, "remainder", "rest")
    stored = ocp.PyTreeCheckpointHandler().metadata(checkpoint / "parameters").tree
    doors.check_stored(parameter_paths(shapes), parameter_paths(stored), checkpoint)
    arguments = jax.tree.map(
        lambda leaf, sharding: ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=leaf.shape, dtype=dtype
        ),
        shapes,
        shardings,
    )
    restored = array_store.restore(checkpoint / "parameters", arguments, partial=True)
    return rename_remainder(restored, "rest", "remainder")


def replicated_like(sharding: Sharding) -> Sharding:
    """Returns the sharding that replicates an array on the devices of `sharding`."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


class NativeCheckpoint(Checkpoint):
    """The backbone of one of our own checkpoints; the pooler and the heads are skipped.

    Args:
        path: a workdir, or one of its checkpoints.
    """

    def __init__(self, path: epath.PathLike):
        self.folder = find(path)
        self.spec = load_inference_spec(self.folder)
        self.description = f"the fine-tuned checkpoint {self.folder}"
        self._is_checked = False
        with reading(self.folder, PARAMETER_FILES, "skip"):
            doors.check_files(self.folder / "parameters")
            metadata = ocp.PyTreeCheckpointHandler().metadata(self.folder / "parameters").tree
            metadata = rename_remainder(dict(metadata), "rest", "remainder")
            parameters = {
                name: leaf
                for name, leaf in parameter_paths(metadata).items()
                if not is_adapter(name)
            }
            self.tensors = {
                name.removeprefix("backbone/"): Tensor(tuple(leaf.shape), np.dtype(leaf.dtype))
                for name, leaf in parameters.items()
                if name.startswith("backbone/")
            }
        self.skipped = tuple(name for name in parameters if not name.startswith("backbone/"))
        stored = [Tensor(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in parameters.values()]
        doors.check_sizes(self.spec.encoder, [tensor.shape for tensor in stored], self.folder)
        doors.check_bytes(self.folder, stored, self.folder)

    def config(self, hint: TransformerConfig | None = None) -> TransformerConfig:
        """Returns the transformer of the stored spec."""
        del hint
        return self.spec.encoder.transformer

    def expected(self, config: TransformerConfig) -> dict[str, list[tuple[int, ...]]]:
        """Returns the shape of every parameter of our backbone; raises InputError for int8."""
        doors.check_float32(self.spec.encoder, self.description)
        shapes = abstract_encoder(EncoderConfig(config)).shapes["backbone"]
        return {name: [leaf.shape] for name, leaf in parameter_paths(shapes).items()}

    def read(self, name: str, sharding: Sharding) -> jax.Array:
        """Restores one parameter; the first call checks the files of all."""
        tensor = self.tensors[name]
        abstract = jax.ShapeDtypeStruct(tensor.shape, tensor.dtype, sharding=sharding)
        parts = [] if self._is_checked else PARAMETER_FILES
        with reading(self.folder, parts, "share"):
            parameters = restore_part(self.folder, {f"backbone/{name}": abstract})
        self._is_checked = True
        return jax.tree.leaves(parameters)[0]

    def load(
        self, config: TransformerConfig, shapes: dict, shardings: dict, dtype: jnp.dtype
    ) -> dict:
        """Restores the backbone straight to its devices; LoRA adapters are merged."""
        self.check(config)
        lora = self.spec.encoder.lora
        if not lora.rank:
            return self._restore_backbone(shapes, shardings, dtype)
        shapes_with_adapters = abstract_encoder(self.spec.encoder).shapes["backbone"]
        replicated = replicated_like(jax.tree.leaves(shardings)[0])
        sharding_of = parameter_paths(shardings)
        shardings_with_adapters = jax.tree.unflatten(
            jax.tree.structure(shapes_with_adapters),
            [sharding_of.get(path, replicated) for path in parameter_paths(shapes_with_adapters)],
        )
        backbone = self._restore_backbone(shapes_with_adapters, shardings_with_adapters, dtype)
        return merge_backbone_lora(backbone, lora)

    def _restore_backbone(self, shapes: dict, shardings: dict, dtype: jnp.dtype) -> dict:
        with reading(self.folder, PARAMETER_FILES, "share"):
            parameters = _restore(self.folder, {"backbone": shapes}, {"backbone": shardings}, dtype)
        return parameters["backbone"]
