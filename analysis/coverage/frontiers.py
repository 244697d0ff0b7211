"""Coverage of N*(C) and its exponent by approaches 1 and 2."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from aimscale.analysis.coverage.designs import COST, TRUTH, Design, measured
from aimscale.analysis.coverage.record import Record
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.frontier.envelope import envelope_frontier
from aimscale.analysis.frontier.isoflop import isoflop_frontier
from aimscale.analysis.frontier.optimum import Frontier, optimum_of

BEYOND = 10.0
"""N* is asked for at this many times the largest budget."""


def approach_coverage(
    make: Callable[..., Frontier], name: str, design: Design, tables: int, *, seed: int = 0, **options: object
) -> Record:
    """Exponent and N* at ten times the largest budget; tables that the approach refuses are counted, not scored."""
    rng, record, scales = np.random.default_rng(seed), Record(), design.scales()
    log_k, a = (float(v) for v in optimum_of(TRUTH, COST))
    flops = BEYOND * float(scales["C"].max())
    for trial in range(tables):
        df = measured(scales, design.errors, rng)
        try:
            found = make(df, y="loss", seed=trial, resamples=400, **options)
        except AnalysisError:
            record.judge(f"{name}: possible", False)
            continue
        record.judge(f"{name}: possible", True)
        i, at = found.exponent_interval, found.at(flops).iloc[0]
        record.add(f"{name}: exponent", i.low, i.high, found.exponent, a)
        # the interval is one of the estimate less its simulated bias, which may scatter more than the estimate itself
        record.add(f"{name}: exponent less its bias", i.low, i.high, float(np.median(found.draws[:, 1])), a)
        low, high, estimate = np.log([at["N_lo"], at["N_hi"], at["N"]])
        record.add(f"{name}: N*", low, high, estimate, log_k + a * np.log(flops))
    return record


def envelope_coverage(design: Design, tables: int, *, seed: int = 0) -> Record:
    """Approach 1."""
    return approach_coverage(envelope_frontier, "approach 1", design, tables, seed=seed)


def isoflop_coverage(design: Design, tables: int, *, seed: int = 0) -> Record:
    """Approach 2 on budgets of the table's own."""
    return approach_coverage(isoflop_frontier, "approach 2", design, tables, seed=seed)


def interpolated_coverage(design: Design, tables: int, *, seed: int = 0) -> Record:
    """Approach 2 on 50 budgets that a grid of N and D is interpolated to."""
    return approach_coverage(isoflop_frontier, "approach 2, interpolated", design, tables, seed=seed, budgets=50)
