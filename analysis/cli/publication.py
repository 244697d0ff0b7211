"""`aimscale verify FOLDER`: recompute every number of a published folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aimscale.analysis.cli import options


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `aimscale publish` wrote.")],
    json: options.AsJson = False,
) -> None:
    """Recompute every number of a published folder from its tables, and compare all files with their checksums.

    Exits with 1 when something differs.
    """
    from aimscale.analysis.publication.folder import verify as check

    found = check(folder)
    options.show(found, json)
    if not found.is_verified:
        raise typer.Exit(1)
