"""Every verb and option of `aimscale`, as Markdown, by typer's own writer.

The site's build writes what `markdown()` returns to `docs/commands.md`.
"""

from __future__ import annotations

import re

import typer
import typer.cli
import typer.main

from aimscale.sweeps.cli.main import GROUPS, app
from aimscale.sweeps.planning.sweepfile import preset_names

INTRODUCTION = """\
# Commands

Every verb and option; `aimscale VERB --help` prints the same.
SWEEP is a sweep file, a preset or the name of a launched sweep. Presets: PRESETS.

A user's mistake is one sentence on stderr and exit code 2. `launch` exits with 1 when a run failed and 130 when it was
interrupted, `doctor` with 1 when something needed fails. [Those of
`train`](run-directory.md#how-a-program-ends) are for schedulers.
"""


def markdown() -> str:
    """Write the page."""
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="aimscale")
    page = typer.cli.get_docs_for_click(obj=group, ctx=context, name="aimscale")
    page = re.sub(r"^(##+) `", r"#\1 `", page[page.index("\n## ") :], flags=re.MULTILINE)  # before: `aimscale --help`
    for heading, verbs in GROUPS.items():
        page = page.replace(
            f"### `aimscale {next(iter(verbs))}`\n", f"## {heading}\n\n### `aimscale {next(iter(verbs))}`\n"
        )
    for needless in (
        r"\* `(-h, )?--help`: .*\n",
        r"\*\*Options\*\*:\n\n\n",
        r"\*\*Usage\*\*:\n\n```console\n.* COMMAND \[ARGS\]\.\.\.\n```\n\n",
        r"\*\*Commands\*\*:\n\n(\* .*\n)+\n",
    ):
        page = re.sub(needless, "", page)
    page = page.replace("```console\n$ ", "```text\n")
    presets = ", ".join(f"`{name}`" for name in preset_names())
    return f"{INTRODUCTION.replace('PRESETS', presets)}{page.rstrip()}\n"
