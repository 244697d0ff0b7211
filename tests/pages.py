"""Pages that are written by hand: those that the site's build writes are the ones that git ignores."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILT = {ROOT / line[1:] for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("/docs/")}
WRITTEN = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page not in BUILT]
IN_DOCS = [page for page in WRITTEN if "published" not in page.parts]
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*OUTSIDE, *IN_DOCS]
