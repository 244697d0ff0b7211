"""How often an interval that is called 95 % holds the truth, and how wide it is: measured on simulated tables.

    python tests/experiments/coverage.py --workers 2 > coverage.md

Grids of N and D and iso-FLOP tables of a known law. Points err by .3 % of the loss; rows of a size, a run, a budget, or
of a size and of a budget share another .5 % each. One row per interval and one column per design and kind of errors:
"93 / 1.2 / 40 (96)" says that 93 % of the tables have an interval that holds the truth, that its width (median) is 1.2
times 1.96 standard deviations of the estimate's error each way, that 40 % of the tables come with the words that these
rows cannot tell it, and that of the other tables 96 % have an interval that holds the truth.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from unittest.mock import patch

import numpy as np
import pandas as pd
from simulated_tables import (
    ERRORS,
    EXPONENT,
    LOG_K,
    TRUTH,
    Cell,
    Design,
    cells,
    each_table,
    markdown,
    parser,
    quick_minima,
    run,
)

from aimscale.analysis import contrast, correlate, fit, forecast, held_out, laws
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting import problem
from aimscale.analysis.fitting.inference import estimated, intervals_of
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws import Columns
from aimscale.analysis.optimum.frontier import Frontier, parametric_frontier
from aimscale.analysis.optimum.isoflop import isoflop_frontier
from aimscale.analysis.table.groups import groups_of
from aimscale.analysis.table.runs import Runs

ACCURACY_SD, EFFECT, R_D, CORRELATION = 0.01, 0.004, 6.0, 0.6
"""True values of the other studies: an accuracy's error, a contrast, the worth of repeats, a correlation."""
CORRELATIONS = {"pearson": CORRELATION, "spearman": 6 / np.pi * np.arcsin(CORRELATION / 2)}
"""Method -> true value."""
REACH = 92, 99
"""Per cent of intervals that are to hold the truth where the page does not say that it cannot tell."""
BLIND = ("unseen", "few_groups")
"""Kinds of flags that say of a whole table that an error which its points share cannot be told."""
NEW_RUNS = 20
"""Measurements that are drawn to try each prediction interval on."""
UNSEEN = cache(Design.unseen)
FEWEST = 20
"""Tables from which on a coverage is judged."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An interval of one simulated table."""

    low: float
    high: float
    estimate: float
    truth: float
    is_told: bool
    """Whether the page says that these rows cannot tell it."""


@dataclass(kw_only=True)
class Record:
    """Intervals of many simulated tables, by the name of what they are of."""

    entries: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, low: float, high: float, estimate: float, truth: float, *, is_told: bool = False) -> None:
        """Add an interval; one without ends holds nothing, and the page shows that there is none."""
        lost = not np.isfinite([low, high]).all()
        numbers = {"low": float(low), "high": float(high), "estimate": float(estimate), "truth": float(truth)}
        self.entries[name].append(Entry(**numbers, is_told=is_told or lost))

    def shown(self) -> dict[str, str]:
        """Return interval -> "coverage / width / told (coverage where it is not told)"."""
        return {name: _shown(entries) for name, entries in self.entries.items()}

    def amiss(self) -> list[str]:
        """Name the intervals that are not told and hold the truth too rarely or too often."""
        out = []
        for name, entries in self.entries.items():
            held = [_held(e) for e in entries if not e.is_told]
            if len(held) >= FEWEST and not REACH[0] <= round(100 * np.mean(held)) <= REACH[1]:
                out.append(f"{name} {100 * np.mean(held):.0f}")
        return out


def _held(entry: Entry) -> bool:
    return entry.low <= entry.truth <= entry.high


def _shown(entries: list[Entry]) -> str:
    error = np.array([e.estimate - e.truth for e in entries])
    known = [e.high - e.low for e in entries if np.isfinite(e.high - e.low)]
    width = np.median(known) / (2 * 1.96 * np.nanstd(error)) if known else np.nan
    frank = [_held(e) for e in entries if not e.is_told]
    told = len(entries) - len(frank)
    text = f"{100 * np.mean([_held(e) for e in entries]):.0f} / {width:.2f} / {100 * told / len(entries):.0f}"
    return text + (f" ({100 * np.mean(frank):.0f})" if told and frank else "")


Study = Callable[[Cell, pd.DataFrame, np.random.Generator, Record], None]
"""Measures one table of a cell at these scales, and adds its intervals to the record."""


def law(cell: Cell, scales: pd.DataFrame, rng: np.random.Generator, record: Record) -> None:
    """Measure parameters, the law and a point at unseen scales, N*(C) by the approaches, the largest size held out."""
    df = cell.measured(scales, rng)
    result, is_blind = _fitted(cell, df, rng, record)
    test = held_out(result, df, by="N")
    row = test.predictions.sort_values(["N", "D"]).iloc[-1]
    is_lost = is_blind or bool(test.not_identified & {"alpha", "beta"})
    ends = row["pi_lo"], row["pi_hi"]
    record.add("held-out size (PI)", *ends, row["predicted"], row["measured"], is_told=is_lost)
    far = 10 * float(df["C"].max())
    optimum = _optima(lambda: parametric_frontier(result, Runs(df)), far)[1]
    record.add("approach 3: N* at 10x C", *optimum, LOG_K + EXPONENT * np.log(far), is_told=is_blind)
    if cell.design.isoflop:
        exponent, _, is_blind = _optima(lambda: isoflop_frontier(Runs(df), y="loss"), far)
        record.add("approach 2: exponent", *exponent, EXPONENT, is_told=is_blind)


def intervals(cell: Cell, scales: pd.DataFrame, rng: np.random.Generator, record: Record) -> None:
    """Measure parameters and the law at unseen scales alone, in a fiftieth of the time of `law`: by least squares of
    logarithms, which errors here are normal for, from the true exponents."""
    df, at = cell.measured(scales, rng), UNSEEN(cell.design)
    x, exponents = {v: df[v].to_numpy() for v in "ND"}, np.log([[TRUTH["alpha"], TRUTH["beta"]]])
    of = problem.make_problem(laws.CHINCHILLA.centred(Columns(x)), x, df["loss"].to_numpy(), problem.LOG_LSQ)
    with patch.object(problem, "starts", lambda of: problem._projected(of, exponents)), quick_minima():
        found = estimated(of, groups_of(df, x))
    is_blind, truths = bool(found.groups.unseen or found.groups.few), laws.CHINCHILLA.reported(TRUTH)
    values, ends = of.law.reported(found.params), intervals_of(found, ())
    for name in ("alpha", "beta", "a", "E"):
        record.add(name, ends[name].low, ends[name].high, values[name], truths[name], is_told=is_blind)
    of_law, ahead = found.law_at(at), np.log(laws.CHINCHILLA.value(at, TRUTH))
    rows = zip(("inside", "3x beyond"), *found.interval_of(of_law), found.value_of(of_law), ahead, strict=True)
    for where, low, high, value, truth in rows:
        record.add(f"law {where} (CI)", low, high, value, truth, is_told=is_blind)


def _fitted(cell: Cell, df: pd.DataFrame, rng: np.random.Generator, record: Record) -> tuple[Fit, bool]:
    """Fit the law, add its intervals, and tell whether the fit says that these rows cannot tell a shared error."""
    at = cell.design.unseen()
    result = fit(df, "chinchilla", y="loss", is_tested=False)
    is_blind = any(flag.kind in BLIND for flag in result.flags)
    for name in ("alpha", "beta", "a", "E"):
        ends, lost = result.intervals[name], name in result.not_identified
        value = laws.CHINCHILLA.reported(TRUTH)[name]
        record.add(name, ends.low, ends.high, result.params[name], value, is_told=is_blind or lost)
    ahead = laws.CHINCHILLA.value(at, TRUTH)
    new = ahead * np.exp(cell.new_sd * rng.standard_normal((NEW_RUNS, 2)))
    rows = result.predict(at).to_dict("records")
    for where, row, truth, points in zip(("inside", "3x beyond"), rows, ahead, new.T, strict=True):
        record.add(f"law {where} (CI)", row["ci_lo"], row["ci_hi"], row["value"], truth, is_told=is_blind)
        for point in points:
            record.add(f"measurement {where} (PI)", row["pi_lo"], row["pi_hi"], row["value"], point, is_told=is_blind)
    return result, is_blind


def _optima(make: Callable[[], Frontier], flops: float) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Return low, high and estimate of the exponent of N*(C), and of ln N* at a budget; NaN where it is refused; and
    whether the frontier says that these rows cannot tell an error that they share."""
    try:
        found = make()
    except AnalysisError:
        return (np.nan,) * 3, (np.nan,) * 3, True
    i, at = found.exponent_interval, found.at(flops).iloc[0]
    optimum = tuple(np.log([at["N_lo"], at["N_hi"], at["N"]]).tolist())
    return (i.low, i.high, found.exponent), optimum, any(flag.kind in BLIND for flag in found.flags)


def effects(cell: Cell, scales: pd.DataFrame, rng: np.random.Generator, record: Record) -> None:
    """Measure correlations of what shares errors as losses do, a contrast, and its worth in compute."""
    pairs = [[1.0, CORRELATION], [CORRELATION, 1.0]]
    pair = rng.multivariate_normal([0, 0], pairs, len(scales))
    for group in ERRORS[cell.errors]:
        codes = cell.design.codes(scales, group)
        pair = pair + rng.multivariate_normal([0, 0], pairs, codes.max() + 1)[codes]
    both = scales.assign(x=pair[:, 0], y=pair[:, 1])
    for found in (each for each in correlate(both, x="x", y="y") if each.partial_on is None):
        record.add(found.method, found.low, found.high, found.value, CORRELATIONS[found.method])
    plain = scales.assign(images_seen=scales["D"], params_total=scales["N"], flops_train=scales["C"], prefix="paired")
    other = plain.assign(run_id=plain["run_id"] + "n", prefix="none")
    levels = [cell.measured(plain, rng), cell.measured(other, rng)]
    logs = [each.assign(log_loss=np.log(each["loss"]) + EFFECT * (each["prefix"] == "none")) for each in levels]
    table = pd.concat(logs, ignore_index=True)
    one = contrast(table, by="prefix", measures=["log_loss"], ignore=["loss"]).contrasts[0]
    record.add("contrast", one.low, one.high, one.difference, EFFECT)


def accuracies(cell: Cell, scales: pd.DataFrame, rng: np.random.Generator, record: Record) -> None:
    """Measure forecasts of a loss and an accuracy."""
    df, places = cell.measured(scales, rng), cell.design.unseen()
    sigmoid = {"floor": 0.1, "height": 0.8, "k": 12.0, "L0": 0.5}
    accuracy = laws.LINK_SIGMOID.value({"L": df["loss"].to_numpy()}, sigmoid)
    measured = np.clip(accuracy + ACCURACY_SD * rng.standard_normal(len(df)), 0, 1)
    df["probes"] = [[{"task": "t", "kind": "linear", "top1": float(each), "chance": 0.1}] for each in measured]
    found = forecast(df, pd.DataFrame(places).to_dict("records"), y="loss")
    at, is_blind = found.table.set_index(["quantity", "at"]), any(flag.kind in BLIND for flag in found.flags)
    loss = laws.CHINCHILLA.value(places, TRUTH)
    new = loss * np.exp(cell.new_sd * rng.standard_normal(2))
    curves = {"loss": loss, "t:linear": laws.LINK_SIGMOID.value({"L": loss}, sigmoid)}
    points = {"loss": new, "t:linear": laws.LINK_SIGMOID.value({"L": new}, sigmoid)}
    points["t:linear"] = points["t:linear"] + ACCURACY_SD * rng.standard_normal(2)
    for quantity, (k, where) in itertools.product(curves, enumerate(("inside", "3x beyond"))):
        row, what = at.loc[(quantity, k)], f"forecast of {quantity} {where}"
        truths = curves[quantity][k], points[quantity][k]
        record.add(f"{what} (CI)", row["ci_lo"], row["ci_hi"], row["value"], truths[0], is_told=is_blind)
        record.add(f"{what} (PI)", row["pi_lo"], row["pi_hi"], row["value"], truths[1], is_told=is_blind)


def repeated(cell: Cell, scales: pd.DataFrame, rng: np.random.Generator, record: Record) -> None:
    """Measure R_D, from pools of a thirtieth and a sixth of the largest D beside fresh data."""
    most = float(scales["D"].max())
    pools = [scales.assign(U=u, run_id=scales["run_id"] + f"u{u:.0f}") for u in (most / 30, most / 6, most)]
    table = pd.concat(pools, ignore_index=True)
    x = {v: table[v].to_numpy() for v in ("N", "D", "U")}
    df = cell.measured(table, rng)
    df["loss"] *= laws.REPEATED.value(x, {**TRUTH, "R_D": R_D}) / laws.CHINCHILLA.value(x, TRUTH)
    found = fit(df, "repeated", y="loss")
    ends, is_told = found.intervals["R_D"], "R_D" in found.not_identified
    record.add("R_D", ends.low, ends.high, found.params["R_D"], R_D, is_told=is_told)


STUDIES: dict[str, Study] = {
    "law": law, "intervals": intervals, "effects": effects, "accuracies": accuracies, "repeats": repeated,
}  # fmt: skip


def measure(study: str, cell: Cell, num: int) -> Record:
    """Measure tables of a cell."""
    record = Record()
    for scales, rng in each_table(cell, num):
        STUDIES[study](cell, scales, rng, record)
    return record


def main() -> None:
    """Print a table of each study as Markdown, and which intervals miss what is promised."""
    options_of = parser(main.__doc__)
    options_of.add_argument(
        "--only", choices=list(STUDIES), nargs="*", default=[name for name in STUDIES if name != "intervals"]
    )
    options = options_of.parse_args()
    chosen = cells(options.design, options.errors, options.jitter)
    for study in options.only:
        done = run(measure, study, chosen, options.tables, options.workers)
        for design in options.design:
            of_design = [cell for cell in chosen if cell.name.startswith(f"{design},")]
            columns = {cell.name.removeprefix(f"{design}, "): done[cell.name].shown() for cell in of_design}
            print(f"{markdown(columns, f'{study}, {design}')}\n")
        for name, record in done.items():
            if amiss := record.amiss():
                print(f"- Not told, and outside {REACH[0]} to {REACH[1]} % in {name}: {', '.join(amiss)}")
        print(flush=True)


if __name__ == "__main__":
    main()
