"""HTML helpers of the report: titles and tables."""

from collections.abc import Sequence
from typing import Any

from gemma_encoder.inputs.untrusted import html_text
from gemma_encoder.report.runs import RunFiles


def titled(run: RunFiles, several: bool, task: str, split: str) -> str:
    """Returns the title of a task's part of a section, with the run's name if there are several."""
    return f"{run.name}: {task}, {split}" if several else f"{task}, {split}"


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]], plain: bool = False) -> str:
    """Returns a table that scrolls in its own frame.

    Args:
        head: column names. Columns named "text" are wide.
        rows: one value per column.
        plain: whether to left-align all values; by default, numeric values are right-aligned, and
            so is the name of a column that has one.
    """
    numeric = [
        any(_is_numeric(row[index], name, plain) for row in rows) for index, name in enumerate(head)
    ]
    names = "".join(
        f'<th class="number">{html_text(name)}</th>' if right else f"<th>{html_text(name)}</th>"
        for name, right in zip(head, numeric, strict=True)
    )
    lines = []
    for row in rows:
        cells = [_cell(value, name, plain) for value, name in zip(row, head, strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{names}</tr>{"".join(lines)}</table></div>'


def _cell(value: Any, column: str, plain: bool) -> str:
    content = html_text(value)
    if column == "text":
        return f'<td class="text">{content}</td>'
    if _is_numeric(value, column, plain):
        return f'<td class="number">{content}</td>'
    return f"<td>{content}</td>"


def _is_numeric(value: Any, column: str, plain: bool) -> bool:
    """Returns True if a value is right-aligned: a figure that is no name."""
    names = ("text", "query", "class", "task", "run")
    return not plain and column not in names and str(value)[:1] in tuple("+-0123456789")
