"""Effective data transferred: how much data a warm start is worth (Hernandez et al. 2021, arXiv 2102.01293).

Where a warm run has the loss that runs from scratch have after D_E = D_F + D_T samples, D_T is the data that its start
is worth. Losses of both kinds follow one law, which counts the data that were transferred as well:

    L = E + A N^-alpha + B (D + D_T)^-beta,    D_T = k D^a N^b of warm runs (their equation 1.1), 0 from scratch

so all errors of k, a and b are the core's. Whether anything is transferred is asked of another law before, by which a
warm run's data count so many times as much: it has no bound at "nothing", so an interval tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, Result, flag_words, human
from aimscale.analysis.effects.result import baseline_of, level_names
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import CONFIDENCE, current_level, level_words
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws import (
    CHINCHILLA,
    Array,
    Columns,
    Law,
    Parameter,
    Params,
    Terms,
    coefficient,
    exponent,
    power,
)
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.runs import Runs, Table
from aimscale.analysis.table.schema import varies
from aimscale.analysis.table.select import main_part

BEYOND = 10.0
"""Factor beyond the largest D from scratch up to which amounts of data are told."""
STEPS = 80
"""Amounts of data at which the law from scratch is compared with a warm loss."""
MIN_POOLS = 3
"""Different numbers of unique images from which D_F counts these, and not images seen."""


def _terms(x: Columns, t: Params) -> Terms:
    log_d, slope = x.log("D"), np.zeros(1)
    if "a" in t:
        slope = t["a"] * (log_d - np.log(t["D0"]))
    if "b" in t:
        slope = slope + t["b"] * (x.log("N") - np.log(t["N0"]))
    if "times" in t:
        log_data = log_d + (x["G"] - 1.0) * (np.log(t["times"]) + slope)
    else:
        log_data = log_d + np.log(1.0 + (x["G"] - 1.0) * t["T"] * np.exp(slope) / x["D"])
    size = [np.exp(-t["alpha"] * x.log("N"))] if "b" in t else []
    return 1.0, *size, np.exp(-t["beta"] * log_data)


def _report(p: Params) -> dict[str, Array]:
    shown = {name: value for name, value in p.items() if name not in ("T", "N0", "D0")}
    return {**shown, "k": p["T"] * p["D0"] ** -p["a"] * (p["N0"] ** -p["b"] if "b" in p else 1.0)}


def _transferred(x: Columns) -> tuple[float, float]:
    """Bound the data transferred at the middle of the table."""
    return 1e-4 * float(x["D"].min()), BEYOND * float(x["D"].max())


def _laws(*, sizes: bool) -> tuple[Law, Law]:
    """Make the law of the factor on warm data, and that of the data transferred; without sizes, for a table of one,
    whose few rows tell one factor alone."""
    size_term, times_term, data_term = "A N^-alpha + " * sizes, " D^a N^b" * sizes, f"D^a{' N^b' * sizes}"
    exponents = [Parameter(name=name, bounds=(-2.0, 2.0)) for name in ("a", "b")[: 1 + sizes]]
    laws = []
    for name, bounds, data in (
        ("times", (1e-3, 1e4), f"(M D)^-beta, M = times{times_term}"),
        ("T", _transferred, f"(D + D_T)^-beta, D_T = k {data_term}"),
    ):
        laws += [
            Law(
                name=f"transfer_{name}",
                formula=f"L = E + {size_term}B {data} of warm runs",
                variables=(*["N"] * sizes, "D", "G"),
                linear=tuple(coefficient(each) for each in ("E", *"A" * sizes, "B")),
                nonlinear=(
                    *[exponent("alpha")] * sizes,
                    exponent("beta"),
                    Parameter(name=name, bounds=bounds, log=True),
                    *(exponents if sizes or name == "T" else []),
                ),
                basis=_terms,
                report=_report if name == "T" else None,
                constants={"D0": 1.0, **({"N0": 1.0} if sizes else {})},
                scales={"k": "log"},
                source="Hernandez et al. 2021, equation 1.1, on Chinchilla's law; G is 1 from scratch, 2 of warm runs",
            )
        ]
    return laws[0], laws[1]


@dataclass(frozen=True, kw_only=True, repr=False)
class Transfer(Result):
    """Data that a warm start is worth, by size and amount of data."""

    by: str
    baseline: str
    level: str
    data: str
    """What D_F counts: `images_seen`, or `unique_images` at the best number of passes."""
    times: tuple[float, float, float]
    """Factor by which a warm start multiplies data, over all rows, with its interval."""
    is_told: bool
    """Whether a warm start is worth any data: the 95 % interval of `times` lies above 1."""
    law: Fit | None = field(repr=False)
    """Law of the data transferred, D_T = k D_F^a N^b, with that of the losses; None where the rows do not tell it."""
    scratch: Fit = field(repr=False)
    """Law of the runs from scratch alone, inverted at each warm loss."""
    table: pd.DataFrame
    """A row per size and amount of data: size, N, D_F, loss, scratch_loss (of the law), D_E, D_T, D_T_lo, D_T_hi, and
    kind: `told`; `at least` or `at most` where D_E lies outside of the data from scratch, so that one end alone is a
    number. D_T_hi is NaN where it lies beyond `BEYOND` times these."""
    flags: tuple[Flag, ...]
    """Cautions, those of the law from scratch among them."""

    @property
    def words(self) -> str:
        """What D_F counts."""
        passes = "different images, each number at its best passes over them"
        return passes if self.data == "unique_images" else "images seen, repeats included"

    def headline(self) -> str:
        """Say what a warm start is worth."""
        interval = f"{_number(self.times[0])} [{_number(self.times[1])}, {_number(self.times[2])}]"
        if not self.is_told:
            worth = "costs data" if self.times[2] < 1 else "is not known to be worth data"
            return f"{self.level} {worth}: those of a warm run count {interval} times"
        if (self.table["kind"] == "at least").any():
            interval = f"at least {_number(self.times[1])}"
        return f"{self.level} multiplies data by {interval} on average over these rows, against {self.baseline}"

    sentence = headline

    def facts(self) -> list[tuple[str, str]]:
        """List cautions, what a start is worth, its law, and what D_F counts."""
        facts = [*(("caution", text) for text in flag_words(self.flags)), ("worth", self.headline())]
        if self.law is not None:
            names = [name for name in "kab" if name in self.law.params]
            what = ", ".join(f"{name} = {self.law.shown(name, 3)}" for name in names)
            if unknown := [name for name in names[1:] if name in self.law.not_identified]:
                what = f"{' and '.join(unknown)} not identified; more sizes and amounts of data tell them"
            facts += [("law", f"D_T = k D_F^a{' N^b' * ('b' in names)}: {what}")]
        facts += [("D_F", f"counts {self.words}"), ("from scratch", self.scratch.law.formula)]
        (low, high), level = map(human, self.scratch.ranges["D"]), level_words(current_level())
        facts += [("range", f"runs from scratch have D of {low} to {high}; {human(BEYOND)} times are told")]
        return [*facts, ("intervals", f"{level}, {self.scratch.interval_method}; each D_T with the noise of one run")]

    def cells(self) -> list[dict[str, str]]:
        """Write a row per size and amount of data."""
        return [
            {
                "size": str(row["size"]),
                "D_F": human(row["D_F"]),
                "loss": f"{row['loss']:.4f}",
                "from scratch": f"{row['scratch_loss']:.4f}" if np.isfinite(row["scratch_loss"]) else "",
                "D_T": human(row["D_T"]) if row["kind"] == "told" else f"{row['kind']} {human(_end(row))}",
                "interval": _interval(row) if row["kind"] == "told" else "",
            }
            for row in self.table.to_dict("records")
        ]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _interval(row: Mapping[Any, Any]) -> str:
    """Write the interval of a D_T, whose upper end is no number beyond `BEYOND` times the data from scratch."""
    high = human(row["D_T_hi"]) if np.isfinite(row["D_T_hi"]) else "more than is told"
    return f"[{human(row['D_T_lo'])}, {high}]"


def _end(row: Mapping[Any, Any]) -> float:
    """Return the end that is known of a D_T."""
    return float(row["D_T_lo" if row["kind"] == "at least" else "D_T_hi"])


def transfer(
    table: Table,
    *,
    by: str = "init",
    baseline: str | None = None,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
) -> tuple[Transfer, ...]:
    """Tell how much data each warm start is worth, in samples of the runs from scratch.

    Args:
        by: column of the start.
        baseline: level of runs from scratch; None takes `scratch`, else the level with most rows.
        y: column of the loss.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Returns:
        A result per level, with the law of the data transferred where the rows tell one.

    Raises:
        AnalysisError: no such column, one level alone, too few rows from scratch for their law.

    Example:
        >>> transfer(read_table("two.csv"), by="recipe", baseline="old")[0].table
    """
    runs = Runs(table, columns)
    by, y = runs.column(by), runs.column(y)
    if by not in runs:
        raise runs.no_column(by)
    part, chosen = main_part(runs.with_size(), free=[by])
    levels = level_names(part[by].astype(object))
    counts = levels.value_counts()
    if len(counts) < 2:
        raise AnalysisError(
            f"Nothing is transferred: {by} = {', '.join(counts.index)} alone has rows; add runs from scratch."
        )
    base = baseline_of(by, baseline, counts)
    others = [level for level in counts.index if level != base]
    return tuple(_transfer(part, levels, by, base, level, y, chosen) for level in sorted(others))


def _transfer(runs: Runs, levels: pd.Series, by: str, base: str, level: str, y: str, chosen: str) -> Transfer:
    names = {"N": runs.column("N"), "D": runs.column("D"), "y": y}
    points = usable_rows(runs[levels.isin([base, level])], names, best_by="y")
    named = points.rows["size"] if "size" in points.rows else points.numbers["N"].map(human)
    rows = points.numbers.assign(size=named, G=1.0 + (levels[points.index] == level))
    data, column = "images_seen", runs.column("U")
    if column in runs and rows.assign(U=points.rows[column])[rows["G"] == 2]["U"].nunique() >= MIN_POOLS:
        rows, data = _best_passes(rows.assign(U=points.rows[column])), "unique_images"
    cold, warm = rows[rows["G"] == 1], rows[rows["G"] == 2]
    of_times, of_data = _laws(sizes=varies(rows["N"]))
    scratch = fit(cold[["N", "D", "y"]], CHINCHILLA if varies(rows["N"]) else power("D"), y="y")
    flags = [*scratch.flags]
    if chosen:
        flags += [Flag(kind="part", text=f"Of several experiments the one with most cells is taken: {chosen}.")]
    both = rows[["N", "D", "G", "y"]]
    law, more = None, fit(both, of_times, y="y", is_tested=False)
    times = _mean_times(more, warm)
    is_told = _mean_times(more, warm, CONFIDENCE)[1] > 1
    table = _inverted(scratch, warm)
    unknown, below = (int((table["kind"] == kind).sum()) for kind in ("at least", "at most"))
    if below:
        text = f"{below} of {len(table)} warm losses are those of fewer data than any run from scratch has"
        flags += [Flag(kind="below", number=below, text=f"{text}, so D_T is less than the difference.")]
    if unknown:
        text = f"{unknown} of {len(table)} warm losses lie beyond {human(BEYOND)} times the data from scratch"
        text += ", so the law of D_T is not told; train longer from scratch"
        flags += [Flag(kind="beyond", number=unknown, text=f"{text}, or fewer images from {level}.")]
    elif is_told:
        law = fit(both, of_data, y="y")
    return Transfer(
        by=by,
        baseline=base,
        level=level,
        data=data,
        times=times,
        is_told=is_told,
        law=law,
        scratch=scratch,
        table=table,
        flags=tuple(flags),
    )


def _mean_times(result: Fit, warm: pd.DataFrame, level: float | None = None) -> tuple[float, float, float]:
    """Return the geometric mean over warm rows of the factor on their data, with its interval."""
    names = {name: v for name, v in (("a", "D"), ("b", "N")) if name in result.law.names}
    centres = {name: float(np.log(warm[v] / result.law.constants[f"{v}0"]).mean()) for name, v in names.items()}

    def mean(p: Params) -> Array:
        return np.log(p["times"]) + sum(p[name] * centre for name, centre in centres.items())

    (low,), (high,) = result.estimate.interval_of(mean, level)
    value, low, high = np.exp([result.estimate.value_of(mean)[0], low, high]).tolist()
    return value, low, high


def _best_passes(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the lowest loss of each size, number of different images and start, and take that number for D."""
    best = rows.loc[rows.groupby(["N", "U", "G"])["y"].idxmin()]
    return best.assign(D=best["U"])


def _inverted(scratch: Fit, warm: pd.DataFrame) -> pd.DataFrame:
    """Find the data from scratch that give each warm loss: those whose prediction interval of one run holds it."""
    rows, (low, high) = [], scratch.ranges["D"]
    grid = np.geomspace(min(low, float(warm["D"].min())) / BEYOND, BEYOND * high, STEPS)
    losses = np.log(warm["y"]).groupby([warm[name] for name in ("N", "D", "size")]).mean().map(np.exp)
    for n, d, size, loss in losses.reset_index().itertuples(index=False):
        at = scratch.predict({"N": np.full(STEPS, n), "D": grid})
        least, equal, most = (_first_below(grid, at[name].to_numpy(), loss) for name in ("pi_lo", "value", "pi_hi"))
        # NaN is neither
        kind = "told" if equal >= low else "at most" if equal < low else "at least"
        ends = (
            (0.0 if least <= grid[0] else np.fmin(least, grid[-1])),
            (np.fmax(most, low) if kind == "at most" else most),
        )
        row = {"size": size, "N": n, "D_F": d, "loss": loss}
        row["scratch_loss"] = float(np.interp(np.log(d), np.log(grid), at["value"])) if low <= d <= high else np.nan
        row["D_E"] = equal if kind == "told" else np.nan
        shown = {"D_T": row["D_E"], "D_T_lo": np.nan if kind == "at most" else ends[0], "D_T_hi": ends[1]}
        rows.append({**row, **{name: value - d for name, value in shown.items()}, "kind": kind})
    return pd.DataFrame(rows)


def _first_below(grid: Array, curve: Array, loss: float) -> float:
    """Find where a falling curve (m,) over a grid (m,) reaches a loss; NaN where it stays above."""
    below = np.flatnonzero(curve <= loss)
    if not len(below):
        return float("nan")
    i = max(int(below[0]), 1)
    return float(np.exp(np.interp(-loss, -curve[i - 1 : i + 1], np.log(grid[i - 1 : i + 1]))))
