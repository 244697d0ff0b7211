"""How the pages are built: `sphinx-build -W --keep-going -n docs site`. Warnings are errors, a dead link among them.

Two pages are written from the code by the modules in `generate`; their committed copies
are for readers of the repository, the site always shows what the code says now.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from generate import command_reference, config_reference

project = "aimscale"
copyright = "the aimscale maintainers, Apache-2.0"
release = importlib.metadata.version("aimscale")
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 4
smartquotes = False  # it would make a dash of the two hyphens of an option

html_theme = "furo"
html_title = f"aimscale {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "native"

GENERATED = {"configuration": config_reference.markdown, "commands": command_reference.markdown}


def generate(app: Any, page: str, source: list[str]) -> None:
    """Put what the code says now in the place of the committed page."""
    if page in GENERATED:
        source[0] = GENERATED[page]()
    if page == "index" and not any(Path(app.srcdir, "study").glob("*.md")):
        source[0] = source[0].replace("study/*\n", "")  # a pattern that matches nothing is a warning


def setup(app: Any) -> None:
    """Register the generated pages."""
    app.connect("source-read", generate)
