"""Peak resident memory and time of `load_backbone`, on a synthetic checkpoint with the shapes of a published size.

    python -m gemma_encoder.experiments.benchmarks.load_memory [--size=gemma2_2b] [--folder=DIR] [--dtype=float32] [--output=FILE.json]

The checkpoint is written in bfloat16 in both formats (twice 5 GB for gemma2_2b), random numbers in every tensor. Each arm runs in a
process of its own: the memory beyond the destination is the peak during the call, less what the process held before it, less
the bytes of the parameters themselves. The peer is the gemma package's `gm.ckpts.load_params`, which restores the whole tree.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ARMS = {
    "gemma format, load_backbone": "gemma",
    "Hugging Face format, load_backbone": "huggingface",
    "gemma format, gm.ckpts.load_params (peer, keeps bfloat16)": "peer",
}


def write(size: str, folder: pathlib.Path) -> None:
    """Both checkpoints, tensor by tensor in the published layout."""
    import ml_dtypes
    import numpy as np
    import orbax.checkpoint as ocp
    import safetensors.numpy
    from etils import epath

    from gemma_encoder.model.config import EncoderConfig
    from gemma_encoder.model.sizes import GEMMA_CONFIGS
    from gemma_encoder.weights import export, gemma, huggingface, tensors

    config = GEMMA_CONFIGS[size]
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)

    class Shapes(tensors.Checkpoint):
        """Names and shapes of a format."""

        def __init__(self, table):
            self.table = table

        config = read = None

    Shapes.__abstractmethods__ = frozenset()

    def values(table):
        for name, shapes in Shapes(table).expected(config).items():
            yield name, np.resize(noise, shapes[0])

    tree: dict = {}
    for name, value in values(gemma.TABLE):
        *folders, last = name.split("/")
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
        node[last] = value
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(epath.Path(folder / "gemma"), tree)
    del tree
    place = folder / "huggingface"
    place.mkdir()
    (place / "config.json").write_text(
        json.dumps(export.transformer_json(EncoderConfig(config, attention="causal")))
    )
    index: dict[str, str] = {}
    part: dict = {}

    def flush() -> None:
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        safetensors.numpy.save_file(part, place / file)
        index.update(dict.fromkeys(part, file))
        part.clear()

    for name, value in values(
        huggingface.tensor_table("gemma3_text" if config.use_qk_norm else "gemma2", "model.")
    ):
        part[name] = value
        if sum(value.nbytes for value in part.values()) > 2**31:
            flush()
    flush()
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(arm: str, folder: pathlib.Path, dtype: str) -> dict:
    """One arm, in this process."""
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
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    began = time.monotonic()
    tree = (
        gm.ckpts.load_params(path)
        if arm == "peer"
        else nnx.state(ge.load_backbone(path, dtype=jnp.dtype(dtype)))
    )
    jax.block_until_ready(tree)
    seconds = time.monotonic() - began
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    return {
        "peak": status("VmHWM") - before,
        "parameters": held,
        "beyond": status("VmHWM") - before - held,
        "largest": largest,
        "seconds": seconds,
    }


def main() -> None:
    """Writes the checkpoints, runs every arm in turn, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="gemma2_2b")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        help="where the checkpoints go; by default a temporary folder, deleted at the end",
    )
    parser.add_argument("--output", type=pathlib.Path, help="the figures as JSON")
    parser.add_argument("--arm", choices=ARMS.values(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options.folder, options.dtype)))
        return
    folder = options.folder or pathlib.Path(tempfile.mkdtemp())
    rows = {}
    try:
        if not (folder / "huggingface").exists():
            write(options.size, folder)
        gib = 2**30
        columns = [
            f"{options.size}, {options.dtype}",
            "parameters",
            "peak",
            "beyond the parameters",
            "largest tensor + 1 GiB",
            "seconds",
        ]
        print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
        for title, arm in ARMS.items():
            command = [
                sys.executable,
                "-m",
                "gemma_encoder.experiments.benchmarks.load_memory",
                f"--arm={arm}",
                f"--folder={folder}",
                f"--dtype={options.dtype}",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"| {title} | failed: {done.stderr.strip().splitlines()[-1]} |")
                continue
            rows[title] = row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {title} | {row['parameters'] / gib:.2f} GiB | {row['peak'] / gib:.2f} GiB | {row['beyond'] / gib:.2f} GiB "
                f"| {row['largest'] / gib + 1:.2f} GiB | {row['seconds']:.0f} |"
            )
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
