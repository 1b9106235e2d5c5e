"""Configuration of Sphinx: `make docs` builds docs/ into build/docs, warnings are errors."""

import blip2fast

project = "blip2fast"
author = "the blip2fast authors"
version = release = blip2fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
exclude_patterns = ["README.md"]

autodoc_member_order = "bysource"
# transformers' own docstrings are not in the form that Sphinx reads
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
# configurations are read as tables of attributes: constructors of a hundred arguments are not
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"blip2fast {version}"
html_show_sphinx = False
