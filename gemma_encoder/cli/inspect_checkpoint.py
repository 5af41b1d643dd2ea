"""Shows the size and the tensors of a checkpoint, and if it loads.

    gemma-encoder inspect PATH [--read]     PATH as `load_backbone` takes it
    gemma-encoder inspect --sizes           table of published sizes

Exit codes: 0 if the checkpoint loads; 1 if it is of another model or has a damaged tensor; 2 if its
format is not recognized.
"""

import collections
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma_encoder import terminal
from gemma_encoder.cli import commandline
from gemma_encoder.inputs.errors import InputError

if TYPE_CHECKING:
    from gemma_encoder.model.config import TransformerConfig
    from gemma_encoder.weights.tensors import Checkpoint


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    parser = commandline.ArgumentParser(
        prog="gemma-encoder inspect",
        description=__doc__,
    )
    parser.add_argument(
        "path",
        nargs="?",
        help="folder of a checkpoint, a workdir, or a published name such as GEMMA2_2B_PT",
    )
    parser.add_argument(
        "--read",
        action="store_true",
        help="read every tensor, one at a time, and check that its values are finite",
    )
    parser.add_argument("--sizes", action="store_true", help="print the table of published sizes")
    options = parser.parse_args(argv)
    if options.sizes:
        terminal.print_result(size_table())
        return 0
    if options.path is None:
        parser.error("name a checkpoint, or ask for --sizes")
    from gemma_encoder.weights.backbone import open_checkpoint

    checkpoint = open_checkpoint(options.path)
    problems = list(describe_checkpoint(checkpoint))
    if options.read and not problems:
        problems = list(unreadable(checkpoint))
    if problems:
        terminal.print_result("loads       no")
    else:
        terminal.print_result(f"loads       yes{', every tensor was read' if options.read else ''}")
    for problem in problems:
        terminal.print_result(f"            {problem}")
    return 1 if problems else 0


def describe_checkpoint(checkpoint: "Checkpoint") -> list[str]:
    """Prints the contents of a checkpoint and returns the problems that prevent loading it."""
    terminal.print_result(checkpoint.description)
    terminal.print_result(f"parameters  {_parameters_text(checkpoint)}")
    problems: list[str] = []
    try:
        config = checkpoint.config()
        _print_config(checkpoint, config)
        checkpoint.check(config)
    except InputError as error:
        problems = str(error).split("; ")
    _print_calibrations(checkpoint)
    _print_tensors(checkpoint)
    if checkpoint.skipped:
        terminal.print_result(f"not read    {_skipped_text(checkpoint)}")
    return problems


def unreadable(checkpoint: "Checkpoint") -> list[str]:
    """Returns a problem for each tensor that cannot be read or has non-finite values."""
    import jax
    import jax.numpy as jnp

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    problems = []
    for name in checkpoint.tensors:
        try:
            if not bool(jnp.isfinite(checkpoint.read(name, device)).all()):
                problems.append(f"{name} has values that are not finite")
        except InputError as error:  # a damaged file, which may hold other tensors, too
            return [*problems, str(error)]
        except Exception as error:  # any error of the file system or Orbax is a problem to report
            problems.append(f"{name} cannot be read ({type(error).__name__})")
    return problems


def _parameters_text(checkpoint: "Checkpoint") -> str:
    tensors = checkpoint.tensors.values()
    counts = [int(np.prod(tensor.shape)) for tensor in tensors]
    sizes = [count * tensor.dtype.itemsize for count, tensor in zip(counts, tensors, strict=True)]
    dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
    gib = sum(sizes) / 2**30
    return f"{sum(counts):,} in {len(tensors)} tensors, {dtypes}, {gib:.2f} GiB"


def _print_config(checkpoint: "Checkpoint", config: "TransformerConfig") -> None:
    from gemma_encoder.weights.backbone import size_name

    terminal.print_result(
        f"size        {size_name(config) or 'custom'}: {config.num_layers} layers, "
        f"width {config.embed_dim}, hidden {config.hidden_dim}, {config.num_heads} query and "
        f"{config.num_kv_heads} key-value heads of {config.head_dim}, "
        f"vocabulary {config.vocab_size:,}"
    )
    attention = f"window {config.sliding_window}"
    if "local" in config.layer_kinds:
        left, right = config.reach("local", "bidirectional")
        attention += f"; bidirectional, local layers reach {left} to the left, {right} to the right"
    terminal.print_result(f"attention   {attention}")
    terminal.print_result(f"tokenizer   {_tokenizer_text(checkpoint, config)}")


def _print_calibrations(checkpoint: "Checkpoint") -> None:
    """Prints the calibration of each task of a fine-tuned checkpoint."""
    from gemma_encoder.weights.native import NativeCheckpoint

    if not isinstance(checkpoint, NativeCheckpoint):
        return
    for task in checkpoint.spec.tasks:
        if task.kind.conformal_columns:
            calibration = task.calibration.describe(task.kind) or "none"
            terminal.print_result(f"calibration {task.name}: {calibration}")


def _tokenizer_text(checkpoint: "Checkpoint", config: "TransformerConfig") -> str:
    from gemma_encoder.weights.backbone import family
    from gemma_encoder.weights.native import NativeCheckpoint

    if isinstance(checkpoint, NativeCheckpoint):
        return f"{checkpoint.spec.tokenizer.name}, stored in the checkpoint"
    path = checkpoint.folder / "tokenizer.model"
    if path.exists():
        return str(path)
    return f"none in the folder; {family(config)!r} is the published one of this family"


def _print_tensors(checkpoint: "Checkpoint") -> None:
    """Prints name, shape and dtype of tensors; those of all layers share a row."""
    rows: collections.Counter = collections.Counter()
    for name, tensor in checkpoint.tensors.items():
        pattern = re.sub(r"(layer_|layers\.)\d+", r"\1*", name)
        rows[pattern, tensor.shape, str(tensor.dtype)] += 1
    width = max((len(name) for name, _, _ in rows), default=0)
    for (name, shape, dtype), count in rows.items():
        times = f"  x {count}" if count > 1 else ""
        terminal.print_result(f"  {name:<{width}}  {shape!s:<20} {dtype}{times}")


def _skipped_text(checkpoint: "Checkpoint") -> str:
    modules = collections.Counter(
        re.split(r"[./]", name.removeprefix("model."))[0] for name in checkpoint.skipped
    )
    return ", ".join(f"{module} ({count} tensors)" for module, count in sorted(modules.items()))


def size_table() -> str:
    """Returns the published sizes as a Markdown table."""
    from gemma_encoder.model.sizes import GEMMA_CONFIGS, SMALL

    columns = (
        "size",
        "parameters",
        "of them embedding",
        "layers",
        "width",
        "hidden",
        "query / kv heads",
        "head dim",
        "local window",
        "vocabulary",
    )
    lines = [_table_row(columns), "| --- " * len(columns) + "|"]
    for name, config in GEMMA_CONFIGS.items():
        if name.startswith("gemma") and name not in SMALL:
            cells = (
                f"`{name}`",
                f"{config.num_parameters:,}",
                f"{config.vocab_size * config.embed_dim:,}",
                config.num_layers,
                config.embed_dim,
                config.hidden_dim,
                f"{config.num_heads} / {config.num_kv_heads}",
                config.head_dim,
                config.sliding_window,
                f"{config.vocab_size:,}",
            )
            lines.append(_table_row(cells))
    return "\n".join(lines)


def _table_row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
