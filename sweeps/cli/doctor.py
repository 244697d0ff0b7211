"""`aimscale doctor`: what works on this machine, and what to do about what does not."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from aimscale.sweeps.doctor import Check, checks

COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}
NAME_WIDTH = 11
TEXT_WIDTH = 95


def command(
    root: Annotated[Path, typer.Option(help="Where sweeps are to be kept.")] = Path("aimscale-runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at this machine, its disk and its Slurm: what works, and what to do about the rest.

    Takes seconds and leaves nothing behind. Exits with 1 when something needed fails.
    """
    found = []
    for check in checks(root):
        found.append(check if check.level != "ok" else dataclasses.replace(check, advice=""))
        if not as_json:
            _print(found[-1])
    counts = {level: sum(check.level == level for check in found) for level in COLOURS}
    if as_json:
        plain = [dataclasses.asdict(check) for check in found]
        typer.echo(json.dumps({"version": 1, "ok": not counts["fail"], "checks": plain}, indent=1))
    else:
        typer.echo(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")
    raise typer.Exit(1 if counts["fail"] else 0)


def _print(check: Check) -> None:
    head = f"{check.level:<4}  {check.name:<{NAME_WIDTH}} "
    lines = [*_wrapped(check.found, ""), *(_wrapped(f"-> {check.advice}", "   ") if check.advice else ())]
    head_or_space = [typer.style(head[:4], fg=COLOURS[check.level]) + head[4:]] + [" " * len(head)] * (len(lines) - 1)
    for start, line in zip(head_or_space, lines, strict=True):
        typer.echo(start + line)
    sys.stdout.flush()


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, width=TEXT_WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
