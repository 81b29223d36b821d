"""Settings of the site: `make docs` builds it from the Markdown of this repository and the docstrings.

The source folder is the repository, not `docs/`, so that links between README, docs and examples are those of GitHub.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # docstrings, notebook_pages

import mask2former_hf

project = "mask2former_hf"
release = mask2former_hf.__version__
copyright = "the authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "notebook_pages"]
root_doc = "docs/index"
include_patterns = ["docs/**", "examples/README.md", "tests/golden/README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = ["docs/_build", "docs/site", ".*", "src", "benchmarks"]

myst_heading_anchors = 3  # `page.md#a-heading`, as on GitHub
highlight_language = "none"  # of blocks that name none: they show files and output
autodoc_typehints = "none"  # signatures stay short; docstrings say shapes and units
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "special-members": "__call__"}

html_theme = "furo"
html_title = project
html_copy_source = False
html_additional_pages = {"index": "to_docs.html"}
templates_path = ["."]
