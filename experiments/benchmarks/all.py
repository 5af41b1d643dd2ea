"""Runs every comparison, one after another.

On a CPU, in hours; on an NVIDIA GPU; or every arm at tiny size, to check that it works:

    python -m gemma_encoder.experiments.benchmarks.all --json=DIR
    python -m gemma_encoder.experiments.benchmarks.all --device=cuda --dtype=bfloat16 --json=DIR
    python -m gemma_encoder.experiments.benchmarks.all --smoke

TFDS_DATA_DIR (glue/sst2) and MSMARCO_DIR (top100.dev.tsv) name real data; runs whose data is absent
are skipped with a message. `--only` selects runs by name. The output of each run also goes to
DIR/NAME.txt and its figures to DIR/NAME.json. Exits with code 1 if a run failed.
"""

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from gemma_encoder.whole_files import write_whole


@dataclasses.dataclass(frozen=True)
class BenchmarkCommand:
    """The command of one run.

    Attributes:
        name: name of the run and its files.
        subject: the module.
        smoke, cpu, gpu: arguments for each kind of run; None if the kind leaves this run out.
        device, dtype: whether the module takes these flags.
        data: the environment variable that names its data; empty if it needs none.
    """

    name: str
    subject: str
    smoke: str | None = None
    cpu: str | None = None
    gpu: str | None = None
    device: bool = True
    dtype: bool = True
    data: str = ""


TINY = "--size=gemma3_tiny --repeats=1"
# On a GPU, Gemma 2 2B with float32 parameters and moments in both arms at a time takes some 90 GiB.
RUNS = (
    BenchmarkCommand(
        "matmul_limit",
        "matmul_limit",
        smoke="--width=64 --repeats=1",
        cpu="--width=2048",
        gpu="--width=8192",
        dtype=False,
    ),
    BenchmarkCommand(
        "train_step_270m",
        "train_step",
        smoke=f"{TINY} --rows=2 --length=128",
        cpu="--repeats=3",
        gpu="--rows=64 --length=512 --compiled",
    ),
    BenchmarkCommand(
        "train_step_270m_2048", "train_step", gpu="--rows=16 --length=2048 --compiled"
    ),
    BenchmarkCommand(
        "train_step_1b", "train_step", gpu="--size=gemma3_1b --rows=32 --length=512 --compiled"
    ),
    BenchmarkCommand(
        "train_step_2b_128", "train_step", gpu="--size=gemma2_2b --rows=64 --length=128 --compiled"
    ),
    BenchmarkCommand(
        "train_step_2b_512", "train_step", gpu="--size=gemma2_2b --rows=16 --length=512 --compiled"
    ),
    BenchmarkCommand(
        "train_step_2b_2048", "train_step", gpu="--size=gemma2_2b --rows=4 --length=2048 --compiled"
    ),
    BenchmarkCommand(
        "finetune_sst2",
        "finetune_sst2",
        smoke=f"{TINY} --rows=2 --updates=1 --texts=200",
        cpu="--updates=2 --repeats=3",
        gpu="--size=gemma2_2b --rows=32",
        data="TFDS_DATA_DIR",
    ),
    BenchmarkCommand(
        "program_sst2",
        "program_sst2",
        smoke=f"{TINY} --rows=2 --texts=48",
        cpu="",
        gpu="--size=gemma3_1b --rows=32 --texts=4096",
        data="TFDS_DATA_DIR",
    ),
    BenchmarkCommand(
        "rerank",
        "rerank",
        smoke=f"{TINY} --documents=8 --batch_sizes=4",
        cpu="",
        gpu="--size=gemma2_2b --queries=8 --batch_sizes=16,32,64,128",
        data="MSMARCO_DIR",
    ),
    BenchmarkCommand(
        "retrieval",
        "retrieval",
        smoke=f"{TINY} --pairs=8 --micro_batches=2",
        cpu="",
        gpu="--pairs=1024 --micro_batches=16 --max_length=128",
        data="MSMARCO_DIR",
    ),
    BenchmarkCommand(
        "encode_documents",
        "encode_documents",
        smoke=f"{TINY} --documents=8 --batch_sizes=4",
        cpu="",
        gpu="--size=gemma2_2b --documents=2000 --batch_sizes=32,128",
        data="MSMARCO_DIR",
    ),
    BenchmarkCommand(
        "vector_search",
        "vector_search",
        smoke="--documents=2000 --width=16 --queries=8 --k=10 --repeats=1",
        cpu="",
        gpu="--documents=10000000",
        device=False,
        dtype=False,
    ),
    BenchmarkCommand(
        "attention",
        "attention",
        smoke=f"{TINY} --lengths=64 --windows=0,16",
        cpu="",
        gpu="--size=gemma3_1b --lengths=512,1024,2048,4096,8192,16384 --windows=0,512,1024",
    ),
    BenchmarkCommand(
        "attention_soft_cap",
        "attention",
        smoke=f"{TINY} --lengths=64 --windows=0 --soft_cap=50",
        cpu="--size=gemma2_2b --lengths=512,1024,2048 --windows=0 --soft_cap=50",
        gpu="--size=gemma2_2b --lengths=512,1024,2048,4096,8192 --windows=0,4096 --soft_cap=50",
    ),
    BenchmarkCommand(
        "checkpoint", "checkpoint", smoke=f"{TINY} --steps=2", cpu="", gpu="--size=gemma2_2b"
    ),
    BenchmarkCommand(
        "load_checked",
        "load_checked",
        smoke="--size=bench --repeats=1",
        cpu="",
        gpu=None,
        dtype=False,
    ),
    BenchmarkCommand(
        "cold_start", "cold_start", smoke=TINY, cpu="", gpu="--size=gemma3_1b", dtype=False
    ),
    BenchmarkCommand(
        "latency", "latency", smoke=f"{TINY} --texts=5", cpu="", gpu="--size=gemma3_1b", dtype=False
    ),
    BenchmarkCommand(
        "compile_time",
        "compile_time",
        smoke="--depths=2,4 --widths=128 --peer_depths=2 --repeats=1",
        cpu="",
        gpu="--widths=128,512,1024",
        dtype=False,
    ),
    BenchmarkCommand(
        "scaling_devices",
        "scaling",
        smoke="devices --devices=1,2 --rows=1 --repeats=1",
        cpu="devices",
        device=False,
        dtype=False,
    ),
    BenchmarkCommand(
        "int8_sst2",
        "int8",
        smoke="--size=gemma3_tiny --texts=32 --repeats=1",
        cpu="",
        device=False,
        dtype=False,
        data="TFDS_DATA_DIR",
    ),
    BenchmarkCommand(
        "int8_pairs",
        "int8",
        smoke="--data=pairs --size=gemma3_tiny --texts=8 --repeats=1",
        cpu="--data=pairs --texts=100 --repeats=3",
        device=False,
        dtype=False,
        data="MSMARCO_DIR",
    ),
    BenchmarkCommand(
        "starts",
        "starts",
        smoke="--repeats=1",
        cpu="",
        device=False,
        dtype=False,
        data="MSMARCO_DIR",
    ),
    BenchmarkCommand(
        "many_rows",
        "many_rows",
        smoke="--rows=20000 --texts=2000",
        cpu="--rows=1000000,10000000",
        device=False,
        dtype=False,
    ),
    BenchmarkCommand(
        "input_pipeline",
        "input_pipeline",
        smoke="--texts=400 --repeats=1 --steps=8",
        cpu="",
        gpu="",
        device=False,
        dtype=False,
        data="TFDS_DATA_DIR",
    ),
)


def commands(
    kind: str, device: str, dtype: str, folder: pathlib.Path, only: Sequence[str] = ()
) -> Iterator[tuple[BenchmarkCommand, list[str]]]:
    """Yields each run of a kind ("smoke", "cpu", "gpu") with its command line."""
    for run in RUNS:
        arguments = getattr(run, kind)
        if arguments is None or (only and run.name not in only):
            continue
        command = [sys.executable, "-m", f"gemma_encoder.experiments.benchmarks.{run.subject}"]
        command += arguments.split()
        if run.device:
            command.append(f"--device={device}")
        if run.dtype:
            command.append(f"--dtype={dtype}")
        command.append(f"--json={folder / run.name}.json")
        yield run, command


def succeeds(
    run: BenchmarkCommand, command: Sequence[str], environment: dict[str, str], folder: pathlib.Path
) -> bool:
    """Runs one command, writes its output to a file and prints it; returns True if it exits 0."""
    began = time.monotonic()
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    file = folder / f"{run.name}.txt"
    write_whole(file, done.stdout)
    if done.returncode:
        print(f"FAILED with exit code {done.returncode}; the end of {file}:\n{done.stdout[-2000:]}")
    else:
        print(done.stdout)
    print(f"took {time.monotonic() - began:.0f} s", flush=True)
    return not done.returncode


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; `only` becomes a list of names of runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=pathlib.Path, help="folder for figures and tables")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--only", default="", help="names of runs, separated by commas")
    parser.add_argument("--dry_run", action="store_true", help="only print the commands")
    args = parser.parse_args(argv)
    args.only = [name for name in args.only.split(",") if name]
    names = [run.name for run in RUNS]
    if unknown := set(args.only) - set(names):
        parser.error(
            f"--only: unknown runs {', '.join(sorted(unknown))}; valid runs: {', '.join(names)}"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the commands; returns the exit code."""
    args = parse_arguments(argv)
    folder = args.json or pathlib.Path(tempfile.mkdtemp(prefix="benchmarks-"))
    folder.mkdir(parents=True, exist_ok=True)
    # Both frameworks use one GPU at a time: JAX must not reserve most of its memory at start.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    kind = "gpu" if args.device == "cuda" else "cpu"
    if args.device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"  # also on a machine with a GPU
    if args.smoke:
        kind = "smoke"
    failed = []
    for run, command in commands(kind, args.device, args.dtype, folder, args.only):
        print(f"\n## {run.name}\n{' '.join(command)}", flush=True)
        if args.dry_run:
            continue
        if run.data and not os.environ.get(run.data):
            print(f"left out: {run.data} is not set")
            continue
        if not succeeds(run, command, environment, folder):
            failed.append(run.name)
    print(f"\nfigures are in {folder}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
