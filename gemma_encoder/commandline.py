"""What the programs that take a config have in common: reading flags, refusing them in one line, keeping logs quiet."""

from collections.abc import Sequence

import ml_collections
from absl import flags, logging

from gemma_encoder.inputs.errors import InputError, one_line


def parse(argv: Sequence[str], config: flags.FlagHolder, values: flags.FlagValues = flags.FLAGS) -> ml_collections.ConfigDict | None:
    """Reads a program's flags and returns its config, None where none is named; warnings are logged, notes only if asked for.

    Args:
        argv: the program's name and its arguments.
        config: the flag that `config_flags.DEFINE_config_file` made.
        values: where the program's flags stand; of its own where another program has flags of the same names.

    Raises:
        InputError: an unknown flag, a value that cannot be, a config file that cannot be read or gives no config.
    """
    try:
        rest = values(list(argv))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # absl's logging looks there
        if config.value is not None and "tasks" not in config.value:  # a file that could not be read shows here, not before
            raise InputError("the config has no field 'tasks'; let get_config start from gemma_encoder.training.recipe.default_config()")
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
