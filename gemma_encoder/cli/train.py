"""Fine-tunes an encoder according to a config, or resumes the run in the workdir.

    gemma-encoder train --config=own:classification --config.own.train=train.csv --workdir=runs/mine
    gemma-encoder train --config=glue:sst2,smoke --workdir=runs/sst2
    gemma-encoder train --config=experiments/own.py:regression --config.own.train=… --workdir=…

Exit codes: 0 after training; 2 for invalid input, with one line that gives the reason; 75 after
preemption (SIGTERM), with a checkpoint saved: rerun the command to resume; 130 after Ctrl-C.
"""

import shlex
from collections.abc import Sequence

import ml_collections

from gemma_encoder import activity, configs, runtime, terminal
from gemma_encoder.cli import commandline


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    add_run_flags(flags)
    flags.switch(
        "help_config",
        "List the fields of a config with their types, values and help, and exit; without "
        "--config, values are the defaults.",
    )
    config = flags.parse(argv)
    if flags["help_config"]:
        terminal.print_result(config_fields(config))
        return 0
    config, workdir = checked(flags, config)
    command = shlex.join(["gemma-encoder", "train", *argv])
    return train_and_report(config, workdir, command)


def add_run_flags(flags: commandline.Flags) -> None:
    """Adds the flags of a run: --config and --workdir."""
    flags.config()
    flags.text(
        "workdir", "Folder of the run: checkpoints, metrics.jsonl, TensorBoard files, predictions."
    )


def checked(
    flags: commandline.Flags, config: ml_collections.ConfigDict | None
) -> tuple[ml_collections.ConfigDict, str]:
    """Returns the config and the workdir; raises InputError if one of them is missing."""
    workdir = flags.required("workdir", "name a folder for the run")
    if config is None:
        flags.required(
            "config",
            "name an experiment, e.g. --config=quickstart; "
            f"built-in configs: {', '.join(configs.names())}",
        )
    return config, workdir


def config_fields(config: ml_collections.ConfigDict | None) -> str:
    """Returns one line per field: its type, its value in the config (or default), and help."""
    from gemma_encoder.training.config import TrainConfig, config_help

    return "\n".join(config_help(config and TrainConfig.from_config_dict(config)))


def train_and_report(config: ml_collections.ConfigDict, workdir: str, command: str) -> int:
    """Trains, prints a summary, and returns the exit code.

    Args:
        config: config of the run.
        workdir: workdir of the run.
        command: command that started the run; recorded in checkpoints.
    """
    runtime.require_training()
    with activity.starting("starting"):
        from gemma_encoder import distributed
        from gemma_encoder.cli.summary import summarize
        from gemma_encoder.training import loop

        distributed.initialize()
    return summarize(loop.train(config, workdir, command), config.evaluate_split)
