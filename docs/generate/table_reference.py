"""Every column of the results table and every field of a probe, as Markdown, from the schema that writes them.

The site's build writes what `markdown()` returns to `docs/columns.md`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from aimscale.analysis.table.schema import COLUMNS, OF_CURVES, PROBE_FIELDS, SCHEMA_VERSION, Column

INTRODUCTION = f"""\
# Columns of the results table

Version {SCHEMA_VERSION} of the schema. [The results table](results.md) says what a row is and how to read it.
"""


def markdown() -> str:
    """Write the page."""
    parts = [INTRODUCTION, _table((*COLUMNS, *OF_CURVES))]
    parts += ["`lr` is in `curves.parquet` alone.\n", "## Fields of an entry of `probes`\n", _table(PROBE_FIELDS)]
    return "\n".join(parts)


def _table(columns: Iterable[Column]) -> str:
    rows = [f"| `{each.name}` | {each.dtype} | {each.unit} | {each.meaning} |" for each in columns]
    return "\n".join(["| name | type | unit | meaning |", "|---|---|---|---|", *rows, ""])


if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("columns.md").write_text(markdown())
