"""Sphinx's settings; docs/make_site.py lays out the pages and calls it."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import api_pages  # noqa: E402

project = "shiq_lab"
author = "the shiq_lab authors"
copyright = "the shiq_lab authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton", "plain_docstrings"]
exclude_patterns = ["_*.md", "files"]

smartquotes = False  # quotes in docstrings are code

html_theme = "furo"
html_title = "shiq_lab"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

# Formulas: MathJax from the site itself, and nothing that it would fetch later (its menu and screen-reader data).
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}

# Notebooks are shown with the outputs that were committed; the slow tests run them.
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_heading_anchors = 3

copybutton_prompt_text = "$ "
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

_found = api_pages.modules(HERE.parent)
api_imports = {name: module.imports for name, module in _found.items()}
api_public = api_pages.public_names(_found)
api_symbols = {symbol.name for module in _found.values() for symbol in module.symbols} | set(_found)


def setup(app: Sphinx) -> None:
    """MathJax lies with the pages."""
    app.config.html_static_path.append(str(app.srcdir / "_static"))
