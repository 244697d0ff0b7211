"""Pages that are written by hand, apart from those that the code writes."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILT = {ROOT / line[1:] for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("/docs/")}
"""Pages that the site's build writes, which git ignores."""
KEPT = {ROOT / "docs" / "configuration.md", ROOT / "docs" / "columns.md"}
"""Pages that it writes and git keeps, so that they are read without the site."""
IN_DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page not in BUILT | KEPT]
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*OUTSIDE, *IN_DOCS]
