"""What the board found: means over tables by cut and method, the record by distance, and the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from aimscale.analysis.forecasts.board import LOSS, RULE_NAME, STACK, BoardTable, calibrated
from aimscale.analysis.forecasts.record import BINS

MANY_POINTS = 10
"""Cuts with fewer points are left out of the lowest share inside."""
WORST = 3
"""Cuts that the page names."""


def summary(scored: pd.DataFrame) -> pd.DataFrame:
    """Means over tables of the losses: one row a method and cut, in per cent of the loss; the best score first."""
    losses = scored[scored["quantity"] == LOSS]
    order = np.log(losses["score"]).groupby(losses["method"]).mean().sort_values().index
    rows = []
    for method in order:
        for cut, group in losses[losses["method"] == method].groupby("cut"):
            many = group[group["num_points"] >= MANY_POINTS]
            rows.append(
                {
                    "method": method,
                    "cut": f"1/{cut:.0f}",
                    "tables": len(group),
                    "inside": f"{100 * group['inside'].mean():.1f}",
                    "lowest": f"{100 * many['inside'].min():.0f}" if len(many) else "",
                    "error": f"{100 * group['error'].mean():.2f}",
                    "half width": f"{100 * group['half_width'].mean():.1f}",
                    "score": f"{100 * np.exp(np.log(group['score']).mean()):.1f}",
                }
            )
    return pd.DataFrame(rows)


def record_table(points: pd.DataFrame) -> pd.DataFrame:
    """The stack's forecasts by distance (`record.Record`), every table counting alike in each range."""
    own = points[points["method"] == STACK]
    is_loss = own["quantity"] == LOSS
    predicted, measured = own["predicted"].to_numpy(float), own["measured"].to_numpy(float)
    off = np.abs(np.where(is_loss, np.log(predicted / measured), predicted - measured))
    each = own.assign(off=off, held=own["measured"].between(own["low"], own["high"]), is_loss=is_loss)
    each["bin"] = np.clip(np.searchsorted(BINS, each["distance"]), 1, len(BINS) - 1)
    means = each.groupby(["is_loss", "bin", "table"])[["held", "off"]].mean().groupby(["is_loss", "bin"]).mean()
    tables = each[is_loss].groupby("bin")["table"].nunique()
    losses, accuracies = means.loc[True], means.loc[False].reindex(tables.index)
    return pd.DataFrame(
        {
            "low": [BINS[k - 1] for k in tables.index],
            "high": [BINS[k] for k in tables.index],
            "num_tables": tables,
            "inside": losses["held"],
            "error": losses["off"],
            "accuracy_inside": accuracies["held"],
            "accuracy_error": accuracies["off"],
        }
    )


def page(tables: Sequence[BoardTable], points: pd.DataFrame, scored: pd.DataFrame) -> str:
    """The board as Markdown."""
    losses = scored[(scored["quantity"] == LOSS) & (scored["method"] == STACK)]
    many = losses[losses["num_points"] >= MANY_POINTS]
    worst = many.sort_values("inside").head(WORST)
    families = {family: calibrated(points[points["family"] != family]) for family in sorted(points["family"].unique())}
    used = [table for table in tables if table.name in set(points["table"])]
    names = ", ".join(f"{row['table']} at 1/{row['cut']:.0f} ({row['inside']:.0%})" for row in worst.to_dict("records"))
    first = {table.family: table for table in reversed(used)}
    num = int(((points["method"] == STACK) & (points["quantity"] == LOSS)).sum())
    parts = [
        f"{len(used)} tables of {points['family'].nunique()} families, {num:,} forecasts of a loss. Inside, lowest, "
        "error and half width are in per cent; the score is Winkler's, of ln loss, times 100 (smaller is better).",
        _markdown(summary(scored)),
        f"The constant of the misfit is {calibrated(points):.2f}; without one family or another it is "
        f"{min(families.values()):.2f} to {max(families.values()):.2f}, and each is judged without its own. "
        f"Least inside: {names}.",
        "### Accuracies",
        _markdown(_accuracies(scored)),
        "### Table by table",
        f"Share inside, mean error and score of the stack, and the score of the {RULE_NAME}.",
        _markdown(_by_table(scored)),
        "### Where the tables come from",
        "\n".join(f"- **{family}**: {table.source}. Licence: {table.licence}." for family, table in first.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _accuracies(scored: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for cut, group in scored[scored["quantity"] != LOSS].groupby("cut"):
        means = 100 * group[["inside", "error", "half_width"]].mean()
        told = {"inside": f"{means['inside']:.1f}", "error, points": f"{means['error']:.1f}"}
        rows.append({"cut": f"1/{cut:.0f}", "probes": len(group), **told, "half width": f"{means['half_width']:.1f}"})
    return pd.DataFrame(rows)


def _by_table(scored: pd.DataFrame) -> pd.DataFrame:
    losses, rows = scored[scored["quantity"] == LOSS], []
    rule = losses[losses["method"] == RULE_NAME].set_index(["table", "cut"])["score"].to_dict()
    for ours in losses[losses["method"] == STACK].sort_values(["table", "cut"]).to_dict("records"):
        place = {"table": ours["table"], "cut": f"1/{ours['cut']:.0f}", "points": ours["num_points"]}
        told = {"inside": f"{100 * ours['inside']:.0f}", "error": f"{100 * ours['error']:.2f}"}
        theirs = f"{100 * rule.get((ours['table'], ours['cut']), np.nan):.1f}"
        rows.append({**place, **told, "score": f"{100 * ours['score']:.1f}", "rule": theirs})
    return pd.DataFrame(rows)


def _markdown(table: pd.DataFrame) -> str:
    rows = [list(map(str, table.columns)), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
