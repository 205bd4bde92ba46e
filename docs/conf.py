"""Sphinx's settings; docs/build.py lays out the pages and calls it."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import api  # noqa: E402

project = "shiq_lab"
author = "the shiq_lab authors"
copyright = "the shiq_lab authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton", "extension"]
exclude_patterns = ["_*.md", "files"]
suppress_warnings = ["toc.empty_glob"]  # there may be no studies yet; a test asks for a page of every notebook

html_theme = "furo"
html_title = "shiq_lab"
html_static_path = [str(HERE / "site.css"), "_static"]
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

_found = api.modules(HERE.parent)
api_names = {"imports": {name: module.imports for name, module in _found.items()}, "public": api.public_names(_found)}
