"""Tables of a rehearsed step, for `aimscale plan SWEEP --rehearse --run RUN`."""

from __future__ import annotations

from rich.filesize import decimal

from aimscale.harness.rehearsal.step import Rehearsal
from aimscale.harness.rehearsal.tracker import PARTS, Part
from aimscale.sweeps.table.views import Column, fitted_table, new_console

_Row = tuple[str, dict[Part, int]]


def print_rehearsal(run_id: str, rehearsal: Rehearsal) -> None:
    """Print the memory of a step by phase and part, and its collectives."""
    memory: list[_Row] = []
    for phase in rehearsal.phases:
        memory += [(f"{phase.phase}, at most", phase.peak), (f"{phase.phase}, at its end", phase.held)]

    def column(part: Part) -> Column:
        return Column(header=part, cell=lambda row: decimal(row[1].get(part, 0)))

    parts = [
        Column(header="memory", cell=lambda row: row[0], align_right=False),
        *map(column, PARTS),
        Column(header="sum", cell=lambda row: decimal(sum(row[1].values()))),
    ]
    calls = [
        Column(header="collective", cell=lambda each: f"{each.phase}: {each.name}", align_right=False),
        Column(header="calls", cell=lambda each: f"{each.count:,}"),
        Column(header="bytes", cell=lambda each: decimal(each.num_bytes)),
    ]
    console = new_console()
    console.print(f"\n{run_id}: one step of a rank, rehearsed", highlight=False)
    console.print(fitted_table(parts, memory, console.width))
    if rehearsal.collectives:
        console.print(fitted_table(calls, rehearsal.collectives, console.width))
