"""The documentation: links, anchors, named files and functions, config fields, Python examples."""

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys

import pytest

from gemma_encoder.inputs import options
from gemma_encoder.training.config import MAY_CHANGE, TrainConfig
from tests import pages

ROOT = pages.ROOT
LINK = re.compile(r"(?<!\\)\[(?:`[^`]*`|[^\]`])*\]\(([^)\s]+)\)")
POINTER = re.compile(
    r"`((?:gemma_encoder|experiments|launch|tests|docs|requirements)/[\w./-]*)(?::([\w.]+))?`"
)
FIELD = re.compile(r"--config\.([a-z][\w.]*)")
ABSENT = {"sentence_transformers", "mteb"}  # of extras that the tests do not have


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#{1,6} +(.*?) *$", pages.prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()) for heading in headings)
    result = [heading.replace(" ", "-") for heading in plain]
    assert len(set(result)) == len(result) or page in pages.REPORTS, f"{page} has a heading twice"
    for name in re.findall(r"\{include\} (\S+)", pages.text(page)):
        file = (ROOT / page).parent / name
        result += anchors(file.resolve().relative_to(ROOT).as_posix())
    return set(result)


@pytest.mark.parametrize("page", [*pages.PAGES, *pages.REPORTS])
def test_links_and_anchors(page):
    wrong = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`(?!\])", "", pages.prose(page))):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        resolves = target.exists() and (
            not anchor or anchor in anchors(target.relative_to(ROOT).as_posix())
        )
        if not resolves:
            wrong.append(link)
    assert not wrong


def defined(path, name: str) -> bool:
    """Returns True if a module defines a function, class, constant or "Class.method"."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        names = {}
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            keys = [getattr(node, "name", None), *(getattr(one, "id", None) for one in targets)]
            names |= dict.fromkeys(filter(None, keys), node)
        if part not in names:
            return False
        body = getattr(names[part], "body", [])
    return True


@pytest.mark.parametrize("page", pages.PAGES)
def test_named_files_and_functions_exist(page):
    wrong = []
    for path, name in POINTER.findall(pages.prose(page)):
        file = ROOT / path
        if path.startswith("docs/_build"):
            continue
        if not file.exists() or (name and not defined(file, name)):
            wrong.append(f"{path}:{name}")
    assert page == "CHANGELOG.md" or not wrong


@pytest.mark.parametrize("page", pages.PAGES)
def test_config_fields_exist(page):
    for field in set(FIELD.findall(pages.text(page))) - {"field"}:
        options.check_path(TrainConfig, field.rstrip("."))


@pytest.mark.parametrize("page", pages.PAGES)
def test_python_examples_compile_and_their_imports_resolve(page):
    """CONTRIBUTING.md's are run by test_contributing, the others by test_readme."""
    written = {
        match[1]
        for body in pages.blocks(page, "python")
        if (match := re.match(r"# (\w+)\.py\n", body))
    }
    for body in pages.blocks(page, "python"):
        tree = ast.parse(body)
        compile(tree, page, "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [(alias.name, ()) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module, [alias.name for alias in node.names])]
            else:
                continue
            for module, members in names:
                if module.split(".")[0] in written | ABSENT:
                    continue
                assert importlib.util.find_spec(module), module
                if module.startswith("gemma_encoder."):
                    loaded = importlib.import_module(module)
                    assert [one for one in members if not hasattr(loaded, one)] == []


def test_every_page_is_in_the_table_of_contents():
    tables = re.findall(r"```\{toctree\}\n(.*?)```", pages.text("docs/index.md"), re.DOTALL)
    listed = {
        line for table in tables for line in table.split("\n") if line and not line.startswith(":")
    }
    assert listed == {page[5:-3] for page in pages.PAGES if page.startswith("docs/")} - {"index"}


def test_the_fields_that_may_change_are_named():
    section = pages.text("docs/resume.md").split("## What may change between two starts")[1]
    named = re.findall(r"`(\w+)`", section.split(" (the fields marked")[0])
    assert sorted(named) == sorted([*MAY_CHANGE])


def test_the_changelog_begins_with_the_format_that_is_written():
    from gemma_encoder.weights.native import FORMAT_VERSION

    (first, *_) = re.findall(r"^## .* format (\d+)$", pages.text("CHANGELOG.md"), re.MULTILINE)
    assert int(first) == FORMAT_VERSION


def test_the_pages_are_built_without_a_warning(tmp_path):
    """As `make docs` builds them."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    built = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "html" / "api" / "model.html").read_text(encoding="utf-8")
    assert "Float[Array" in re.sub(r"<[^>]*>", "", reference)
