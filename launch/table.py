"""Writes launch/PLANS.md: what the planner says of the sizes that people ask for.

    python -m gemma_encoder.launch.table

Each plan is made anew, in a process of its own; some take minutes.
"""

import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
GIB = 2**30

# Size, topology, and rows of 512 tokens in a step.
PLANS = (
    ("gemma3_270m", "v5e:2x2", 64),
    ("gemma3_1b", "v5e:2x4", 64),
    ("gemma2_2b", "v5e:4x4", 32),
    ("gemma2_9b", "v5e:8x8", 64),
    ("gemma2_27b", "v5p:4x4x4", 128),
)

HEADER = """\
# Plans

Written by `python -m gemma_encoder.launch.table` from the planner's own figures, {date}, jax {jax}, two cores. No TPU was attached: memory is what the
compiler says; the step's time is a lower bound (published peaks of arithmetic, memory and links, wholly overlapped), not a measurement.

Full fine-tuning with AdamW, bfloat16 compute, float32 parameters and moments, remat `full`, parameters cut up over all chips. GiB are
of one chip.

| size | topology | tokens a step | parameters, GiB | optimiser, GiB | temporaries, GiB | peak of a chip | | step, s | tokens/s, at most | compiled, s |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
FOOTER = """

The last line is

```
gemma-encoder plan {example}
```
"""


def plan_command(size: str, topology: str, rows: int) -> list[str]:
    """The planner's arguments."""
    return [
        *(
            f"--config=msmarco:size={size}",
            f"--topology={topology}",
            "--config.mesh=(1,-1,1)",
        ),
        *(
            f"--config.batch.rows={rows}",
            "--config.batch.row_length=512",
            "--config.max_length=512",
        ),
    ]


def row(figures: dict) -> str:
    """A plan as a line of the table."""
    fits = (
        f"fits, {(figures['memory'] - figures['peak']) / GIB:.1f} GiB to spare"
        if figures["fits"]
        else "does not fit"
    )
    memory = f"{figures['peak'] / GIB:.2f} of {figures['memory'] / GIB:.0f} GiB"
    cells = [
        figures["size"],
        figures["topology"],
        f"{figures['rows']} x {figures['row_length']}",
        *(f"{figures[name] / GIB:.2f}" for name in ("parameters", "optimizer", "temporaries")),
        memory,
        fits,
        f"{figures['seconds']:.3f}",
        f"{figures['tokens_per_second']:,.0f}",
        f"{figures['compile_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(plans: Sequence[tuple[str, str, int]] = PLANS) -> int:
    """Makes the plans and writes the file."""
    lines = []
    for plan in plans:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "gemma_encoder",
                    "plan",
                    *plan_command(*plan),
                    f"--json={file.name}",
                ],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
            )
            lines.append(row(json.loads(pathlib.Path(file.name).read_text())))
        print(lines[-1], flush=True)
    example = " ".join(plan_command(*plans[-1])).replace("(1,-1,1)", "'(1,-1,1)'")
    text = (
        HEADER.format(date=datetime.date.today(), jax=jax.__version__)
        + "\n".join(lines)
        + FOOTER.format(example=example)
    )
    (ROOT / "launch" / "PLANS.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
