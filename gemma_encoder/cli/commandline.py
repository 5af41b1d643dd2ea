"""Flags of the programs: a config by name or path, one-line refusals, exit codes, quiet logs."""

import inspect
import logging as standard_logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from gemma_encoder import configs, runtime
from gemma_encoder.inputs.errors import InputError, one_line

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as shells report SIGINT
EXIT_BROKEN_PIPE = 141  # and SIGPIPE
HELP = {"--help", "-help", "-h", "-?"}


def run_program(program: Callable[[], int]) -> int:
    """Runs a program and returns its exit code; bad input and an interrupt are one line each."""
    try:
        return program()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; rerun the command to resume from what was saved", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


class Flags:
    """The flags of one program.

    They are the program's own, not the process's: programs share names, and may be called one after
    another in a process. `flags["name"]` is a flag's value once `parse` has run.

    Args:
        description: printed by `--help` before the options; usually the module's docstring.
    """

    def __init__(self, description: str):
        self._description = description
        self._values = flags.FlagValues()
        self._argv: list[str] = []  # ml_collections looks here for --config.FIELD=VALUE
        self._config: flags.FlagHolder | None = None

    def __getitem__(self, name: str) -> Any:
        return self._values[name].value

    def config(self, meaning: str = "") -> None:
        """Adds `--config` and `--config.FIELD`."""
        text = (
            "NAME[:ARG] of a config that comes with the package, or FILE.py[:ARG] with get_config()"
        )
        self._config = config_flags.DEFINE_config_file(
            "config",
            None,
            f"{meaning or text}; --config.FIELD=VALUE changes a field.",
            flag_values=self._values,
            sys_argv=self._argv,
        )

    def text(self, name: str, meaning: str, default: str | None = None) -> None:
        """Adds a flag that holds text."""
        flags.DEFINE_string(name, default, meaning, flag_values=self._values)

    def words(self, name: str, meaning: str, default: Sequence[str] | None = None) -> None:
        """Adds a flag that holds a list, with commas."""
        flags.DEFINE_list(name, default, meaning, flag_values=self._values)

    def modules(self) -> None:
        """Adds `--modules`, which `parse` imports: those that a checkpoint was trained with."""
        self.words("modules", "modules of your own to import first, as config.modules in training.")

    def repeated(self, name: str, meaning: str) -> None:
        """Adds a flag that may be given several times, each with text."""
        flags.DEFINE_multi_string(name, [], meaning, flag_values=self._values)

    def choice(self, name: str, meaning: str, choices: Sequence[str], default: str) -> None:
        """Adds a flag that holds one of some names."""
        flags.DEFINE_enum(name, default, choices, meaning, flag_values=self._values)

    def whole(self, name: str, meaning: str, default: int | None, least: int | None = None) -> None:
        """Adds a flag that holds a whole number of at least `least`."""
        flags.DEFINE_integer(name, default, meaning, lower_bound=least, flag_values=self._values)

    def real(self, name: str, meaning: str, default: float, least: float | None = None) -> None:
        """Adds a flag that holds a number of at least `least`."""
        flags.DEFINE_float(name, default, meaning, lower_bound=least, flag_values=self._values)

    def switch(self, name: str, meaning: str, default: bool = False) -> None:
        """Adds a flag that is on or off."""
        flags.DEFINE_boolean(name, default, meaning, flag_values=self._values)

    def required(self, name: str, example: str) -> str:
        """Returns a flag's text; raises InputError, with an example, where it is not given."""
        if self[name] is None:
            raise InputError(f"--{name} is missing: {example}")
        return self[name]

    def parse(self, argv: Sequence[str]) -> ml_collections.ConfigDict | None:
        """Reads the flags and returns the config, None where none is named.

        Warnings are logged; `--verbosity=0` logs more.

        Args:
            argv: the arguments, without the program's name.

        Raises:
            InputError: an unknown flag, a value that its flag cannot hold, a config that cannot be
                read or is no config.
            SystemExit: `--help` was asked for, and printed.
        """
        if HELP & set(argv):
            print(self.usage())
            raise SystemExit(0)
        words = list(argv)
        if self._config is not None:
            words = checked_fields(_with_files(words))
        self._argv[:] = ["gemma-encoder", *words]
        loud = self._share_logging()
        try:
            rest = self._values(self._argv)
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # absl's logging looks there
            config = self._config.value if self._config is not None else None
            if config is not None:
                from gemma_encoder.training.config import TrainConfig

                TrainConfig.from_config_dict(config)  # refused here, before JAX is imported
        except InputError:
            raise
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise InputError(one_line(error)) from error
        if "modules" in self._values and self["modules"]:
            from gemma_encoder.training.config import import_modules

            import_modules(self["modules"])
        if len(rest) > 1:
            raise InputError(f"unexpected argument {rest[1]!r}; every option starts with --")
        logging.use_absl_handler()
        if not loud.present:
            logging.set_verbosity(logging.WARNING)
            logging.get_absl_handler().setFormatter(standard_logging.Formatter("%(message)s"))
        return config

    def _share_logging(self) -> flags.Flag:
        """Lets absl's own logging flags be given too, and returns `--verbosity`."""
        for flag in flags.FLAGS.get_flags_for_module("absl.logging"):
            if flag.name not in self._values:
                flag.unparse()
                self._values[flag.name] = flag
        return self._values["verbosity"]

    def usage(self) -> str:
        """Returns what `--help` prints: the description and the program's own flags."""
        lines = [inspect.cleandoc(self._description), "", "options:"]
        width = min(shutil.get_terminal_size().columns, 110)
        declared = {
            flag.name: flag
            for module in self._values.flags_by_module_dict().values()
            for flag in module
        }
        for flag in declared.values():
            lines += _option(flag, width)
        return "\n".join(lines)


def _option(flag: flags.Flag, width: int) -> list[str]:
    """The lines of `--help` about one flag."""
    choices = getattr(flag.parser, "enum_values", ())
    value = "" if flag.boolean else f"={'|'.join(choices)}" if choices else "=…"
    # absl puts the choices before the text.
    text = flag.help.split(">: ", 1)[1] if choices else flag.help
    default = f" (default: {flag.default})" if flag.default not in (None, False, "", []) else ""
    indent = " " * 6
    wrapped = textwrap.wrap(
        f"{text}{default}", width, initial_indent=indent, subsequent_indent=indent
    )
    return [f"  --{flag.name}{value}", *wrapped]


def _readable(config: str) -> str:
    """FILE[:ARG] of a config, whose file has been read once, so that an error in it is one line."""
    configs.load_config(config)
    return configs.resolve(config)


def checked_fields(words: Sequence[str]) -> list[str]:
    """Returns command-line words in which --config.FIELD has the field's current name.

    Raises:
        InputError: no field has the name; the message names the nearest.
    """
    from gemma_encoder.inputs.options import check_path, current_path
    from gemma_encoder.training.config import TrainConfig, warn_of_former_name

    checked = []
    for word in words:
        flag, equals, value = word.partition("=")
        path = flag.lstrip("-").removeprefix("config.")
        if word.startswith("-") and flag.lstrip("-") != path:
            current = current_path(TrainConfig, path)
            check_path(TrainConfig, current)
            if current != path:
                warn_of_former_name(path, current)
                word = f"--config.{current}{equals}{value}"
        checked.append(word)
    return checked


def _with_files(argv: Sequence[str]) -> list[str]:
    """The arguments with the config's file in place of its name.

    Where a config is named, the packages that training needs must be there: configs import them.
    """
    words = list(argv)
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in ("--config", "-config"):
            continue
        runtime.require_training()
        if equals:
            words[index] = f"--config={_readable(value)}"
        elif index + 1 < len(words):
            words[index + 1] = _readable(words[index + 1])
    return words
