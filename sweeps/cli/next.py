"""`aimscale next`: which runs to buy next, so that a target's loss is forecast with the least error for the price."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import table_of
from aimscale.sweeps.cli.options import AsJson, Root, complete_sweep

if TYPE_CHECKING:
    import pandas as pd

    from aimscale.analysis.next.proposal import Proposal
    from aimscale.sweeps.plan.sweepfile import Sweep


def command(
    sweep_or_tables: Annotated[
        list[str],
        typer.Argument(
            help="A launched and collected sweep (runs are priced by their cost cards), or any tables, read as one.",
            autocompletion=complete_sweep,
        ),
    ],
    target: Annotated[str, typer.Option(help="The scale to forecast: N=1e9,D=2B (and U= where images repeat).")],
    budget: Annotated[float, typer.Option(min=0, help="GPU-hours to spend.")],
    write: Annotated[
        Path | None, typer.Option(help="Write the runs as a sweep file, ready for `plan` and `launch` (of a SWEEP).")
    ] = None,
    law: Annotated[str, typer.Option(help="Law to forecast by; auto chooses it as `fit --law auto` does.")] = "auto",
    y: Annotated[str, typer.Option(help="Column of the loss.")] = "val_loss",
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    main: options.Main = False,
    sizes: Annotated[
        str | None, typer.Option(help="Sizes on offer, e.g. rung-32,rung-64; default: the sweep's.")
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="D on offer, e.g. 4k,16k,1M; default: the sweep's, and twice and four times the largest."),
    ] = None,
    tflops: Annotated[
        float, typer.Option(min=0.001, help="What one GPU delivers, TFLOP/s: prices the runs of a TABLE.")
    ] = 400.0,
    root: Root = Path("aimscale-runs"),
    as_json: AsJson = False,
) -> None:
    """Choose the runs, together, that make the forecast at the target most certain."""
    from aimscale.analysis.forecasts.ahead import parse_scale
    from aimscale.analysis.table.results import SUFFIXES
    from aimscale.analysis.table.schema import our_name
    from aimscale.sweeps.plan.sweepfile import SweepError, load_sweep

    place = parse_scale(target, "--target")
    if len(sweep_or_tables) > 1 or Path(sweep_or_tables[0]).suffix in SUFFIXES:
        if write is not None:
            raise SweepError("--write makes a sweep file of a sweep; a table has none to start from")
        if sizes or budgets:
            raise SweepError("--sizes and --budgets are those of a sweep; a table offers its own N and D")
        df = table_of([Path(name) for name in sweep_or_tables], columns, where, main, best=best_of, y=y)
        found = _of_table(df, place, budget, law, our_name(df, y), tflops)
    else:
        sweep = load_sweep(sweep_or_tables[0], root)
        if write is not None and write.absolute().parent != sweep.base_dir:
            raise SweepError(
                f"the data paths of {sweep.name} are relative to {sweep.base_dir}; write the new sweep file there, "
                f"as --write {sweep.base_dir / write.name}"
            )
        df = table_of([_table(sweep)], columns, where, main, best=best_of, y=y)
        found = _of_sweep(sweep, df, place, budget, law, our_name(df, y), sizes, budgets)
        if write is not None:
            write.write_text(_sweep_file(sweep, found.table))
    typer.echo(found.to_json() if as_json else found.summary())
    if write is not None and not as_json:
        typer.echo(f"\nwrote {write}; next: aimscale plan {write}")


def _of_table(df: pd.DataFrame, target: dict[str, float], budget: float, law: str, y: str, tflops: float) -> Proposal:
    """Runs on the table's own grid and on the way to the target, priced by its own FLOPs."""
    from aimscale.analysis.frontier.optimum import cost_of, points_of
    from aimscale.analysis.next.backtest import with_compute
    from aimscale.analysis.next.proposal import grid_offer, propose

    df = with_compute(df, None)
    points = points_of(df, y=y, columns=None)
    cost = cost_of(*(points[v].to_numpy() for v in ("N", "D", "C")))
    offer = grid_offer(points, target)
    flops = cost.kappa * offer["N"] ** (1 + cost.s) * offer["D"]
    return propose(df, target, offer.assign(price=flops / (tflops * 1e12 * 3600)), budget=budget, law=law, y=y)


def _table(sweep: Sweep) -> Path:
    from aimscale.sweeps.plan.sweepfile import SweepError

    table = sweep.directory / "results.parquet"
    if not table.is_file():
        raise SweepError(f"{table} does not exist; `aimscale collect {sweep.name}` makes it once runs are complete")
    return table


def _of_sweep(
    sweep: Sweep,
    df: pd.DataFrame,
    target: dict[str, float],
    budget: float,
    law: str,
    y: str,
    sizes: str | None,
    budgets: str | None,
) -> Proposal:
    """Runs of the sweep's sizes and budgets that are not measured yet, priced by their cost cards."""
    import pandas as pd

    from aimscale.analysis.next.proposal import propose
    from aimscale.harness.run.counts import count

    named = sizes.split(",") if sizes else list(sweep.file.sizes)
    images = [int(count(text)) for text in budgets.split(",")] if budgets else _budgets(sweep, df)
    offer = pd.concat([_offer(sweep, named, seen) for seen in images], ignore_index=True)
    done = df[df["status"] == "complete"]
    measured = set(zip(done["params_total"], done["images_seen"], strict=True))
    new = [pair not in measured for pair in zip(offer["N"], offer["D"], strict=True)]
    return propose(df, target, offer[new], budget=budget, law=law, y=y)


def _budgets(sweep: Sweep, df: pd.DataFrame) -> list[int]:
    """The sweep's budgets, or the table's where it is by FLOPs, and twice and four times the largest."""
    known = sorted(sweep.file.budgets) or sorted({int(v) for v in df["images_seen"]})
    return [*known, 2 * known[-1], 4 * known[-1]]


def _one_setting(sweep: Sweep) -> dict[str, Any]:
    """Fields that leave a sweep its first setting alone: the first seed, axis values and variant, the largest pool."""
    file = sweep.file
    pools = file.unique_images
    return {
        "isoflop": None,
        "seeds": list(file.seeds[:1]),
        "axes": {key: list(values[:1]) for key, values in file.axes.items()},
        "variants": dict(list(file.variants.items())[:1]),
        "unique_images": [None if None in pools else max(pool for pool in pools if pool is not None)],
    }


def _offer(sweep: Sweep, sizes: list[str], images_seen: int) -> pd.DataFrame:
    """One run per size to this budget, with the price of its cost card."""
    import pandas as pd

    from aimscale.sweeps.plan.costs import cost_cards
    from aimscale.sweeps.plan.planner import plan

    one = sweep.with_fields(**_one_setting(sweep), sizes=sizes, budgets=[images_seen], exclude=[])
    runs = plan(one)
    rows: list[dict[str, Any]] = []
    for run, card in zip(runs, cost_cards(one, runs), strict=True):
        seen = float(card.budgets[0].images_seen)
        pool = run.config.training.data.unique_images
        row = {"size": run.cell["size"], "N": float(card.params_total), "D": seen, "U": min(seen, float(pool or seen))}
        rows.append({**row, "C": card.budgets[0].flops, "price": card.device_hours})
    return pd.DataFrame(rows)


def _sweep_file(sweep: Sweep, chosen: pd.DataFrame) -> str:
    """The sweep with the chosen cells alone, as YAML."""
    sizes = list(dict.fromkeys(chosen["size"]))
    budgets = sorted({int(seen) for seen in chosen["D"]})
    wanted = {(size, int(seen)) for size, seen in zip(chosen["size"], chosen["D"], strict=True)}
    left_out = {size: [seen for seen in budgets if (size, seen) not in wanted] for size in sizes}
    values = sweep.file.model_dump(mode="json", exclude_defaults=True) | _one_setting(sweep)
    values |= {"name": f"{sweep.name}-next", "sizes": sizes, "budgets": budgets}
    values["exclude"] = [{"size": size, "budget": seen} for size, seen in left_out.items() if seen]
    kept = {key: value for key, value in values.items() if value not in (None, [], {})}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
