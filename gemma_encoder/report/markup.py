"""HTML of a report: escaped text, titles and tables."""

import html
from collections.abc import Sequence
from typing import Any

from gemma_encoder.report.runs import RunFiles


def escape(value: Any) -> str:
    """A value as text of a page."""
    return html.escape(str(value))


def titled(run: RunFiles, several: bool, task: str, split: str) -> str:
    """The title of a task's part of a section; it names the run where there are several."""
    return f"{run.name}: {task}, {split}" if several else f"{task}, {split}"


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]], plain: bool = False) -> str:
    """A table that scrolls in its own frame; numbers stand right unless it is plain."""

    def cell(value: Any, name: str) -> str:
        text = str(value)
        number = text[:1] in tuple("+-0123456789") and name != "query" and not plain
        kind = "text" if name == "text" else "number" if number else ""
        return (
            f'<td class="{kind}">{html.escape(text)}</td>'
            if kind
            else f"<td>{html.escape(text)}</td>"
        )

    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr>{''.join(cell(value, name) for value, name in zip(row, head, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{names}</tr>{lines}</table></div>'
