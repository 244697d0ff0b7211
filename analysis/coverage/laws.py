"""Coverage of a fit's intervals: parameters, the law and a measurement at unseen scales, N*(C) by approach 3."""

from __future__ import annotations

import numpy as np

from aimscale.analysis.coverage.designs import COST, POINT_SD, TRUTH, Design, measured, shared_sd
from aimscale.analysis.coverage.record import Record
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.heldout import held_out
from aimscale.analysis.frontier.optimum import optimum_of, parametric_frontier
from aimscale.analysis.laws.catalogue import CHINCHILLA

AHEAD = {"N": np.array([1e6, 3e7]), "D": np.array([1e6, 1e7])}
"""A scale inside the grid, and one three times beyond it in N and in D."""
BUDGET = 1e15
"""FLOPs at which N* is asked for: five times beyond the grid's largest."""


def fit_coverage(design: Design, tables: int, *, seed: int = 0, resamples: int = 500, **options: object) -> Record:
    """Intervals of `fit`, of its predictions, of approach 3 and of `held_out`, over simulated tables.

    Args:
        options: more options of `fit`, such as `intervals="bootstrap"`.
    """
    rng, record, scales = np.random.default_rng(seed), Record(), design.scales()
    known = {name: float(v) for name, v in CHINCHILLA.reported(TRUTH).items()}
    ahead = CHINCHILLA.value(AHEAD, TRUTH)
    log_k, a = (float(v) for v in optimum_of(TRUTH, COST))
    new_sd = np.hypot(POINT_SD, shared_sd(design.errors))
    for trial in range(tables):
        df = measured(scales, design.errors, rng)
        result = fit(CHINCHILLA, df, y="loss", resamples=resamples, seed=trial, **options)  # type: ignore[arg-type]
        for name, value in known.items():
            i = result.intervals[name]
            record.add(name, i.low, i.high, result.params[name], value)
        record.judge("alpha, beta and a identified", not {"alpha", "beta", "a"} & result.not_identified)
        rows = result.predict(AHEAD)
        new = ahead * np.exp(new_sd * rng.standard_normal(2))
        for k, where in enumerate(("inside", "3x beyond")):
            row = rows.iloc[k]
            record.add(f"law {where} (CI)", row["ci_lo"], row["ci_hi"], row["value"], ahead[k])
            record.add(f"measurement {where} (PI)", row["pi_lo"], row["pi_hi"], row["value"], new[k])
        try:
            line = parametric_frontier(result, df).at(BUDGET).iloc[0]
            best = np.exp(log_k + a * np.log(BUDGET))
            record.add("N* by approach 3", *np.log([line["N_lo"], line["N_hi"], line["N"], best]))
        except AnalysisError:
            record.add("N* by approach 3", np.nan, np.nan, np.nan, np.nan)
    return record


def held_out_coverage(design: Design, tables: int, *, seed: int = 0, resamples: int = 300) -> Record:
    """Prediction intervals of `held_out`: the largest size, forecast from the smaller ones; the largest point of it."""
    rng, record, scales = np.random.default_rng(seed), Record(), design.scales()
    for _ in range(tables):
        df = measured(scales, design.errors, rng)
        test = held_out(fit(CHINCHILLA, df, y="loss", resamples=0), df, by="N", resamples=resamples)
        row = test.predictions.sort_values("D").iloc[-1]
        record.add("held-out size (PI)", row["pi_lo"], row["pi_hi"], row["predicted"], row["measured"])
    return record


def verdict_coverage(tables: int, *, seed: int = 0, resamples: int = 500) -> Record:
    """Verdicts on designs that cannot tell exponents: D in a fixed proportion to N, and a loss that N hardly moves."""
    rng, record = np.random.default_rng(seed), Record()
    grid = Design(sizes=7, budgets=5, seeds=1, errors="independent").scales()
    grid = grid.drop(columns="C")
    tied = grid.assign(D=20 * grid["N"] * np.exp(0.02 * rng.standard_normal(len(grid))))
    for trial in range(tables):
        for name, scales in (("fixed D/N", tied), ("flat", grid)):
            df = measured(scales, "independent", rng)
            if name == "flat":
                df["loss"] = 1.0 + 0.003 * rng.standard_normal(len(df))
            result = fit(CHINCHILLA, df, y="loss", resamples=resamples, seed=trial)
            record.judge(f"{name}: alpha or beta not identified", bool({"alpha", "beta"} & result.not_identified))
    return record
