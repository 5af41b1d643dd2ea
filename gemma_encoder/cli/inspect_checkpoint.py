"""Shows what a checkpoint holds, its size, and if it loads.

    gemma-encoder inspect PATH [--read]     PATH as `load_backbone` takes it; --read reads every tensor
    gemma-encoder inspect --sizes           the table of published sizes

Exits 0 if the checkpoint loads, 1 if it holds another model or a damaged tensor, 2 if it cannot be
recognized.
"""

import argparse
import collections
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma_encoder.cli import commandline
from gemma_encoder.inputs.errors import InputError

if TYPE_CHECKING:
    from gemma_encoder.model.config import TransformerConfig
    from gemma_encoder.weights.tensors import Checkpoint


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gemma-encoder inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        nargs="?",
        help="a checkpoint's folder, a workdir, or a published name such as GEMMA2_2B_PT",
    )
    parser.add_argument(
        "--read",
        action="store_true",
        help="read every tensor, one at a time, and look for numbers that are not finite",
    )
    parser.add_argument("--sizes", action="store_true", help="print the table of published sizes")
    options = parser.parse_args(argv)
    if options.sizes:
        print(size_table())
        return 0
    if options.path is None:
        parser.error("name a checkpoint, or ask for --sizes")
    from gemma_encoder.weights.backbone import open_checkpoint

    checkpoint = open_checkpoint(options.path)
    problems = list(describe_checkpoint(checkpoint))
    if options.read and not problems:
        problems = list(unreadable(checkpoint))
    read = ", every tensor was read" if options.read else ""
    print(f"loads       {'no' if problems else f'yes{read}'}")
    for problem in problems:
        print(f"            {problem}")
    return 1 if problems else 0


def describe_checkpoint(checkpoint: "Checkpoint") -> list[str]:
    """Prints what a checkpoint holds and returns what stands in the way of loading it."""
    from gemma_encoder.weights.backbone import size_name

    print(checkpoint.description)
    bytes_ = sum(
        int(np.prod(tensor.shape)) * tensor.dtype.itemsize for tensor in checkpoint.tensors.values()
    )
    count = sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors.values())
    dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in checkpoint.tensors.values()}))
    print(
        f"parameters  {count:,} in {len(checkpoint.tensors)} tensors, {dtypes}, {bytes_ / 2**30:.2f} GiB"
    )
    problems: list[str] = []
    try:
        config = checkpoint.config()
        print(f"size        {size_name(config) or 'of its own'}: {_sentence(config)}")
        reach = config.reach("local", "bidirectional") if "local" in config.layer_kinds else None
        print(
            f"attention   window {config.sliding_window}"
            + (
                f"; bidirectional, local layers reach {reach[0]} to the left, {reach[1]} to the right"
                if reach
                else ""
            )
        )
        print(f"tokenizer   {_tokenizer(checkpoint, config)}")
        checkpoint.check(config)
    except InputError as error:
        problems = str(error).split("; ")
    rows = _grouped(checkpoint)
    width = max((len(name) for name, *_ in rows), default=0)
    for name, shape, dtype, times in rows:
        print(f"  {name:<{width}}  {shape!s:<20} {dtype}{f'  x {times}' if times > 1 else ''}")
    if checkpoint.skipped:
        kinds = collections.Counter(
            re.split(r"[./]", name.removeprefix("model."))[0] for name in checkpoint.skipped
        )
        print(
            f"not read    {', '.join(f'{kind} ({times} tensors)' for kind, times in sorted(kinds.items()))}"
        )
    return problems


def unreadable(checkpoint: "Checkpoint") -> list[str]:
    """Tensors that cannot be read, or hold numbers that are not finite."""
    import jax
    import jax.numpy as jnp

    device, problems = jax.sharding.SingleDeviceSharding(jax.devices()[0]), []
    for name in checkpoint.tensors:
        try:
            if not bool(jnp.isfinite(checkpoint.read(name, device)).all()):
                problems.append(f"{name} holds numbers that are not finite")
        except (
            Exception
        ) as error:  # whatever the file system or Orbax raises is what stands in the way
            problems.append(f"{name} cannot be read ({type(error).__name__})")
    return problems


def _sentence(config: "TransformerConfig") -> str:
    return (
        f"{config.num_layers} layers, width {config.embed_dim}, hidden {config.hidden_dim}, {config.num_heads} query and {config.num_kv_heads} key-value heads "
        f"of {config.head_dim}, vocabulary {config.vocab_size:,}"
    )


def _tokenizer(checkpoint: "Checkpoint", config: "TransformerConfig") -> str:
    from gemma_encoder.weights.backbone import family
    from gemma_encoder.weights.native import NativeCheckpoint

    if isinstance(checkpoint, NativeCheckpoint):
        return f"{checkpoint.spec.tokenizer.name}, stored in the checkpoint"
    beside = checkpoint.folder / "tokenizer.model"
    return (
        f"{beside}"
        if beside.exists()
        else f"none in the folder; {family(config)!r} is the published one of this family"
    )


def _grouped(checkpoint: "Checkpoint") -> list[tuple[str, tuple[int, ...], str, int]]:
    """Tensors that differ in the number of their layer alone, as one row."""
    rows: collections.Counter = collections.Counter()
    for name, tensor in checkpoint.tensors.items():
        rows[re.sub(r"(layer_|layers\.)\d+", r"\1*", name), tensor.shape, str(tensor.dtype)] += 1
    return [(*key, times) for key, times in rows.items()]


def size_table() -> str:
    """The published sizes as a markdown table."""
    from gemma_encoder.model.sizes import GEMMA_CONFIGS, SMALL

    lines = [
        "| size | parameters | of them embedding | layers | width | hidden | query / kv heads | head dim | local window | vocabulary |",
        "| --- " * 10 + "|",
    ]
    for name, config in GEMMA_CONFIGS.items():
        if name.startswith("gemma") and name not in SMALL:
            embedding = config.vocab_size * config.embed_dim
            lines.append(
                f"| `{name}` | {config.num_parameters:,} | {embedding:,} | {config.num_layers} | {config.embed_dim} | {config.hidden_dim} "
                f"| {config.num_heads} / {config.num_kv_heads} | {config.head_dim} | {config.sliding_window} | {config.vocab_size:,} |"
            )
    return "\n".join(lines)
