"""Which law? By what it predicts on scales it has not seen, never by R^2 on the points it was fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.heldout import held_out
from aimscale.analysis.fitting.objectives import HUBER_LOG, Objective
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Law
from aimscale.analysis.laws.catalogue import find_law


@dataclass(frozen=True, kw_only=True, repr=False)
class Choice(Result):
    """Laws ranked by predictive score."""

    table: pd.DataFrame
    """One row a law, best first: law, log_rmse (mean over held-out steps), naive_log_rmse, num_parameters, reason..."""
    best: Fit = field(repr=False)
    """The best law, fitted to all points."""
    by: str
    """The scale that was held out."""

    def headline(self) -> str:
        """The winner and how it was found."""
        return f"{self.best.law.name} of {len(self.table)} laws, by predicting the largest {self.by}"

    def summary(self) -> str:
        """The ranking in words, then the best law."""
        return f"{self.sentence()}\n\n{self.best.summary()}"

    def sentence(self) -> str:
        """The ranking in words."""
        ranked = ", ".join(f"{r.law} {r.log_rmse:.4f}" for r in self.table.dropna(subset="log_rmse").itertuples())
        unranked = "".join(
            f" {law} was not ranked: {why}" for law, why in self.table[["law", "reason"]].to_numpy() if why
        )
        return (
            f"Chosen by predicting the largest {self.by} from the smaller ones (mean log-RMSE over "
            f"{self.table['num_steps'].max()} held-out steps): {ranked}; "
            f"a straight line in log-log {self.table['naive_log_rmse'].min():.4f}.{unranked}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "by": self.by,
            "laws": self.table.to_dict("records"),
            "best": self.best.to_dict(),
            "sentence": self.sentence(),
        }


def choose(
    laws: Sequence[Law | str],
    df: pd.DataFrame,
    *,
    by: str,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    objective: Objective | str = HUBER_LOG,
    max_steps: int = 3,
    resamples: int = 500,
) -> Choice:
    """Rank laws by held-out-scale error: for k = 1 to `max_steps`, the k largest values of `by` are predicted.

    Every law is scored on the same steps; a law that cannot be fitted to the rest is listed with the reason.

    Raises:
        AnalysisError: no law could be scored.
    """
    rows: list[dict[str, Any]] = []
    for law in [find_law(each) if isinstance(each, str) else each for each in laws]:
        row: dict[str, Any] = {"law": law.name, "num_parameters": len(law.parameters), "log_rmse": np.nan, "reason": ""}
        try:
            result = fit(law, df, y=y, columns=columns, objective=objective, resamples=0)
            tests = [held_out(result, df, by=by, num_values=k, resamples=0) for k in range(1, max_steps + 1)]
        except AnalysisError as error:
            rows.append({**row, "reason": str(error), "num_steps": 0})
            continue
        row |= {"log_rmse": np.mean([t.log_rmse for t in tests]), "num_steps": len(tests)}
        rows.append({**row, "naive_log_rmse": np.mean([t.naive_log_rmse for t in tests])})
    table = pd.DataFrame(rows).sort_values("log_rmse", na_position="last", ignore_index=True)
    if table["log_rmse"].isna().all():
        raise AnalysisError(f"No law could be scored by holding out {by}: {table['reason'].iloc[0]}")
    names = {(find_law(each) if isinstance(each, str) else each).name: each for each in laws}
    best = fit(names[table["law"].iloc[0]], df, y=y, columns=columns, objective=objective, resamples=resamples)
    return Choice(table=table, best=best, by=by)
