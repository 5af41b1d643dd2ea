"""Markdown tables and images."""

import pathlib
from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a markdown table."""
    lines = [_markdown_row(head), "|" + " --- |" * len(head)]
    lines += [_markdown_row([_escape(cell) for cell in row]) for row in rows]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def markdown_image(caption: str, path: pathlib.Path) -> str:
    """Formats an image of a folder beside the markdown file."""
    return f"![{caption}]({path.parent.name}/{path.name})\n"
