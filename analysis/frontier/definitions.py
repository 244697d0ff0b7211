"""How exponents depend on what is counted as N and as C: the joint law refitted for every meaning in the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result, plain_types
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.objectives import ROBUST, Objective
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.frontier.optimum import parametric_frontier
from aimscale.analysis.laws.catalogue import CHINCHILLA

SIZES = {
    "total": "params_total",
    "trunk": "params_trunk",
    "trunk and patches": "trunk_and_patches",
    "head": "params_head",
}
"""Meaning of N -> column; trunk and patches is what the released files hold."""
FLOPS = {"counted": "flops_train", "executed": "flops_executed", "6ND": "6nd"}
"""Meaning of C -> column; 6ND takes the N of its row."""
EXPONENTS = ("alpha", "beta", "exponent")


@dataclass(frozen=True, kw_only=True, repr=False)
class Definitions(Result):
    """The exponents by meaning of N and C."""

    table: pd.DataFrame = field(repr=False)
    """One row a meaning: N, C, alpha, beta and exponent (a of N* ~ C^a), each with _low and _high; objective (the
    minimum, lower fits better), reason (why an exponent is missing)."""
    interval_method: str

    def sentence(self) -> str:
        """How far the exponents move with the definition, beside how wide their intervals are."""
        parts = []
        for name, words in (("alpha", "the exponent of N"), ("exponent", "the exponent of N*(C)")):
            known = self.table.dropna(subset=[name]).sort_values(name)
            if known.empty:
                parts.append(f"{words} is not identified under any definition")
                continue
            low, high = known.iloc[0], known.iloc[-1]
            width = float((known[f"{name}_high"] - known[f"{name}_low"]).median())
            moved = float(high[name] - low[name])
            verdict = "more than" if moved > width else "less than"
            ends = [
                f"{row[name]:.3f} (N {row['N']}{'' if name == 'alpha' else ', C ' + row['C']})" for row in (low, high)
            ]
            parts.append(f"{words} goes from {' to '.join(ends)}, {verdict} the width of its interval, {width:.3f}")
        return f"By what is counted, {' and '.join(parts)}."

    def headline(self) -> str:
        """What was compared."""
        return f"Exponents under {len(self.table)} meanings of N and C"

    def summary(self) -> str:
        """The sentence and the table."""
        rows = []
        for row in self.table.to_dict("records"):
            shown = {"N": row["N"], "C": row["C"]}
            for name in EXPONENTS:
                value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
                shown[name] = f"{value:.3f} [{low:.3f}, {high:.3f}]" if np.isfinite(value) else "not identified"
            rows.append({**shown, "note": row["reason"]})
        return f"{self.sentence()}\n\n{pd.DataFrame(rows).to_string(index=False)}\n\nIntervals: {self.interval_method}."

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return plain_types(
            {
                "definitions": self.table.to_dict("records"),
                "interval_method": self.interval_method,
                "sentence": self.sentence(),
            }
        )


def by_definition(
    df: pd.DataFrame, *, y: str = "val_loss", objective: Objective | str = ROBUST, resamples: int = 500
) -> Definitions:
    """Refit the joint law for every meaning of N, and draw its frontier for every meaning of C.

    Args:
        resamples: bootstrap resamples of every fit; the same runs are drawn in all of them.

    Raises:
        AnalysisError: fewer than two meanings in the table, or no fit was possible.
    """
    df = _with_counts(df)
    sizes = {name: column for name, column in SIZES.items() if column in df and df[column].gt(0).any()}
    if len(sizes) < 2:
        raise AnalysisError(
            f"The table has {len(sizes)} of the columns that count parameters ({', '.join(SIZES.values())}); comparing "
            "definitions takes at least two."
        )
    rows: list[dict[str, Any]] = []
    method, errors = "none", []
    for size, column in sizes.items():
        try:
            law = fit(CHINCHILLA, df, y=y, columns={"N": column}, objective=objective, resamples=resamples)
        except AnalysisError as error:
            errors.append(str(error))
            continue
        method = law.interval_method
        rows += [_row(law, df, size, column, flops) for flops in FLOPS if _has_flops(df, flops)]
    if not rows:
        raise AnalysisError(f"No definition could be fitted: {errors[0] if errors else 'the table counts no FLOPs'}")
    return Definitions(table=pd.DataFrame(rows), interval_method=method)


def _with_counts(df: pd.DataFrame) -> pd.DataFrame:
    if {"params_trunk", "params_preprocessor"} <= set(df.columns):
        return df.assign(trunk_and_patches=df["params_trunk"] + df["params_preprocessor"])
    return df


def _has_flops(df: pd.DataFrame, flops: str) -> bool:
    column = "flops_6nd" if flops == "6ND" else FLOPS[flops]
    return column in df and bool(df[column].gt(0).any())


def _row(law: Fit, df: pd.DataFrame, size: str, column: str, flops: str) -> dict[str, Any]:
    row: dict[str, Any] = {"N": size, "C": flops, "objective": law.objective_value, "reason": ""}
    for name in ("alpha", "beta"):
        known = name not in law.not_identified
        i = law.intervals.get(name)
        row[name] = law.params[name] if known else np.nan
        row |= {f"{name}_low": i.low if i and known else np.nan, f"{name}_high": i.high if i and known else np.nan}
    if flops == "6ND":
        ratio = df[column] / df["params_total"] if "params_total" in df else 1.0
        df = df.assign(**{FLOPS["6ND"]: df["flops_6nd"] * ratio})
    try:
        line = parametric_frontier(law, df, columns={"N": column, "C": FLOPS[flops]})
    except AnalysisError as error:
        return row | dict.fromkeys(("exponent", "exponent_low", "exponent_high"), np.nan) | {"reason": str(error)}
    i = line.exponent_interval
    return row | {"exponent": line.exponent, "exponent_low": i.low, "exponent_high": i.high}
