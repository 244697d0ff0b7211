"""Which runs to buy next: those that leave the forecast of a target the least variance for their price.

A measurement is law + departure + noise: the law linear in its parameters around its fit, the departure a smooth field
over the logarithms of the law's variables (no law is exact, and it errs alike at scales that lie close together). What
a run is worth depends on what is bought beside it, so they are chosen one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from aimscale.analysis.display import Flag, Result, beyond_words, flag_words, human, percent, power_of_ten, scale_words
from aimscale.analysis.distributions import chi2_quantile
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.forecasts.candidates import AUTO
from aimscale.analysis.forecasts.forecast import record_words
from aimscale.analysis.forecasts.forecaster import TERMS, Forecaster, forecaster
from aimscale.analysis.laws import Array, Columns, Law
from aimscale.analysis.table.runs import Runs, Table
from aimscale.analysis.table.select import mixture_flags

PRIOR_SD = 1.0
"""Prior standard deviation of every parameter on its own scale: factor e for coefficients and exponents."""
DEPARTURE_SD, DEPARTURE_TO_NOISE = 0.01, 2.5
"""Standard deviation of the departure in log loss, what good laws miss by a decade beyond their data; or this multiple
of the noise, where that is more."""
DEPARTURE_RANGE = 2.5
"""Length scale of the departure in each logarithm: a factor of 12."""
PRICE_POWERS = (0.0, 0.5, 1.0)
"""Powers of the price that gains are divided by in turn: 1 buys the cheapest runs, 0 one dear run."""
SAME_RUN = 0.03
"""Runs whose N and D both differ by less than this fraction count as one."""
ENOUGH = 1.02
"""Runs are chosen up to this factor of the standard deviation that all of the budget would leave; the cheapest way to
it counts."""
WORTHWHILE = 0.9
"""Runs that leave more than this share of the forecast's standard deviation are hardly worth buying."""
MANY_VALUES = 15
"""More sizes or budgets than this are no grid, and are offered as so many in equal factors."""


Places = pd.DataFrame | Mapping[str, Array]
"""Variables of a law by name, one value a place."""


def buy(law: Fit, candidates: Places, prices: Array, target: Places, *, budget: float) -> tuple[Array, float]:
    """Choose candidates (num,) of given prices (num,) that leave the forecast at the target the least variance.

    Returns:
        Positions among the candidates, in the order of choice, and the share of the forecast's standard deviation (root
        mean square over targets) that is left once they are measured.
    """
    if not np.any(prices <= budget):
        cheapest = human(prices.min())
        raise AnalysisError(f"The cheapest candidate costs {cheapest}, more than the budget of {human(budget)}.")
    errors = law.estimate.components
    noise = max(
        1e-4, errors.total * float(np.sqrt(errors.degrees / chi2_quantile(0.1, errors.degrees)))
    )  # 90 % upper end
    joint = _posterior(law, candidates, target, noise)
    baskets = [_fill(joint, prices, budget, noise, power) for power in PRICE_POWERS]
    enough = ENOUGH * min(shares[-1] for _, shares in baskets)
    parts = [(rows[: int((shares > enough).sum()) + 1], shares) for rows, shares in baskets if shares[-1] <= enough]
    rows, shares = min(parts, key=lambda part: prices[part[0]].sum())
    return rows, float(shares[len(rows) - 1])


def _fill(joint: Array, prices: Array, budget: float, noise: float, power: float) -> tuple[Array, Array]:
    """Buy one run after another: the affordable one with the largest gain / price^power.

    joint is the covariance (candidates + targets, candidates + targets) before any is measured.

    Returns:
        Positions, and the share of the targets' standard deviation that is left after each of them.
    """
    n, rows, covariance, left_over = len(prices), list[int](), joint.copy(), list[float]()
    while (affordable := (prices <= budget) & ~np.isin(np.arange(n), rows)).any():
        gain = np.sum(covariance[:n, n:] ** 2, axis=1) / (np.diag(covariance)[:n] + noise**2)
        best = int(np.argmax(np.where(affordable, gain / prices**power, -np.inf)))
        covariance -= np.outer(covariance[best], covariance[best]) / (covariance[best, best] + noise**2)
        budget -= prices[best]
        rows.append(best)
        left_over.append(np.trace(covariance[n:, n:]))
    return np.array(rows), np.sqrt(np.maximum(left_over, 0.0) / np.trace(joint[n:, n:]))


def _posterior(law: Fit, candidates: Places, target: Places, noise: float) -> Array:
    """Return the covariance of the log losses at candidates and targets, given the points that were fitted."""
    parts, estimate = [law.variables(each) for each in (law.data, candidates, target)], law.estimate
    x = Columns({v: np.concatenate([each[v] for each in parts]) for v in law.law.variables})
    scales = np.array([1.0 if p.log else abs(v) for p, v in zip(law.law.parameters, estimate.vector, strict=True)])
    slopes = estimate.gradient(lambda params: np.log(np.maximum(law.law.value(x, params), 1e-300)))
    slopes = slopes * scales[estimate.problem.movable]
    places = np.stack([np.log(x[v]) for v in law.law.variables], axis=1) / DEPARTURE_RANGE
    departure = max(DEPARTURE_SD, DEPARTURE_TO_NOISE * noise)
    joint = PRIOR_SD**2 * slopes @ slopes.T + departure**2 * np.exp(-0.5 * cdist(places, places, "sqeuclidean"))
    m = len(law.data)
    return joint[m:, m:] - joint[m:, :m] @ np.linalg.solve(joint[:m, :m] + noise**2 * np.eye(m), joint[:m, m:])


@dataclass(frozen=True, kw_only=True, repr=False)
class Proposal(Result):
    """Runs to buy next."""

    table: pd.DataFrame
    """One row per run, in the order of choice: the offer's columns (N, D, price...), the law's other variables, D/N."""
    law: Fit
    """Law that the worth of runs is computed with."""
    target: dict[str, float]
    """Variable -> value at the scale to forecast."""
    forecast: float
    """Value expected there now, by all laws together."""
    interval: tuple[float, float]
    """Interval of one measurement there."""
    rivals: tuple[float, float]
    """Lowest and highest of the laws there."""
    distance: float
    """Factor by which the target lies beyond the table."""
    budget: float
    unit: str
    """Unit of prices and budget."""
    sd_before: float
    """Standard deviation of the log forecast now, but for the noise of the run itself."""
    sd_after: float
    """The same once the runs are measured."""
    flags: tuple[Flag, ...] = ()
    """Cautions before buying, the law's own flags included."""

    @property
    def price(self) -> float:
        """Price of all runs together."""
        return float(self.table["price"].sum())

    def facts(self) -> list[tuple[str, str]]:
        """List flags, what the runs cost and are worth, the forecast and how such fared, the law."""
        before, after = map(percent, (self.sd_before, self.sd_after))
        low, high, least, most = (human(v, 4) for v in (*self.interval, *self.rivals))
        return [
            *(("caution", each) for each in flag_words(self.flags)),
            ("target", f"{scale_words(self.target)}, {beyond_words(self.distance)}"),
            ("runs", f"{len(self.table)}, for {human(self.price)} of {human(self.budget)} {self.unit}"),
            ("standard deviation", f"{before} of the forecast now, {after} with these runs"),
            ("forecast now", f"{human(self.forecast, 4)} [{low}, {high}], single laws {least} to {most}"),
            *(("record", words) for words in record_words(self.distance)),
            ("worth by", f"{self.law.law.formula} on {self.law.num_points} points"),
        ]

    def cells(self) -> list[dict[str, str]]:
        """Write one row per run, in the order of choice; U only where a run repeats its data."""
        runs = self.table
        names = [name for name in ("size", "N", "D", "U", "C", "price", "D/N") if name in runs]
        names = [name for name in names if name != "U" or (runs["U"] < runs["D"]).any()]
        forms: dict[str, Callable[[Any], str]] = {"size": str, "C": partial(power_of_ten, digits=3)}
        heads = {"C": "C (FLOP)", "price": self.unit}
        cells = {heads.get(name, name): map(forms.get(name, human), runs[name]) for name in names}
        return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]


def next_runs(
    table: Table,
    target: Mapping[str, float],
    offer: pd.DataFrame,
    *,
    budget: float,
    unit: str = "GPU-hours",
    law: Forecaster | Sequence[Law | str] | str = AUTO,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
) -> Proposal:
    """Choose the runs on offer that leave the forecast at the target the least variance for the budget.

    Args:
        target: N, D (and U where the law has it) of the run to forecast.
        offer: candidates, with N, D, price and whatever names them; U where the law has it, else D.
        budget: what may be spent, in units of the prices.
        unit: its name.
        law: laws to forecast by, as `forecaster` takes them; the worth of runs is by the best of them.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Returns:
        The runs in the order of choice, and the forecast's spread before and after.

    Raises:
        AnalysisError: a wrong target, nothing that is affordable, or no law that can be fitted.

    Example:
        >>> table = read_table("results.parquet")
        >>> offer = pd.DataFrame({"N": [3e5, 6e5], "D": [5e5, 3e5], "price": [1.0, 2.0]})
        >>> next_runs(table, {"N": 1e6, "D": 1e6}, offer, budget=3).table
    """
    runs = Runs(table, columns).with_compute()
    laws = law if isinstance(law, Forecaster) else forecaster(runs, law=law, y=y)
    worth_law, place = _worth_by(laws, runs, y), laws.place
    named = {v: offer[v].to_numpy(float) for v in ("N", "D", "U", "C") if v in offer}
    offer = offer.reset_index(drop=True).assign(**place(named))
    rows, share = buy(worth_law, offer, offer["price"].to_numpy(float), place(target), budget=budget)
    ahead = laws.predict(target).iloc[0]
    before = float(np.linalg.norm(ahead[[*TERMS[1:]]]))
    text = "These runs hardly narrow the forecast; more GPU-hours buy larger ones, nearer to the target."
    little = [Flag(kind="buys_little", text=text)] * (share > WORTHWHILE)
    return Proposal(
        table=offer.loc[rows].reset_index(drop=True).assign(**{"D/N": lambda runs: runs["D"] / runs["N"]}),
        law=worth_law,
        target={k: float(v) for k, v in target.items()},
        forecast=ahead["value"],
        interval=(ahead["pi_lo"], ahead["pi_hi"]),
        rivals=(ahead["rival_lo"], ahead["rival_hi"]),
        distance=ahead["distance"],
        budget=budget,
        unit=unit,
        sd_before=before,
        sd_after=before * share,
        flags=(*little, *mixture_flags(runs, worth_law.law.variables), *worth_law.flags),
    )


def _worth_by(laws: Forecaster, runs: Runs, y: str) -> Fit:
    """Fit the law that the worth of runs is computed with: the heaviest one that no test rejects, where the best of
    them is rejected."""
    first = fit(runs, laws.law, y=y)
    others = (fit(runs, law, y=y) for name in laws.weights.index for law in laws.laws if law.name == name)
    return next((each for each in others if not each.is_rejected), first) if first.is_rejected else first


def grid_offer(df: pd.DataFrame, target: Mapping[str, float], *, steps: int = 4) -> pd.DataFrame:
    """Offer every combination of N and D that is not in a table and smaller than a target in N D.

    The values are the table's own, and `steps` between its largest and the target's, in equal factors.
    """
    if lost := [v for v in ("N", "D") if v not in target]:
        raise AnalysisError(f"The target needs {' and '.join(lost)}, as in {','.join(f'{v}=1e9' for v in lost)}.")
    axes = {v: np.unique(df[v].to_numpy(float)) for v in ("N", "D")}
    for v, values in axes.items():
        kept = values if len(values) <= MANY_VALUES else np.geomspace(values[0], values[-1], MANY_VALUES)
        beyond = np.geomspace(values[-1], target[v], steps + 2)[1:-1]
        axes[v] = np.append(kept, beyond[beyond > values[-1]])
    offer = pd.MultiIndex.from_product([*axes.values()], names=[*axes]).to_frame(index=False)
    offer = offer[offer["N"] * offer["D"] < 0.999 * target["N"] * target["D"]]
    near = [np.isclose(offer[v].to_numpy(float)[:, None], df[v].to_numpy(float), rtol=SAME_RUN) for v in axes]
    new = offer[~(near[0] & near[1]).any(axis=1)].reset_index(drop=True)
    if new.empty:
        raise AnalysisError(
            f"No run smaller than {scale_words(target)} is left to buy: every size is measured at every budget."
        )
    return new
