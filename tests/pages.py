"""The Markdown pages of the project, and what stands in their fences."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
GUIDES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "launch/README.md")
PAGES = (*GUIDES, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
# Their links are tested; their commands belong to the programs that write or measure them.
REPORTS = (
    "launch/PLANS.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "experiments").rglob("*.md")),
)
FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The content of a page's fences in one language; "" for those with commands."""
    return [body for _, name, body in FENCE.findall(text(page)) if name == language]


def commands(page: str) -> list[str]:
    """The commands of a page, continued lines joined, comments dropped."""
    joined = "".join(re.sub(r"\\\n\s*", "", body) for body in blocks(page, ""))
    lines = (re.sub(r"(^|\s+)#.*$", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def prose(page: str) -> str:
    """A page without its fences."""
    return FENCE.sub("", text(page))
