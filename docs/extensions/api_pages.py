"""The API reference: one page for each package of gemma_encoder, with all its public modules.

The pages are written when a build starts, from the modules that exist: a module that is added or
renamed needs no change here. Programs (`cli`) are documented by their own `--help`.
"""

import pathlib
import re
import shutil

import gemma_encoder

ROOT = pathlib.Path(gemma_encoder.__file__).parent
LEFT_OUT = {"cli", "main", "__main__"}
TOP = "top_level"  # the page of the modules that are in no package


def setup(app):
    """Registers the events."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", split_attributes, priority=600)  # after it
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-skip-member", skip_member)
    return {"parallel_read_safe": True}


def modules() -> dict[str, list[str]]:
    """Dotted names of the public modules, by package."""
    pages: dict[str, list[str]] = {TOP: []}
    for path in sorted(ROOT.iterdir()):
        if path.is_symlink() or path.stem in LEFT_OUT or path.name.startswith("_"):
            continue
        if path.suffix == ".py":
            pages[TOP].append(f"gemma_encoder.{path.stem}")
        elif (path / "__init__.py").exists():
            names = [
                ".".join(("gemma_encoder", *file.relative_to(ROOT).with_suffix("").parts))
                for file in sorted(path.rglob("*.py"))
                if not file.name.startswith("_")
            ]
            pages[path.name] = names
    return pages


def write_pages(app) -> None:
    """Writes docs/api/PACKAGE.rst, and the table of public names of `gemma_encoder`."""
    folder = pathlib.Path(app.srcdir) / "api"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for page, names in modules().items():
        name = "gemma_encoder" if page == TOP else f"gemma_encoder.{page}"
        lines = [*_title(name, "="), f".. automodule:: {name}", "   :no-members:", ""]
        if page == TOP:
            lines += _public_names()
        for module in names:
            lines += [*_title(module, "-"), f".. automodule:: {module}", ""]
        (folder / f"{page}.rst").write_text("\n".join(lines), encoding="utf-8")


def _title(text: str, line: str) -> list[str]:
    return [f"``{text}``", line * (len(text) + 4), ""]


def _public_names() -> list[str]:
    """A table of the public names, each with a link to where it is defined."""
    lines = [".. list-table::", "   :header-rows: 1", "", "   * - name", "     - defined in"]
    for name in gemma_encoder.__all__:
        module = gemma_encoder._PUBLIC[name]
        value = getattr(gemma_encoder, name)
        link = f":py:obj:`{name} <{module}.{name}>`" if callable(value) else f"``{name}``"
        lines += [f"   * - {link}", f"     - :py:mod:`{module}`"]
    return [*lines, ""]


def skip_member(app, what, name, value, skip, options):
    """Leaves out the fields of named tuples, whose docstrings only count them."""
    return True if type(value).__name__ == "_tuplegetter" else None


def shorten_signature(app, what, name, value, options, signature, returns):
    """Writes arrays as they are written in the code, and defaults that have no literal as `...`."""

    def short(text: str | None) -> str | None:
        return text and text.replace("jaxlib._jax.Array", "Array").replace("<factory>", "...")

    return short(signature), short(returns)


def split_attributes(app, what, name, value, options, lines) -> None:
    """Gives each of "a, b: text" under "Attributes:" an entry of its own."""
    result = []
    for line in lines:
        match = re.match(r":(ivar|vartype) ([\w*\\]+(?:, [\w*\\]+)+):(.*)", line)
        names = match[2].split(", ") if match else ()
        result += [f":{match[1]} {one}:{match[3]}" for one in names] or [line]
    lines[:] = result


def prepare_docstring(app, what, name, value, options, lines) -> None:
    """Turns a plain docstring into reStructuredText: layouts and code stay as they are written."""
    result: list[str] = []
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
            continue
        result += [*_paragraph(paragraph, result), ""] if paragraph else []
        paragraph = []
    lines[:] = result


def _paragraph(lines: list[str], before: list[str]) -> list[str]:
    # Columns: three blanks or more within a line, or before its continuation.
    is_layout = len(lines) > 1 and all(re.search(r"(\S {3,}| {8,})\S", line) for line in lines)
    is_block = all(line.startswith("    ") for line in lines)
    if is_layout and not is_block:
        return ["::", "", *(f"    {line}" for line in lines)]
    if is_block and not _in_section(before):
        starts = [line for line in before if line.strip()]
        goes_on = bool(starts) and starts[-1].startswith("    ")
        return lines if goes_on else ["::", "", *lines]
    return [_escaped(line) for line in lines]


SECTION = re.compile(r"^[A-Z][\w ,]*:$")


def _in_section(before: list[str]) -> bool:
    """Returns True if an indented block belongs to a section such as "Args:"."""
    flush = [line for line in before if line.strip() and not line.startswith(" ")]
    return bool(flush) and bool(SECTION.match(flush[-1]))


def _escaped(line: str) -> str:
    """Escapes what reStructuredText would take for markup, outside of `code` and directives."""
    if line.lstrip().startswith((">>>", "...", "..", ":")):
        return line
    parts = re.split(r"(`+[^`]*`+)", line)
    parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"(: [A-Z])\.$", r"\1\\.", "".join(parts))  # "rows: B." is no list
