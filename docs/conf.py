"""Build of the pages: `.ci/step pages`. Warnings are errors, a dead link among them.

Five pages (commands, fields of a configuration, columns of a table, the Python API, figures) and the sample reports are
written by the modules in `generate`.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes

sys.path.insert(0, str(Path(__file__).parent))

from generate import api_reference, command_reference, config_reference, gallery, table_reference

project = "aimscale"
copyright = "the aimscale maintainers, Apache-2.0"
release = importlib.metadata.version("aimscale")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures have no page
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
nb_execution_mode = "force"  # the notebook is kept without outputs: building the site runs it
nb_execution_raise_on_error = True
nb_execution_timeout = 300
exclude_patterns = ["_build"]
myst_heading_anchors = 4
smartquotes = False  # it would make a dash of the two hyphens of an option

html_theme = "furo"
html_title = f"aimscale {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
REPORTS = Path(__file__).with_name("_reports")
REPORTS.mkdir(exist_ok=True)  # Sphinx looks for it before it is filled
html_extra_path = [REPORTS.name]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "native"

GENERATED = {
    "configuration": config_reference.markdown,
    "commands": command_reference.markdown,
    "api": api_reference.markdown,
    "columns": table_reference.markdown,
}


def write_generated(app: Any) -> None:
    """Put the pages that the code tells beside the others."""
    for page, markdown in GENERATED.items():
        Path(app.srcdir, f"{page}.md").write_text(markdown())
    Path(app.srcdir, "gallery.md").write_text(gallery.markdown(Path(app.srcdir, "_gallery")))
    gallery.write_reports(REPORTS)


def write_llms(app: Any, error: Exception | None) -> None:
    """List the pages for programs that read a site by its `llms.txt`: title, address and first sentence of each."""
    if error is not None or app.builder.format != "html":
        return
    lines = ["# aimscale", "", "> Scaling laws of autoregressive image models: train, fit, forecast, compare.", ""]
    for page in sorted(app.env.found_docs):
        text = re.sub(r"<!--.*?-->", "", Path(app.env.doc2path(page)).read_text(), flags=re.DOTALL)
        paragraphs = [part for part in text.split("\n\n") if part.strip()[:1].isalpha()]
        sentence = " ".join(paragraphs[0].split()).split(". ")[0].rstrip(".:") if paragraphs else ""
        sentence = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", sentence)  # without links
        lines.append(f"- [{app.env.titles[page].astext()}]({page}.html)" + f": {sentence}." * bool(sentence))
    Path(app.outdir, "llms.txt").write_text("\n".join([*lines, ""]))


def without_study(app: Any, page: str, source: list[str]) -> None:
    """Leave the pages of studies out of the index where there are none: a pattern that matches nothing is a warning."""
    if page == "index" and not any(Path(app.srcdir, "study").glob("*.md")):
        source[0] = source[0].replace("study/*\n", "")


def keep_intervals_whole(app: Any, document: Any) -> None:
    """Let no interval, as [0.1, 0.2], break over two lines of a table's cell."""
    for text in [text for entry in document.findall(nodes.entry) for text in entry.findall(nodes.Text)]:
        whole = re.sub(r"\[[-+\d., ]+\]", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
        text.parent.replace(text, nodes.Text(whole))


def setup(app: Any) -> None:
    """Register what changes pages."""
    app.connect("builder-inited", write_generated)
    app.connect("doctree-read", keep_intervals_whole)
    app.connect("source-read", without_study)
    app.connect("build-finished", write_llms)
