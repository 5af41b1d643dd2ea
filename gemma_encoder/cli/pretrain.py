"""Pretrains a small causal decoder on unlabeled text, for fine-tuning as an encoder.

    gemma-encoder pretrain --workdir=runs/decoder --output=decoder \\
        --config.text.train="('texts.txt',)"
    gemma-encoder train --config=glue:sst2,size=gemma3_mini --config.model.pretrained=decoder \\
        --workdir=runs/sst2

The first command trains, or resumes, and then writes the folder `decoder`: weights in the format of
the gemma package, tokenizer.model, and README.md and record.json with its perplexity. The second
fine-tunes it. The default config is `pretrain_decoder`; exit codes are those of
`gemma-encoder train`.
"""

import pathlib
import shlex
from collections.abc import Sequence

import ml_collections

from gemma_encoder import terminal
from gemma_encoder.cli import commandline
from gemma_encoder.cli.train import add_run_flags
from gemma_encoder.inputs.errors import InputError

CONFIG = "pretrain_decoder"


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    add_run_flags(flags)
    flags.text("output", "New folder for the trained decoder.")
    has_config = any(word.startswith("--config=") for word in argv)
    config = flags.parse(argv if has_config else [f"--config={CONFIG}", *argv])
    example = "for example --workdir=runs/decoder --output=decoder"
    workdir = flags.required("workdir", example)
    output = flags.required("output", example)
    _check(config, output)
    from gemma_encoder import distributed
    from gemma_encoder.experiments import pretrain_decoder
    from gemma_encoder.training import loop

    distributed.initialize()
    command = shlex.join(["gemma-encoder", "pretrain", *argv])
    outcome = loop.train(config, workdir, command)
    if outcome.preempted:
        return distributed.EXIT_PREEMPTED
    record = pretrain_decoder.write_decoder(config, workdir, outcome, output, command)
    terminal.print_note(
        f"\n{output}: validation perplexity {record['validation_perplexity']:.2f} over "
        f"{record['validation_tokens_predicted']:,} tokens; a trigram model has "
        f"{record['trigram_perplexity']:.2f}\n"
        "next, fine-tune it as an encoder: add to the command of any experiment\n"
        f"  --config=glue:sst2,size={record['size']} --config.model.pretrained={output}"
    )
    return 0


def _check(config: ml_collections.ConfigDict, output: str) -> None:
    """Raises InputError if the config does not pretrain on raw text, or if the folder exists."""
    if config.tasks != ("text",):
        raise InputError(
            f"this program pretrains on the task 'text' only, got tasks={config.tasks}; "
            "use gemma-encoder train for other tasks"
        )
    if config.prepared:
        raise InputError(
            "this program needs raw text for its trigram baseline; leave out --config.prepared"
        )
    if pathlib.Path(output).exists():
        raise InputError(f"{output} exists; name a new folder for the decoder")
