"""What the programs that take a config have in common: reading flags, refusing them in one line, keeping logs quiet."""

import inspect
import shutil
import sys
import textwrap
from collections.abc import Sequence

import ml_collections
from absl import flags, logging

from gemma_encoder.inputs.errors import InputError, one_line
from gemma_encoder.training.config import TrainConfig


def parse(
    argv: Sequence[str], config: flags.FlagHolder, values: flags.FlagValues = flags.FLAGS
) -> ml_collections.ConfigDict | None:
    """Reads a program's flags and returns its config, None where none is named; warnings are logged, notes only if asked for.

    Args:
        argv: the program's name and its arguments.
        config: the flag that `config_flags.DEFINE_config_file` made.
        values: where the program's flags stand; of its own where another program has flags of the same names.

    Raises:
        InputError: an unknown flag, a value that cannot be, a config file that cannot be read or gives no config.
    """
    if {"--help", "-help", "-h", "-?"} & set(argv[1:]):
        print(usage(values))
        raise SystemExit(0)
    try:
        rest = values(list(argv))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # absl's logging looks there
        if (
            config.value is not None and "tasks" not in config.value
        ):  # a file that could not be read shows here, not before
            raise InputError(
                "the config has no field 'tasks'; let get_config start from gemma_encoder.training.recipe.default_config()"
            )
        if config.value is not None:
            TrainConfig.from_config_dict(config.value)  # refused here, before JAX is imported
    except InputError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(one_line(error)) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; every option starts with --")
    logging.use_absl_handler()
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        # seqio warns that sources are not cached, whatever their size.
        logging.get_absl_handler().addFilter(lambda record: "seqio" not in record.pathname)
    return config.value


def usage(values: flags.FlagValues) -> str:
    """What `--help` prints: the program's docstring and its own flags, those of the libraries left out."""
    lines = [inspect.cleandoc(sys.modules["__main__"].__doc__ or ""), "", "options:"]
    width = min(shutil.get_terminal_size().columns, 110)
    seen = set()
    for module, found in values.flags_by_module_dict().items():
        for flag in found:
            if module.startswith(("absl", "tensorflow", "jax")) or flag.name in seen:
                continue
            seen.add(flag.name)
            choices = (
                f"={'|'.join(flag.parser.enum_values)}"
                if hasattr(flag.parser, "enum_values")
                else ""
                if flag.boolean
                else "=…"
            )
            default = f" (default: {flag.default})" if flag.default not in (None, False, "") else ""
            lines.append(f"  --{flag.name}{choices}")
            text = (
                flag.help.split(">: ", 1)[1]
                if choices[1:] and flag.help.startswith("<")
                else flag.help
            )  # absl puts the choices before it
            lines += textwrap.wrap(
                f"{text}{default}", width, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines)
