"""`aimscale correlate TABLE`: loss and probe accuracy, per task and kind of probe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import draw, table_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd

    from aimscale.analysis.accuracy.correlation import Correlation
    from aimscale.analysis.fitting.result import Fit

Probe = tuple[str, str]
"""Task and kind of probe."""


def command(
    tables: options.Tables,
    x: Annotated[str, typer.Option(help="First column.")] = "val_loss",
    y: Annotated[str, typer.Option(help="Second column; top1 means every probe of the table.")] = "top1",
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    main: options.Main = False,
    partial: Annotated[
        str | None, typer.Option(help="Regress the logarithm of this column (e.g. flops_train) out of both.")
    ] = None,
    within: Annotated[str | None, typer.Option(help="Correlate within groups of this column (size).")] = None,
    cluster: Annotated[
        str, typer.Option(help="Resample whole groups of this column; auto: runs that have several rows; none: rows.")
    ] = "auto",
    link: Annotated[
        str | None, typer.Option(help="Also fit accuracy as sigmoid, exponential or linear in the loss.")
    ] = None,
    at_loss: Annotated[
        list[float] | None, typer.Option(help="Losses to forecast the accuracy for (with --link).")
    ] = None,
    figure: options.FigurePath = None,
    json: options.AsJson = False,
) -> None:
    """Pearson, Spearman and Kendall with intervals."""
    import json as json_module

    from aimscale.analysis.accuracy.correlation import correlate
    from aimscale.analysis.display import plain_types
    from aimscale.analysis.errors import AnalysisError
    from aimscale.analysis.table.names import our_name

    df = table_of(tables, columns, where, main, best=best_of, y=x)
    x, y = our_name(df, x), our_name(df, y)
    partial, within = (our_name(df, name) if name else None for name in (partial, within))
    groups = groups_by_probe(df, y)
    held: dict[str, Any] = {"partial": partial, "within": within, "cluster": None if cluster == "none" else cluster}
    found = {k: correlate(group, x=x, y=y, **held) for k, group in groups.items()}
    links = {k: link_of(group, link, x, y) for k, group in groups.items()} if link else {}
    if figure is not None:
        if x != "val_loss" or ("", "") in groups:
            raise AnalysisError("--figure draws probe accuracies against val_loss; leave out --x and --y.")
        draw_probes(groups, found, links, figure)
    if json:
        typer.echo(json_module.dumps(plain_types(_as_json(found, links)), indent=2, allow_nan=False))
        return
    _print(found, links, at_loss or [])


def _print(found: Mapping[Probe, Sequence[Correlation]], links: Mapping[Probe, Fit], at_loss: Sequence[float]) -> None:
    for (task, kind), group in found.items():
        if task:
            typer.echo(f"{task}, {kind} probe:")
        for c in group:
            typer.echo(f"  {c.sentence()}")
        if (task, kind) in links:
            typer.echo(f"  {links[task, kind].sentence()}")
            predicted = links[task, kind].predict({"L": at_loss}).itertuples() if at_loss else ()
            for loss, row in zip(at_loss, predicted, strict=True):
                typer.echo(f"  At a loss of {loss:g}: {row.value:.4f} (measured: {row.pi_lo:.4f} to {row.pi_hi:.4f}).")


def _as_json(found: Mapping[Probe, Sequence[Correlation]], links: Mapping[Probe, Fit]) -> Any:
    rows = [{"task": task, "kind": kind} | c.to_dict() for (task, kind), group in found.items() for c in group]
    fits = [{"task": task, "kind": kind} | f.to_dict() for (task, kind), f in links.items()]
    return {"correlations": rows, "links": fits} if fits else rows


def draw_probes(
    groups: Mapping[Probe, pd.DataFrame],
    found: Mapping[Probe, Sequence[Correlation]],
    links: Mapping[Probe, Fit],
    path: Path,
) -> None:
    """A figure per kind of probe, its name behind that of `path`."""
    import pandas as pd

    from aimscale.analysis.plots.scaling import plot_loss_accuracy

    for kind in dict.fromkeys(kind for _, kind in groups):
        of_kind = {key[0]: key for key in groups if key[1] == kind}
        drawn = plot_loss_accuracy(
            pd.concat([groups[key] for key in of_kind.values()]),
            {task: found[key] for task, key in of_kind.items()},
            {task: links[key] for task, key in of_kind.items() if key in links},
        )
        draw(drawn, path.with_name(f"{path.stem}-{kind}"))


def groups_by_probe(df: pd.DataFrame, y: str) -> dict[Probe, pd.DataFrame]:
    """(task, kind) -> its rows over the finished runs; one entry ("", "") for a plain column.

    Raises:
        AnalysisError: no such column, or nothing probed.
    """
    from aimscale.analysis.errors import AnalysisError
    from aimscale.analysis.table.names import column_names
    from aimscale.analysis.table.points import complete
    from aimscale.analysis.table.read import probe_frame

    done = complete(df)
    if y in df.columns:
        return {("", ""): done}
    if y != "top1" or "probes" not in df.columns:
        raise AnalysisError(
            f"The table has neither a column {y!r} nor probes; name a column by --y (its columns: {column_names(df)})."
        )
    probes = probe_frame(done)
    if probes.empty:
        raise AnalysisError(
            "No finished run of the table has been probed; run `aimscale probe` or name a column by --y."
        )
    return {(str(task), str(kind)): group for (task, kind), group in probes.groupby(["task", "kind"], sort=True)}


def link_of(rows: pd.DataFrame, kind: str, x: str, y: str) -> Fit:
    """Accuracy as a function of loss, with the probe's chance level as its floor where the table knows it."""
    from aimscale.analysis.accuracy.links import chance_level, link

    return link(rows, kind=kind, loss=x, accuracy=y, chance=chance_level(rows))
