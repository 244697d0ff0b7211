"""How exponents depend on what is counted as N and as C: the joint law refitted for every meaning in the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.objectives import ROBUST, Objective
from aimscale.analysis.fitting.result import Fit, Interval
from aimscale.analysis.frontier.optimum import parametric_frontier
from aimscale.analysis.laws.catalogue import CHINCHILLA

SIZES = {
    "total": "params_total",
    "trunk": "params_trunk",
    "trunk and patches": "trunk_and_patches",
    "head": "params_head",
}
"""Meaning of N -> column; trunk and patches is what the released files hold."""
FLOPS = {"counted": "flops_train", "executed": "flops_executed", "6ND": "flops_6nd"}
"""Meaning of C -> column; 6ND takes the N of its row."""
EXPONENTS = ("alpha", "beta", "exponent")


@dataclass(frozen=True, kw_only=True, repr=False)
class Definitions(Result):
    """The exponents by meaning of N and C."""

    table: pd.DataFrame
    """One row a meaning: N, C, alpha, beta and exponent (a of N* ~ C^a), each with _low and _high, NaN where
    not identified; reason (why the exponent is missing)."""
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
        """What was compared, and what came out."""
        return f"{len(self.table)} meanings of N and C. {self.sentence()} Intervals: {self.interval_method}."


def by_definition(
    df: pd.DataFrame, *, y: str = "val_loss", objective: Objective | str = ROBUST, resamples: int = 500
) -> Definitions:
    """Refit the joint law for every meaning of N, and draw its frontier for every meaning of C.

    Args:
        resamples: draws of every fit.

    Raises:
        AnalysisError: fewer than two meanings in the table, or no fit was possible.
    """
    if {"params_trunk", "params_preprocessor"} <= set(df.columns):
        df = df.assign(trunk_and_patches=df["params_trunk"] + df["params_preprocessor"])
    sizes = {name: column for name, column in SIZES.items() if column in df and df[column].gt(0).any()}
    if len(sizes) < 2:
        raise AnalysisError(
            f"The table has {len(sizes)} of the columns that count parameters ({', '.join(SIZES.values())}); comparing "
            "definitions takes at least two."
        )
    counted = [name for name, column in FLOPS.items() if column in df and df[column].gt(0).any()]
    rows: list[dict[str, Any]] = []
    method, errors = "none", ["the table counts no FLOPs"]
    for size, column in sizes.items():
        try:
            law = fit(CHINCHILLA, df, y=y, columns={"N": column}, objective=objective, resamples=resamples)
        except AnalysisError as error:
            errors.insert(0, str(error))
            continue
        method = law.interval_method
        rows += [{"N": size, "C": flops, **_exponents(law, df, column, flops)} for flops in counted]
    if not rows:
        raise AnalysisError(f"No definition could be fitted: {errors[0]}")
    return Definitions(table=pd.DataFrame(rows), interval_method=method)


def _exponents(law: Fit, df: pd.DataFrame, column: str, flops: str) -> dict[str, Any]:
    """alpha, beta and exponent with _low and _high of one meaning, NaN where one is not identified; reason."""
    found: dict[str, tuple[float, Interval]] = {
        name: (law.params[name], law.intervals.get(name, Interval(low=np.nan, high=np.nan)))
        for name in ("alpha", "beta")
        if name not in law.not_identified
    }
    reason = ""
    if flops == "6ND" and "params_total" in df:
        df = df.assign(flops_6nd=df["flops_6nd"] * df[column] / df["params_total"])
    try:
        line = parametric_frontier(law, df, columns={"N": column, "C": FLOPS[flops]})
        found["exponent"] = line.exponent, line.exponent_interval
    except AnalysisError as error:
        reason = str(error)
    row: dict[str, Any] = {}
    for name in EXPONENTS:
        value, i = found.get(name, (np.nan, Interval(low=np.nan, high=np.nan)))
        row |= {name: value, f"{name}_low": i.low, f"{name}_high": i.high}
    return row | {"reason": reason}
