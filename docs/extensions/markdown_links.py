"""Links between Markdown files that hold on GitHub and in the built pages.

Pages include files from elsewhere in the tree with

    ```{include} ../CONTRIBUTING.md
    ```

Here such a file replaces its fence before the page is parsed, without its title. Relative links
then lead to the page that includes a file, or else to the file in the source tree.
"""

import html
import os
import pathlib
import re

DOCS = pathlib.Path(__file__).parents[1].resolve()
INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)
LINK = re.compile(r"(?<![!\\])\[((?:`[^`]*`|[^\]`])*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def setup(app):
    """Registers the event."""
    app.connect("source-read", read)
    return {"parallel_read_safe": True}


def included() -> dict[pathlib.Path, str]:
    """The page that each file is included in."""
    return {
        (DOCS / name).resolve(): page.name
        for page in sorted(DOCS.glob("*.md"))
        for name in INCLUDE.findall(page.read_text(encoding="utf-8"))
    }


def read(app, docname: str, source: list[str]) -> None:
    """Puts included files into a page, and rewrites links that lead out of docs/."""
    if not (DOCS / f"{docname}.md").exists():
        return
    text = links(source[0], DOCS)
    source[0] = INCLUDE.sub(lambda match: _content(DOCS / match[1]), text)


def _content(file: pathlib.Path) -> str:
    body = re.sub(r"\A# .*\n", "", file.read_text(encoding="utf-8"))
    return links(body, file.parent)


def links(text: str, folder: pathlib.Path) -> str:
    """A text whose relative links, which start from `folder`, hold in the built pages."""
    pages = included()

    def link(match: re.Match) -> str:
        label, name = match.group(1, 2)
        anchor = match[3] or ""
        target = (folder / name).resolve()
        if target in pages:
            return f"[{label}]({pages[target]}{anchor})"
        if target.parent == DOCS and target.suffix == ".md":
            return f"[{label}]({target.name}{anchor})"
        shown = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(label, quote=False))
        path = os.path.relpath(target, DOCS / "_build" / "html")
        return f'<a href="{path}{anchor}">{shown}</a>'

    fences = re.split(r"(^ *```.*?^ *```$)", text, flags=re.DOTALL | re.MULTILINE)
    fences[::2] = [LINK.sub(link, part) for part in fences[::2]]
    return "".join(fences)
