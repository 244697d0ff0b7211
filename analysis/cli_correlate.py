"""`aimscale correlate TABLE`: loss and probe accuracy, per task and kind of probe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

    from analysis.result import Correlation

app = typer.Typer(help="Correlate loss with accuracy and forecast accuracy from loss.", add_completion=False)


@app.command()
def correlate_table(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table, or a sweep's folder.")],
    x: Annotated[str, typer.Option(help="First column.")] = "val_loss",
    y: Annotated[str, typer.Option(help="Second column; top1 means every probe of the table.")] = "top1",
    columns: Annotated[list[str] | None, typer.Option(help="Foreign columns as ours=theirs.")] = None,
    partial: Annotated[
        str | None, typer.Option(help="Regress the logarithm of this column (e.g. flops_train) out of both.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="Resample whole groups of this column (run_id, size).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Pearson, Spearman and Kendall with intervals."""
    import json as json_module

    from analysis.table import parse_columns, read_table

    df = read_table(table, columns=parse_columns(columns or []))
    found = correlations_by_probe(df, x=x, y=y, partial=partial, cluster=cluster)
    if json:
        rows = [{"task": task, "kind": kind} | c.to_dict() for (task, kind), group in found.items() for c in group]
        typer.echo(json_module.dumps(rows, indent=2))
        return
    for (task, kind), group in found.items():
        if task:
            typer.echo(f"{task}, {kind} probe:")
        for c in group:
            typer.echo(f"  {c.sentence()}")


def correlations_by_probe(
    df: pd.DataFrame, *, x: str = "val_loss", y: str = "top1", partial: str | None = None, cluster: str | None = None
) -> dict[tuple[str, str], tuple[Correlation, ...]]:
    """(task, kind) -> the three correlations over the finished rows; one entry ("", "") for a plain column.

    Raises:
        AnalysisError: no such column, nothing probed, or too few rows.
    """
    from analysis.correlation import correlate
    from analysis.errors import AnalysisError
    from analysis.table import probe_frame

    if y in df.columns:
        return {("", ""): correlate(df, x=x, y=y, partial=partial, cluster=cluster)}
    if y != "top1" or "probes" not in df.columns:
        raise AnalysisError(
            f"The table has neither a column {y!r} nor probes; its columns are {', '.join(df.columns)}."
        )
    probes = probe_frame(df[df["status"] == "complete"] if "status" in df.columns else df)
    if probes.empty:
        raise AnalysisError(
            "No finished run of the table has been probed; run `aimscale probe` or name a column with --y."
        )
    return {
        (str(task), str(kind)): correlate(group, x=x, y="top1", partial=partial, cluster=cluster)
        for (task, kind), group in probes.groupby(["task", "kind"], sort=True)
    }
