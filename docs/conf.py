"""Sphinx configuration: Markdown pages, and an API reference made from the docstrings.

`make docs` writes docs/_build/html. TensorFlow, seqio and Beam are never imported: they are mocked.
"""

import functools
import inspect
import pathlib
import sys

DOCS = pathlib.Path(__file__).parent.resolve()
sys.path[:0] = [str(DOCS.parent), str(DOCS / "extensions")]

from sphinx.ext.autodoc.mock import MockFinder  # noqa: E402

import gemma_encoder  # noqa: E402 (of this checkout, whatever is installed)

project = "gemma_encoder"
version = release = gemma_encoder.__version__
copyright = "the gemma_encoder authors, Apache-2.0"

# The last two are folders of this project: docs/extensions.
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "api_pages",
    "markdown_links",
]
exclude_patterns = ["_build"]
smartquotes = False  # quotes in commands stay as they are typed
default_role = "code"  # docstrings write `name`, as Markdown does

html_theme = "furo"
html_title = "gemma_encoder"
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False

myst_heading_anchors = 4  # the anchors that GitHub gives, so that one link serves both
myst_enable_extensions = ["colon_fence"]
suppress_warnings = [
    "myst.header",  # an included page may begin at a second-level heading
    "ref.python",  # "Run" in quotes may be the run of training or of a report
]
highlight_language = "text"

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_use_type_comments = False  # there are none, and each function would be parsed for them
# autodoc asks for the source of each function twice, which parses its whole module.
inspect.getsource = functools.cache(inspect.getsource)
# For the whole build: autodoc mocks only imports of its own, not those for reading sources.
sys.meta_path.insert(0, MockFinder(["apache_beam", "seqio", "tensorflow", "tensorflow_datasets"]))
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
