"""Every verb and option of `aimscale`, as Markdown, by typer's own writer.

The site's build writes what `markdown()` returns to `docs/commands.md`.
"""

from __future__ import annotations

import re

import typer
import typer.cli
import typer.main

from aimscale.sweeps.cli.main import app
from aimscale.sweeps.plan.sweepfile import preset_names

INTRODUCTION = """\
# Commands

Every verb and option; `aimscale VERB --help` prints the same.
SWEEP is a sweep file, a preset or the name of a launched sweep. Presets: PRESETS.

A user's mistake is one sentence on stderr and exit code 2. `train` exits with 0 when finished, 3 when training
diverged, 75 when it saved after a signal and wants to be started again, 1 on a crash; `launch` with 1 when a run failed
and 130 when it was interrupted; `doctor` with 1 when something needed fails.
"""


def markdown() -> str:
    """The page."""
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="aimscale")
    page = typer.cli.get_docs_for_click(obj=group, ctx=context, name="aimscale")
    page = page[page.index("\n## ") :]  # the list of verbs before it is `aimscale --help`
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
