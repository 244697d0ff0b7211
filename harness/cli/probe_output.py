"""How probe results are printed, by `aimscale probe` and `aimscale baseline`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import typer


def print_entries(results: Iterable[tuple[int | None, list[dict[str, Any]]]], *, is_first: bool, as_json: bool) -> None:
    """Print each entry when it is there, or all as JSON at the end; only rank 0 prints.

    Args:
        results: (images seen, or None for a baseline; entries) after each task; reading them does the probing.
    """
    found: list[dict[str, Any]] = []
    for budget, entries in results:
        found += [{"images_seen": budget, **entry} for entry in entries]
        if is_first and not as_json:
            for entry in entries:
                typer.echo(_line(budget, entry))
    if is_first and as_json:
        typer.echo(json.dumps(found, indent=1))


def _line(budget: int | None, entry: dict[str, Any]) -> str:
    low, high = 100 * entry["top1_lo95"], 100 * entry["top1_hi95"]
    blocks = entry["blocks"]
    span = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"
    who = "baseline" if budget is None else f"{budget:,} images"
    return (
        f"{who:>18}  {entry['task']:<16} {entry['kind']:<10} top-1 {100 * entry['top1']:.1f} % "
        f"(95 %: {low:.1f} to {high:.1f}, n {entry['n']}, chance {100 * entry['chance']:.1f}), {span}"
    )
