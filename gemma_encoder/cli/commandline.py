"""Command-line flags of the subcommands, configs, exit codes, one-line errors and logging."""

import argparse
import inspect
import pathlib
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from gemma_encoder import activity, configs, runtime, stopping, terminal
from gemma_encoder.inputs.errors import InputError, in_one_line, one_line, reason
from gemma_encoder.whole_files import write_whole

EXIT_BAD_INPUT = 2
EXIT_BROKEN_PIPE = 141  # as shells report SIGPIPE
HELP = {"--help", "-help", "-h", "-?"}


def run_program(program: Callable[[], int]) -> int:
    """Runs a program and returns its exit code.

    InputError, Ctrl-C and errors of the system, such as a full disk, are reported as one line on
    stderr. In a process that `stopping` watches, it writes the line about Ctrl-C itself, whatever
    this function returns.
    """
    terminal.guard_logs()
    try:
        with activity.reporting():
            return _flushed(program)
    except InputError as error:
        terminal.print_one_line(f"error: {error}")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        terminal.print_message(stopping.LINES[signal.SIGINT])
        return stopping.EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of stdout, such as `head`, has exited
        terminal.discard_results()
        return EXIT_BROKEN_PIPE
    except OSError as error:  # such as a full disk
        logging.debug("the error was raised here:", exc_info=True)
        where = f"{error.filename}: " if error.filename else ""
        terminal.print_one_line(f"error: {where}{reason(error)}")
        return EXIT_BAD_INPUT


def write_output(path: pathlib.PurePath, content: str | bytes, flag: str = "--output") -> None:
    """Writes the file that a flag names, as a whole; raises InputError if it cannot be written."""
    with in_one_line(f"{flag}={path} cannot be written", errors=OSError):
        write_whole(path, content)


class ArgumentParser(argparse.ArgumentParser):
    """Parser of arguments whose output leaves as that of `terminal`; its help is its docstring."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        write = terminal.print_result if file is sys.stdout else terminal.print_message
        if message:
            write(message.rstrip("\n"))


def _flushed(program: Callable[[], int]) -> int:
    """Runs a program and writes what is left of its output, also if it exits, as after `--help`."""
    try:
        code = program()
    except SystemExit:
        terminal.flush_results()
        raise
    terminal.flush_results()
    return code


class Flags:
    """Flags of one program; `flags["name"]` is a flag's value after `parse`.

    They are separate from absl's global flags: programs share flag names, and a process may run
    several programs.

    Args:
        description: printed by `--help` before the options; usually the module's docstring.
    """

    def __init__(self, description: str):
        self._description = description
        self._values = flags.FlagValues()
        self._argv: list[str] = []  # ml_collections reads --config.FIELD=VALUE from this list
        self._config: flags.FlagHolder | None = None

    def __getitem__(self, name: str) -> Any:
        return self._values[name].value

    def config(self, meaning: str = "") -> None:
        """Adds `--config` and `--config.FIELD`."""
        text = "NAME[:ARG] of a built-in config, or FILE.py[:ARG] that defines get_config()"
        self._config = config_flags.DEFINE_config_file(
            "config",
            None,
            f"{meaning or text}; --config.FIELD=VALUE overrides a field.",
            flag_values=self._values,
            sys_argv=self._argv,
        )

    def text(self, name: str, meaning: str, default: str | None = None) -> None:
        """Adds a string flag."""
        flags.DEFINE_string(name, default, meaning, flag_values=self._values)

    def words(self, name: str, meaning: str, default: Sequence[str] | None = None) -> None:
        """Adds a flag for a comma-separated list."""
        flags.DEFINE_list(name, default, meaning, flag_values=self._values)

    def modules(self) -> None:
        """Adds `--modules`, which `parse` imports: the user's modules a checkpoint depends on."""
        self.words("modules", "Your own Python modules to import, as config.modules in training.")

    def repeated(self, name: str, meaning: str) -> None:
        """Adds a string flag that may be given several times."""
        flags.DEFINE_multi_string(name, [], meaning, flag_values=self._values)

    def choice(self, name: str, meaning: str, choices: Sequence[str], default: str | None) -> None:
        """Adds a flag that takes one of several names."""
        flags.DEFINE_enum(name, default, choices, meaning, flag_values=self._values)

    def whole(self, name: str, meaning: str, default: int | None, least: int | None = None) -> None:
        """Adds an integer flag with a lower bound."""
        flags.DEFINE_integer(name, default, meaning, lower_bound=least, flag_values=self._values)

    def real(
        self, name: str, meaning: str, default: float | None = None, least: float | None = None
    ) -> None:
        """Adds a float flag with a lower bound."""
        flags.DEFINE_float(name, default, meaning, lower_bound=least, flag_values=self._values)

    def switch(self, name: str, meaning: str, default: bool = False) -> None:
        """Adds a Boolean flag."""
        flags.DEFINE_boolean(name, default, meaning, flag_values=self._values)

    def required(self, name: str, example: str) -> str:
        """Returns the value of a string flag; raises InputError, with an example, if not set."""
        if self[name] is None:
            raise InputError(f"--{name} is missing: {example}")
        return self[name]

    def parse(self, argv: Sequence[str]) -> ml_collections.ConfigDict | None:
        """Parses the flags and returns the config, or None without `--config`.

        By default warnings and errors are logged; `--verbosity=0` logs more.

        Args:
            argv: the arguments, without the program's name.

        Raises:
            InputError: a flag is unknown, its value is invalid, or the config is invalid or cannot
                be read.
            SystemExit: after `--help`.
        """
        if HELP & set(argv):
            terminal.print_result(self.usage())
            raise SystemExit(0)
        words = list(argv)
        if self._config is not None:
            words = checked_fields(_with_config_paths(words))
        self._argv[:] = ["gemma-encoder", *words]
        verbosity = self._add_logging_flags()
        config, positional = self._parse_values()
        if "modules" in self._values and self["modules"]:
            from gemma_encoder.training.config import import_modules

            import_modules(self["modules"])
        if positional:
            raise InputError(f"unexpected argument {positional[0]!r}; every option starts with --")
        logging.use_absl_handler()
        if not verbosity.present:
            logging.set_verbosity(logging.WARNING)
        formatter = logging.PythonFormatter() if verbosity.present else None
        logging.get_absl_handler().setFormatter(terminal.PrintableFormatter(formatter))
        return config

    def _parse_values(self) -> tuple[ml_collections.ConfigDict | None, list[str]]:
        """Returns the config and the positional arguments."""
        try:
            _, *positional = self._values(self._argv)
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # absl's logging reads the global flags
            config = self._config.value if self._config is not None else None
            if config is not None:
                from gemma_encoder.training.config import TrainConfig

                TrainConfig.from_config_dict(config)  # fails here, before JAX is imported
        except InputError:
            raise
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise InputError(one_line(error)) from error
        return config, positional

    def _add_logging_flags(self) -> flags.Flag:
        """Adds absl's logging flags and returns `--verbosity`."""
        for flag in flags.FLAGS.get_flags_for_module("absl.logging"):
            if flag.name not in self._values:
                flag.unparse()
                self._values[flag.name] = flag
        return self._values["verbosity"]

    def usage(self) -> str:
        """Returns the text of `--help`: the description and the program's own flags."""
        lines = [inspect.cleandoc(self._description), "", "options:"]
        width = max(40, min(shutil.get_terminal_size().columns, 110))
        declared = {
            flag.name: flag
            for module in self._values.flags_by_module_dict().values()
            for flag in module
        }
        for flag in declared.values():
            lines += _option_lines(flag, width)
        return "\n".join(lines)


def _option_lines(flag: flags.Flag, width: int) -> list[str]:
    """Returns the lines of `--help` about one flag."""
    choices = getattr(flag.parser, "enum_values", ())
    if flag.boolean:
        value = ""
    else:
        value = f"={'|'.join(choices) or '…'}"
    # absl puts the choices before the text.
    text = flag.help.split(">: ", 1)[1] if choices else flag.help
    default = f" (default: {flag.default})" if flag.default not in (None, False, "", []) else ""
    indent = " " * 6
    wrapped = textwrap.wrap(
        f"{text}{default}", width, initial_indent=indent, subsequent_indent=indent
    )
    return [f"  --{flag.name}{value}", *wrapped]


def _resolved_config(config: str) -> str:
    """Resolves a config to FILE[:ARG], after loading it once so that its errors are InputErrors."""
    configs.load_config(config)
    return configs.resolve(config)


def checked_fields(words: Sequence[str]) -> list[str]:
    """Replaces former field names in `--config.FIELD` arguments by their current names.

    Raises:
        InputError: a field is unknown; the message names the nearest.
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


def _with_config_paths(argv: Sequence[str]) -> list[str]:
    """Replaces the config's name by the path of its file.

    With a config, the packages for training must be installed, since configs import them.
    """
    words = list(argv)
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in ("--config", "-config"):
            continue
        runtime.require_training()
        if equals:
            words[index] = f"--config={_resolved_config(value)}"
        elif index + 1 < len(words):
            words[index + 1] = _resolved_config(words[index + 1])
    return words
