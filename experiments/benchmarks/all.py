"""Every comparison, one after another, by one command.

    python -m gemma_encoder.experiments.benchmarks.all --json=DIR                                        on a CPU; hours
    python -m gemma_encoder.experiments.benchmarks.all --device=cuda --dtype=bfloat16 --json=DIR         on an NVIDIA GPU
    python -m gemma_encoder.experiments.benchmarks.all --smoke                                           every arm at tiny size, so that it is known to work

TFDS_DATA_DIR (glue/sst2) and MSMARCO_DIR (top100.dev.tsv) name real data; subjects whose data is absent are left out, and said. `--only`
names subjects. What is printed also goes to DIR/NAME.txt, the figures to DIR/NAME.json. Exits 1 where a subject failed.
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


@dataclasses.dataclass(frozen=True)
class BenchmarkCommand:
    """One subject's command.

    Attributes:
        name: of the files.
        subject: the module.
        smoke, cpu, gpu: its arguments for each kind of run; None where it is left out.
        device, dtype: whether it takes these flags.
        data: the environment variable that it needs.
    """

    name: str
    subject: str
    smoke: str | None
    cpu: str | None
    gpu: str | None
    device: bool = True
    dtype: bool = True
    data: str = ""


TINY = "--size=gemma3_tiny --repeats=1"
# The GPU's lines are those of the table; 2B with float32 parameters and moments in both arms at a time takes some 90 GiB.
RUNS = (
    BenchmarkCommand("matmul_limit", "matmul_limit", "--width=64 --repeats=1", "--width=2048", "--width=8192", dtype=False),
    BenchmarkCommand("train_step_270m", "train_step", f"{TINY} --rows=2 --length=128", "--repeats=3", "--rows=64 --length=512 --compiled"),
    BenchmarkCommand("train_step_270m_2048", "train_step", None, None, "--rows=16 --length=2048 --compiled"),
    BenchmarkCommand("train_step_1b", "train_step", None, None, "--size=gemma3_1b --rows=32 --length=512 --compiled"),
    BenchmarkCommand("train_step_2b_128", "train_step", None, None, "--size=gemma2_2b --rows=64 --length=128 --compiled"),
    BenchmarkCommand("train_step_2b_512", "train_step", None, None, "--size=gemma2_2b --rows=16 --length=512 --compiled"),
    BenchmarkCommand("train_step_2b_2048", "train_step", None, None, "--size=gemma2_2b --rows=4 --length=2048 --compiled"),
    BenchmarkCommand("finetune_sst2", "finetune_sst2", f"{TINY} --rows=2 --updates=1 --texts=200", "--updates=2 --repeats=3", "--size=gemma2_2b --rows=32",
        data="TFDS_DATA_DIR"),
    BenchmarkCommand("program_sst2", "program_sst2", f"{TINY} --rows=2 --texts=48", "", "--size=gemma3_1b --rows=32 --texts=4096", data="TFDS_DATA_DIR"),
    BenchmarkCommand("rerank", "rerank", f"{TINY} --documents=8 --batch_sizes=4", "", "--size=gemma2_2b --queries=8 --batch_sizes=16,32,64,128", data="MSMARCO_DIR"),
    BenchmarkCommand("attention", "attention", f"{TINY} --lengths=64 --windows=0,16", "", "--size=gemma3_1b --lengths=512,1024,2048,4096,8192,16384 --windows=0,512,1024"),
    BenchmarkCommand("attention_soft_cap", "attention", f"{TINY} --lengths=64 --windows=0 --soft_cap=50",
        "--size=gemma2_2b --lengths=512,1024,2048 --windows=0 --soft_cap=50",
        "--size=gemma2_2b --lengths=512,1024,2048,4096,8192 --windows=0,4096 --soft_cap=50"),
    BenchmarkCommand("checkpoint", "checkpoint", f"{TINY} --steps=2", "", "--size=gemma2_2b"),
    BenchmarkCommand("cold_start", "cold_start", TINY, "", "--size=gemma3_1b", dtype=False),
    BenchmarkCommand("compile_time", "compile_time", "--depths=2,4 --widths=128 --peer_depths=2 --repeats=1", "", "--widths=128,512,1024", dtype=False),
    BenchmarkCommand("scaling_devices", "scaling", "devices --devices=1,2 --rows=1 --repeats=1", "devices", None, device=False, dtype=False),
    BenchmarkCommand("starts", "starts", "--repeats=1", "", None, device=False, dtype=False, data="MSMARCO_DIR"),
    BenchmarkCommand("many_rows", "many_rows", "--rows=20000 --texts=2000", "--rows=1000000,10000000", None, device=False, dtype=False),
    BenchmarkCommand("input_pipeline", "input_pipeline", "--texts=400 --repeats=1 --steps=8", "", "", device=False, dtype=False, data="TFDS_DATA_DIR"),
)  # fmt: skip


def commands(
    kind: str, device: str, dtype: str, folder: pathlib.Path, only: Sequence[str] = ()
) -> Iterator[tuple[BenchmarkCommand, list[str]]]:
    """Each run of a kind ("smoke", "cpu", "gpu") with its command."""
    for run in RUNS:
        arguments = getattr(run, kind)
        if arguments is None or (only and run.name not in only):
            continue
        flags = [
            *([f"--device={device}"] if run.device else []),
            *([f"--dtype={dtype}"] if run.dtype else []),
        ]
        yield (
            run,
            [
                sys.executable,
                "-m",
                f"gemma_encoder.experiments.benchmarks.{run.subject}",
                *arguments.split(),
                *flags,
                f"--json={folder / run.name}.json",
            ],
        )


def main(argv: list[str] | None = None) -> int:
    """Runs them; how it went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=pathlib.Path, help="folder for figures and tables")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--only", default="", help="names, with commas between them")
    parser.add_argument("--dry_run", action="store_true", help="only print the commands")
    args = parser.parse_args(argv)
    only = [name for name in args.only.split(",") if name]
    if unknown := set(only) - {run.name for run in RUNS}:
        parser.error(
            f"--only: {', '.join(sorted(unknown))} unknown; known are {', '.join(run.name for run in RUNS)}"
        )
    folder = args.json or pathlib.Path(tempfile.mkdtemp(prefix="benchmarks-"))
    folder.mkdir(parents=True, exist_ok=True)
    # Both frameworks hold memory of one GPU at a time: JAX must not take most of it when it starts. A CPU arm must not find a GPU.
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **({"JAX_PLATFORMS": "cpu"} if args.device == "cpu" else {}),
    }
    failed = []
    for run, command in commands(
        "smoke" if args.smoke else "gpu" if args.device == "cuda" else "cpu",
        args.device,
        args.dtype,
        folder,
        only,
    ):
        print(f"\n## {run.name}\n{' '.join(command)}", flush=True)
        if args.dry_run:
            continue
        if run.data and not os.environ.get(run.data):
            print(f"left out: {run.data} is not set")
            continue
        began = time.monotonic()
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        (folder / f"{run.name}.txt").write_text(done.stdout)
        print(
            done.stdout
            if not done.returncode
            else f"FAILED, exit code {done.returncode}; the end of {folder / run.name}.txt:\n{done.stdout[-2000:]}"
        )
        print(f"took {time.monotonic() - began:.0f} s", flush=True)
        failed += [run.name] if done.returncode else []
    print(f"\nfigures are in {folder}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
