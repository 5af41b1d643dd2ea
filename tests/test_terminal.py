"""All output leaves through one module: nothing that strangers wrote controls the terminal."""

import ast
import contextlib
import io
import json
import logging
import pathlib
import sys
import warnings

import absl.logging
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder import activity, cli, terminal
from gemma_encoder.cli import commandline
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.untrusted import CONTROLS, json_printable, printable

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("gemma_encoder", "launch", "experiments/studies")
# Writes of streams and descriptors: the module for it, and the line of a stopped program.
WRITERS = {
    *("gemma_encoder/terminal.py", "gemma_encoder/stopping.py"),
    "launch/worker.py",  # runs alone, on a machine without the package
}
ATTACKS = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\b\b\r", "\u202eabc", "\udc9b", "\x7f"]

hostile = st.lists(st.sampled_from(ATTACKS) | st.text(max_size=5), max_size=8).map("".join)


def is_harmless(text: str) -> bool:
    return not CONTROLS.search(text.replace("\n", "").replace("\t", ""))


@given(hostile)
def test_no_text_controls_the_terminal(text):
    assert is_harmless(printable(text))
    assert CONTROLS.search(printable(text, allowed="")) is None
    assert printable(printable(text)) == printable(text)


@given(hostile)
def test_lines_of_json_stay_equal(text):
    if any("\ud800" <= character <= "\udfff" for character in text):
        return  # no such text is in a file
    line = json.dumps({text: [text]}, ensure_ascii=False)
    assert is_harmless(json_printable(line)) and json.loads(json_printable(line)) == {text: [text]}


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
@pytest.mark.parametrize(
    "write",
    [
        terminal.print_result,
        terminal.print_note,
        terminal.print_message,
        activity.print_line,
        lambda text: commandline.run_program(lambda: _refuse(text)),
        lambda text: commandline.ArgumentParser(prog="x").exit(message=text),
        lambda text: cli.main([text]),
        lambda text: cli.main(["launch", text]),
        lambda text: cli.main(["train", f"--workdir={text}", text]),
        lambda text: cli.main(["report", text, f"--{text}"]),
        # Not by a logger: pytest would send what it captures to another process, as UTF-8.
        lambda text: logging.lastResort.handle(_record(text)),
        lambda text: absl.logging.get_absl_handler().handle(_record(text)),
        lambda text: sys.stderr.write(warnings.formatwarning(text, UserWarning, "f", 1)),
        lambda text: terminal._print_traceback(ValueError, ValueError(text), None),
    ],
    ids=lambda write: "",
)
def test_every_way_out_is_printable(write, attack, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    commandline.run_program(lambda: 0)
    with contextlib.suppress(SystemExit):
        write(f"naïve 日本語 {attack} end")
    captured = capsys.readouterr()
    assert is_harmless(captured.out) and is_harmless(captured.err), ascii(captured)


@pytest.mark.parametrize(
    "write", [activity.print_line, lambda text: commandline.run_program(lambda: _refuse(text))]
)
def test_line_breaks_in_names_start_no_line(write, capsys):
    write("file 'a\nerror: another'.csv\r\nis absent")
    line = "file 'a\\nerror: another'.csv\\r\\nis absent\n"
    assert capsys.readouterr().err.removeprefix("error: ") == line


def test_the_error_of_a_file_names_it_on_one_line(capsys):
    assert commandline.run_program(lambda: pathlib.Path("/absent\n\udcff").read_text()) == 2
    expected = "error: /absent\\n\\udcff: No such file or directory\n"
    assert capsys.readouterr().err == expected


def _record(text: str) -> logging.LogRecord:
    return logging.LogRecord("x", logging.WARNING, "f.py", 1, "%s", (text,), None)


def _refuse(text: str) -> int:
    raise InputError(text)


@pytest.mark.parametrize("verbosity", [[], ["--verbosity=0"]])
def test_log_lines_of_programs_are_printable(verbosity):
    commandline.Flags("").parse(verbosity)
    record = _record("é\x1b[2J")
    record.created_by_test = True
    text = absl.logging.get_absl_handler().format(record)
    assert is_harmless(text) and text.endswith(r"é\x1b[2J")
    assert text.startswith("W" if verbosity else "é")


def test_bars_and_colors_of_our_own_stay(monkeypatch):
    import tqdm

    screen = io.StringIO()
    with tqdm.tqdm(total=2, file=screen, ascii=False) as bar:
        bar.update()
    assert "\r" in screen.getvalue() and "█" in screen.getvalue()


def writes(tree: ast.AST):
    """Yields the lines of calls that write to a standard stream."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("print", "pprint.pprint", "traceback.print_exc", "warnings.showwarning"):
                yield node.lineno
            if name.startswith(("sys.stdout.", "sys.stderr.")) and name.endswith("write"):
                yield node.lineno


def test_nothing_else_writes_to_the_terminal():
    others = [
        f"{name}:{line}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
        and (name := path.relative_to(ROOT).as_posix()) not in WRITERS
        for line in writes(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not others, "use gemma_encoder.terminal"
    assert list(writes(ast.parse("print(1)\nsys.stderr.write('x')"))) == [1, 2]


@pytest.mark.parametrize("text", ["", "a\nb", "é\x1b"])
def test_json_lines_are_utf_8_on_every_terminal(text, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    line = json.dumps({"text": text}, ensure_ascii=False)
    terminal.print_json(f"{line}\n")
    terminal.flush_results()
    written = stream.buffer.getvalue()
    assert json.loads(written) == {"text": text} and written.endswith(b"}\n")


def test_messages_without_a_stderr_are_dropped(monkeypatch, capsys):
    for stream in (None, io.StringIO()):
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, "stderr", stream)
        terminal.print_message("lost")
        assert not activity.shows_bars()
        with activity.starting("x"):
            pass
    assert not capsys.readouterr().out
