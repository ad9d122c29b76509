"""How `make docs` builds the pages: strictly, and with nothing loaded from elsewhere."""

project = "eepo-fast"
html_title = "eepo-fast"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
default_role = "code"  # docstrings quote code with single backticks
autodoc_typehints = "none"
smartquotes = False
nitpicky = True
