"""Plans a run on TPUs, without a TPU: compiles the training step, prints its memory and time.

    gemma-encoder plan --config=msmarco:size=gemma2_9b --topology=v5e:8x8 [--slices=N]

Needs neither data nor weights. Exits with 0 if the step fits the memory of the chips, with 1 if it
does not, and with 2 if the plan cannot be made. `--search` tries batch sizes, remat policies and
meshes and prints the fastest plan that fits; `--json=FILE` writes the figures.
"""

import os
import pathlib
from collections.abc import Sequence

import ml_collections

from gemma_encoder import activity, runtime, terminal
from gemma_encoder.cli import commandline
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import to_json


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    flags.config()
    flags.text("topology", "Generation and shape of a slice, e.g. v5e:8x8, v5p:4x4x4, v6e:4x4.")
    flags.whole("slices", "Number of slices that train together.", default=1, least=1)
    flags.switch("search", "Try batch sizes, remat policies and meshes.")
    flags.real("search_minutes", "Minutes after which --search starts no new try.", default=20.0)
    flags.text("json", "JSON file to write the figures to.")
    runtime.ignore_tpus()  # a plan does not use the TPUs of this machine
    # Several processes may plan at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    config = flags.parse(argv)
    if config is None or flags["topology"] is None:
        raise InputError(
            "--config and --topology are needed, "
            "e.g. --config=msmarco:size=gemma2_9b --topology=v5e:8x8"
        )
    plan = _search(config, flags) if flags["search"] else _plan(config, flags)
    if flags["json"] and plan is not None:
        figures = to_json(plan.figures(), indent=1)
        commandline.write_output(pathlib.Path(flags["json"]), figures, "--json")
    return 0 if plan is not None and plan.fits else 1


def _plan(config: ml_collections.ConfigDict, flags: commandline.Flags):
    from gemma_encoder.launch.plan import make_plan

    with activity.during("compiling for the topology"):
        plan = make_plan(config, flags["topology"], flags["slices"])
    terminal.print_result("\n".join(plan.lines()))
    if not plan.fits:
        terminal.print_result(
            "\ntry --search, a mesh that shards parameters, such as --config.mesh='(1,-1,1)', "
            "--config.model.remat=full, or more micro-batches"
        )
    return plan


def _search(config: ml_collections.ConfigDict, flags: commandline.Flags):
    from gemma_encoder.launch.plan import search

    plan = search(config, flags["topology"], flags["slices"], flags["search_minutes"] * 60)
    if plan is None:
        terminal.print_result("\nno plan that was tried fits")
        return None
    terminal.print_result("\nfastest plan that fits\n\n" + "\n".join(plan.lines()))
    terminal.print_result(
        f"\n--config.mesh='{tuple(plan.mesh)}' --config.batch.rows={plan.rows} "
        f"--config.model.remat={plan.remat}"
    )
    return plan
