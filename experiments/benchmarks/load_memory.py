"""Peak memory and time of `load_backbone`, on a synthetic checkpoint of a published size.

    python -m gemma_encoder.experiments.benchmarks.load_memory
        [--size=gemma2_2b] [--folder=DIR] [--dtype=float32] [--output=FILE.json]

The checkpoint is written in bfloat16 in both formats (twice 5 GB for gemma2_2b), with random values
in every tensor. Each arm runs in a process of its own. The memory beyond the parameters is the peak
resident memory during the call, minus the memory before the call, minus the bytes of the
parameters. The peer is the gemma package's `gm.ckpts.load_params`, which restores the whole tree.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from gemma_encoder.experiments.benchmarks import harness
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.whole_files import write_whole

if TYPE_CHECKING:
    from gemma_encoder.model.config import TransformerConfig
    from gemma_encoder.weights.tensors import Table

ARMS = {
    "gemma format, load_backbone": "gemma",
    "Hugging Face format, load_backbone": "huggingface",
    "gemma format, gm.ckpts.load_params (peer, keeps bfloat16)": "peer",
}
GIB = 2**30
SHARD_BYTES = 2**31  # a file of the Hugging Face format is closed when it is larger


def write(size: str, folder: pathlib.Path) -> None:
    """Writes both checkpoints, with tensors in their published names and shapes."""
    from gemma_encoder.model.sizes import GEMMA_CONFIGS
    from gemma_encoder.weights import gemma, huggingface

    config = GEMMA_CONFIGS[size]
    _write_gemma(folder / "gemma", random_tensors(gemma.TABLE, config))
    family = "gemma3_text" if config.use_qk_norm else "gemma2"
    table = huggingface.tensor_table(family, "model.")
    _write_huggingface(folder / "huggingface", config, random_tensors(table, config))


def random_tensors(table: "Table", config: "TransformerConfig") -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and a random bfloat16 value of every tensor of a checkpoint format."""
    import ml_dtypes

    from gemma_encoder.weights import tensors

    class Format(tensors.Checkpoint):
        """A checkpoint format without a file: only `expected` is used."""

        def __init__(self, table):
            self.table = table

        def config(self, hint=None):
            raise NotImplementedError

        def read(self, name, sharding):
            raise NotImplementedError

    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)
    for name, shapes in Format(table).expected(config).items():
        yield name, np.resize(noise, shapes[0])


def _write_gemma(folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    import orbax.checkpoint as ocp
    from etils import epath

    tree: dict = {}
    for name, value in tensors:
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(epath.Path(folder), tree)


def _write_huggingface(
    folder: pathlib.Path, config: "TransformerConfig", tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    import safetensors.numpy

    from gemma_encoder.model.config import EncoderConfig
    from gemma_encoder.weights import export

    folder.mkdir()
    exported = export.transformer_json(EncoderConfig(config, attention="causal"))
    (folder / "config.json").write_text(to_json(exported))
    file_of: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        file = f"model-{len(set(file_of.values())) + 1:05d}.safetensors"
        safetensors.numpy.save_file(shard, folder / file)
        file_of.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, value in tensors:
        shard[name] = value
        if sum(value.nbytes for value in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(to_json(index))


def measure(arm: str, folder: pathlib.Path, dtype: str) -> dict:
    """Runs one arm in this process; returns bytes and seconds."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import gemma_encoder as ge
    from gemma_encoder.weights.backbone import open_checkpoint

    path = folder / ("huggingface" if arm == "huggingface" else "gemma")
    if arm == "peer":
        from gemma import gm
    largest = max(
        tensor.dtype.itemsize * int(jnp.prod(jnp.array(tensor.shape, float)))
        for tensor in open_checkpoint(path).tensors.values()
    )
    jax.block_until_ready(jnp.ones(8))
    before = harness.process_memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    began = time.monotonic()
    if arm == "peer":
        tree = gm.ckpts.load_params(path)
    else:
        tree = nnx.state(ge.load_backbone(path, dtype=jnp.dtype(dtype)))
    jax.block_until_ready(tree)
    seconds = time.monotonic() - began
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    return {
        "peak": harness.process_memory("VmHWM") - before,
        "parameters": parameters,
        "beyond": harness.process_memory("VmHWM") - before - parameters,
        "largest": largest,
        "seconds": seconds,
    }


def run_arms(folder: pathlib.Path, size: str, dtype: str) -> dict[str, dict]:
    """Runs every arm in a process of its own and prints the table row by row.

    Returns the figures of the arms that succeeded, by title.
    """
    columns = [
        f"{size}, {dtype}",
        "parameters",
        "peak",
        "beyond the parameters",
        "largest tensor + 1 GiB",
        "seconds",
    ]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    rows = {}
    for title, arm in ARMS.items():
        command = [
            sys.executable,
            "-m",
            "gemma_encoder.experiments.benchmarks.load_memory",
            f"--arm={arm}",
            f"--folder={folder}",
            f"--dtype={dtype}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {title} | failed: {done.stderr.strip().splitlines()[-1]} |")
            continue
        rows[title] = row = json.loads(done.stdout.splitlines()[-1])
        sizes = [row["parameters"], row["peak"], row["beyond"], row["largest"] + GIB]
        cells = [f"{size / GIB:.2f} GiB" for size in sizes]
        print(f"| {title} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    return rows


def main() -> None:
    """Writes the checkpoints, runs every arm in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="gemma2_2b")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        help="where the checkpoints go; by default a temporary folder, deleted at the end",
    )
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write the figures to")
    parser.add_argument("--arm", choices=ARMS.values(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(to_json(measure(options.arm, options.folder, options.dtype)))
        return
    folder = options.folder or pathlib.Path(tempfile.mkdtemp())
    try:
        if not (folder / "huggingface").exists():
            write(options.size, folder)
        rows = run_arms(folder, options.size, options.dtype)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    if options.output:
        write_whole(options.output, to_json(rows, indent=1))


if __name__ == "__main__":
    main()
