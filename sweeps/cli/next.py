"""`aimscale next`: the runs to buy so that a loss or a probe's error is forecast with the least error for the price."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import TableArguments, of_law, show
from aimscale.analysis.errors import AnalysisError
from aimscale.sweeps.cli.options import AsJson, Root, root_option
from aimscale.sweeps.planning import DEFAULT_ROOT

if TYPE_CHECKING:
    import pandas as pd

    from aimscale.analysis.table.runs import Runs
    from aimscale.sweeps.planning.sweepfile import Sweep


TABLE_FLOPS_PER_HOUR = 400e12 * 3600
"""Assumed FLOPs per GPU-hour for runs of a table: 40 % of an H100's peak."""


def command(
    sweep_or_tables: Annotated[
        list[str], typer.Argument(help="A launched sweep (runs are priced as `plan` does), or any tables, read as one.")
    ],
    target: Annotated[str, typer.Option(help="The scale to forecast: N=1e9,D=2B (and U= where images repeat).")],
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="GPU-hours to spend, of a table at 400 TFLOP/s; default: half of the target's price."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the runs as a sweep file, ready for `plan` and `launch` (of a SWEEP).")
    ] = None,
    law: Annotated[str, typer.Option(help="Laws to forecast by, as `forecast` takes them.")] = "auto",
    y: options.Minimised = "val_loss",
    columns: options.Columns = None,
    where: options.Where = None,
    level: options.Level = 0.95,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Choose the runs, together, that make the forecast at the target most certain.

    A sweep offers its sizes at its budgets, and at two and four times the largest: what is not measured yet.
    """
    from aimscale.analysis.forecasts.forecast import parse_scale
    from aimscale.analysis.next import next_runs
    from aimscale.sweeps.cli.options import find_sweep, fresh_table, name_anywhere
    from aimscale.sweeps.planning.sweepfile import SweepError

    place = parse_scale(target, "--target")
    sweeps = [find_sweep(each, root) for each in sweep_or_tables]
    sweep = sweeps[0] if len(sweeps) == 1 else None
    if sweep is None:
        if write is not None:
            raise SweepError("--write makes a sweep file of a sweep; a table has none to start from")
        both = zip(sweeps, sweep_or_tables, strict=True)
        tables = [fresh_table(each, name_anywhere(each, given, root)) if each else Path(given) for each, given in both]
    else:
        if write is not None and write.absolute().parent != sweep.base_dir:
            raise SweepError(
                f"the data paths of {sweep.name} are relative to {sweep.base_dir}; write the new sweep file there, "
                f"as --write {sweep.base_dir / write.name}"
            )
        tables = [fresh_table(sweep, sweep_or_tables[0])]
    arguments = TableArguments(tables, columns, where, y)
    runs, y, _ = arguments.read_to_minimise()
    offer = _table_candidates(runs, place, y) if sweep is None else _sweep_candidates(sweep, runs.frame)
    budget = _half_price(offer, place) if budget is None else budget
    offered = next_runs(runs, place, offer, budget=budget, law=law, y=y)
    if sweep is None:
        following = arguments.then(f"forecast --register --at {shlex.quote(target)}{of_law(law, 'auto')}")
    elif write is None:
        file = sweep.base_dir / f"{sweep.name}-next.yaml"
        more = shlex.join(["--budget", f"{budget:.4g}", "--law", law, *root_option(root), "--write", str(file)])
        following = arguments.then(f"next --target {shlex.quote(target)} {more}")
    else:
        following = shlex.join(["aimscale", "plan", str(write), *root_option(root)])
        write.write_text(_sweep_file(sweep, offered.table))
    if write is not None and not as_json:
        typer.echo(f"wrote {write}", err=True)
    show(offered, as_json, following=following)


def _half_price(offer: pd.DataFrame, target: dict[str, float]) -> float:
    """Return half of what a run at the target would cost, by the price of the largest candidate."""
    if not {"N", "D"} <= target.keys():
        raise AnalysisError("--target needs N and D, such as N=1e9,D=2B.")
    largest = offer.iloc[int((offer["N"] * offer["D"]).to_numpy().argmax())]
    return float(largest["price"] * target["N"] / largest["N"] * target["D"] / largest["D"] / 2)


def _table_candidates(runs: Runs, target: dict[str, float], y: str) -> pd.DataFrame:
    """Return candidate runs on the table's grid and towards the target, priced by the table's FLOPs."""
    from aimscale.analysis.next import grid_offer
    from aimscale.analysis.table.groups import cost_of
    from aimscale.analysis.table.points import compute_points

    points = compute_points(runs.with_compute(), y).numbers
    cost = cost_of(points)
    candidates = grid_offer(points, target)
    return candidates.assign(price=cost.flops(candidates["N"], candidates["D"]) / TABLE_FLOPS_PER_HOUR)


def _sweep_candidates(sweep: Sweep, df: pd.DataFrame) -> pd.DataFrame:
    """Return candidate runs of the sweep's sizes that are not measured yet, with the prices of their cost cards."""
    import pandas as pd

    from aimscale.sweeps.state.planned_sweep import PlannedSweep

    budgets = sorted(sweep.file.budgets) or sorted({int(seen) for seen in df["images_seen"]})
    rows: list[dict[str, Any]] = []
    for images_seen in (*budgets, 2 * budgets[-1], 4 * budgets[-1]):
        one = sweep.with_fields(**_first_setting(sweep), budgets=[images_seen], exclude=[])
        for card in PlannedSweep(one).cards:
            seen, pool = float(card.budgets[0].images_seen), card.run.cell.get("unique_images")
            row = {"size": card.run.cell["size"], "N": float(card.params_total or math.nan), "D": seen}
            row |= {"U": min(seen, float(pool or seen)), "C": card.budgets[0].flops, "price": card.device_hours}
            rows.append(row)
    candidates = pd.DataFrame(rows)
    done = df[df["status"] == "complete"]
    measured = set(zip(done["params_total"], done["images_seen"], strict=True))
    return candidates[[pair not in measured for pair in zip(candidates["N"], candidates["D"], strict=True)]]


def _first_setting(sweep: Sweep) -> dict[str, Any]:
    """Return sweep fields with only the first seed, axis values and variant, and the largest pool; nothing tuned."""
    file = sweep.file
    pools = file.unique_images
    return {
        "isoflop": None,
        "tune": None,
        "seeds": list(file.seeds[:1]),
        "axes": {key: list(values[:1]) for key, values in file.axes.items()},
        "variants": dict(list(file.variants.items())[:1]),
        "unique_images": [None if None in pools else max(pool for pool in pools if pool is not None)],
    }


def _sweep_file(sweep: Sweep, chosen: pd.DataFrame) -> str:
    """Return the YAML text of the sweep with only the chosen cells."""
    sizes = list(dict.fromkeys(chosen["size"]))
    budgets = sorted({int(seen) for seen in chosen["D"]})
    wanted = {(size, int(seen)) for size, seen in zip(chosen["size"], chosen["D"], strict=True)}
    left_out = {size: [seen for seen in budgets if (size, seen) not in wanted] for size in sizes}
    values = sweep.file.model_dump(mode="json", exclude_defaults=True) | _first_setting(sweep)
    values |= {"name": f"{sweep.name}-next", "sizes": sizes, "budgets": budgets}
    values["exclude"] = [{"size": size, "budget": seen} for size, seen in left_out.items() if seen]
    kept = {key: value for key, value in values.items() if value not in (None, [], {})}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
