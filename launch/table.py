"""Writes launch/PLANS.md: a table of plans for the common model sizes.

    python -m gemma_encoder.launch.table

Each plan is computed in a separate process; some take minutes.
"""

import datetime
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax

from gemma_encoder import terminal
from gemma_encoder.inputs.json_text import read_object
from gemma_encoder.launch.figures import GIB
from gemma_encoder.whole_files import write_whole

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# Model size, topology, and rows of 512 tokens per step.
PLANS = (
    ("gemma3_270m", "v5e:2x2", 64),
    ("gemma3_1b", "v5e:2x4", 64),
    ("gemma2_2b", "v5e:4x4", 32),
    ("gemma2_9b", "v5e:8x8", 64),
    ("gemma2_27b", "v5p:4x4x4", 128),
)

PLANS_HEADER = """\
# Plans

Written by `python -m gemma_encoder.launch.table` from the planner's figures on {date}, with
jax {jax}, on two cores. No TPU was attached: memory is the compiler's estimate, and the step time
is a lower bound (published peaks of compute, memory and links, fully overlapped), not a
measurement.

Full fine-tuning with AdamW, bfloat16 compute, float32 parameters and moments, remat `full`, and
parameters sharded over all chips. GiB are per chip.

| {columns} |
| {rule} |
"""
PLANS_COLUMNS = (
    "size",
    "topology",
    "tokens per step",
    "parameters, GiB",
    "optimizer, GiB",
    "temporaries, GiB",
    "peak per chip",
    "",
    "step, s",
    "tokens/s, at most",
    "compiled, s",
)
PLANS_FOOTER = """

The last row is

```
gemma-encoder plan {example}
```
"""


def plan_command(size: str, topology: str, rows: int) -> list[str]:
    """Returns the planner's arguments for a table row."""
    return [
        f"--config=msmarco:size={size}",
        f"--topology={topology}",
        "--config.mesh=(1,-1,1)",
        f"--config.batch.rows={rows}",
        "--config.batch.row_length=512",
        "--config.max_length=512",
    ]


def row(figures: dict) -> str:
    """Formats the figures of a plan as a Markdown table row."""
    if figures["fits"]:
        spare = (figures["memory"] - figures["peak"]) / GIB
        verdict = f"fits, {spare:.1f} GiB to spare"
    else:
        verdict = "does not fit"
    cells = [
        figures["size"],
        figures["topology"],
        f"{figures['rows']} x {figures['row_length']}",
        *(f"{figures[name] / GIB:.2f}" for name in ("parameters", "optimizer", "temporaries")),
        f"{figures['peak'] / GIB:.2f} of {figures['memory'] / GIB:.0f} GiB",
        verdict,
        f"{figures['seconds']:.3f}",
        f"{figures['tokens_per_second']:,.0f}",
        f"{figures['compile_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(plans: Sequence[tuple[str, str, int]] = PLANS) -> int:
    """Computes the plans and writes the file."""
    rows = []
    for size, topology, batch_rows in plans:
        rows.append(row(_run_planner(plan_command(size, topology, batch_rows))))
        terminal.print_result(rows[-1])
    header = PLANS_HEADER.format(
        date=datetime.date.today(),
        jax=jax.__version__,
        columns=" | ".join(PLANS_COLUMNS),
        rule=" | ".join("---" for _ in PLANS_COLUMNS),
    )
    example = " ".join(plan_command(*plans[-1])).replace("(1,-1,1)", "'(1,-1,1)'")
    text = header + "\n".join(rows) + PLANS_FOOTER.format(example=example)
    write_whole(_ROOT / "launch" / "PLANS.md", text)
    return 0


def _run_planner(arguments: Sequence[str]) -> dict:
    """Returns the figures of a plan, computed in a separate process."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        program = [sys.executable, "-m", "gemma_encoder", "plan"]
        subprocess.run(
            [*program, *arguments, f"--json={file.name}"], cwd=_ROOT, stdout=subprocess.DEVNULL
        )
        return read_object(pathlib.Path(file.name))


if __name__ == "__main__":
    sys.exit(main())
