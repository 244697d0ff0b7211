"""How often an interval that is called 95 % holds the truth, and how wide it is: measured on simulated tables.

python tests/experiments/coverage.py --tables 400 > coverage.md

Grids of N and D from a known law, with errors of ln loss of points alone, of runs or of sizes. One row per interval and
one column per design: per cent of tables whose interval holds the truth, then the median width over that of 1.96
standard deviations of the estimate each way.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from aimscale.analysis import contrast, correlate, fit, forecast, held_out, laws, repeats
from aimscale.analysis.effects.gains import Gain, gains
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.frontier.measured import envelope_frontier, isoflop_frontier
from aimscale.analysis.frontier.parametric import optimum_of, parametric_frontier
from aimscale.analysis.frontier.result import Cost, Frontier

TRUTH = {"E": 0.2, "A": 30.0, "B": 40.0, "alpha": 0.38, "beta": 0.40}
POINT_SD, GROUP_SD, ACCURACY_SD, EFFECT, R_D = 0.003, 0.005, 0.01, 0.004, 6.0
CORRELATION, GAIN = 0.6, 1.2
COST = Cost(kappa=6.0, s=0.0)
AHEAD = {"N": np.array([1e6, 3e7]), "D": np.array([1e6, 1e7])}
"""A scale inside the grid, and one three times beyond it in N and in D."""
LOG_K, EXPONENT = (float(v) for v in optimum_of(TRUTH, COST))


@dataclass(frozen=True, kw_only=True)
class Design:
    """Where and how a table is measured."""

    sizes: int
    budgets: int
    seeds: int
    errors: str
    """What points share: nothing (`independent`), the error of their `run`, or that of their `size`."""
    isoflop: bool = False
    """Named sizes about the optimum of each budget C, in place of a grid of N and D."""

    def scales(self) -> pd.DataFrame:
        """The table without its losses."""
        if self.isoflop:
            flops = np.geomspace(1e12, 3e14, self.budgets)
            nearest = np.round(np.log2(np.exp(LOG_K + EXPONENT * np.log(flops))))[:, None]
            n = (2.0 ** (nearest + np.arange(self.sizes) - (self.sizes - 1) // 2)).ravel()
            d = np.repeat(flops, self.sizes) / (6 * n)
        else:
            grid = np.meshgrid(np.geomspace(1e5, 1e7, self.sizes), np.geomspace(1e5, 3e6, self.budgets))
            n, d = (each.ravel() for each in grid)
        once = pd.DataFrame({"N": n, "D": d, "C": 6 * n * d, "size": [f"{v:.0f}" for v in n]})
        table = pd.concat([once.assign(seed=s) for s in range(self.seeds)], ignore_index=True)
        return table.assign(run_id="n" + table["size"] + "s" + table["seed"].astype(str))

    def measured(self, table: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        """The table with losses measured once."""
        total = POINT_SD * rng.standard_normal(len(table))
        if self.errors != "independent":
            codes = np.unique(table["run_id" if self.errors == "run" else "size"], return_inverse=True)[1]
            total = total + GROUP_SD * rng.standard_normal(codes.max() + 1)[codes]
        clean = laws.CHINCHILLA.value({v: table[v].to_numpy() for v in ("N", "D")}, TRUTH)
        return table.assign(loss=clean * np.exp(total))

    @property
    def new_sd(self) -> float:
        """Standard deviation of ln loss of a point of a new run and size."""
        return float(np.hypot(POINT_SD, 0.0 if self.errors == "independent" else GROUP_SD))


@dataclass
class Record:
    """Intervals of many simulated tables, by the name of what they are of."""

    entries: dict[str, list[tuple[float, ...]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, low: float, high: float, estimate: float, truth: float) -> None:
        """One interval; one without ends counts as missing the truth."""
        self.entries[name].append((float(low), float(high), float(estimate), float(truth)))

    def shown(self) -> dict[str, str]:
        """Interval -> "coverage % / width"; no width where the truth, and not the estimate, is what scatters."""
        out = {}
        for name, entries in self.entries.items():
            low, high, estimate, truth = np.array(entries).T
            held, spread = (low <= truth) & (truth <= high), 2 * 1.96 * float(np.std(estimate))
            width = f" / {np.nanmedian(high - low) / spread:.2f}" if np.ptp(truth) == 0 and spread > 0 else ""
            out[name] = f"{100 * held.mean():.0f}{width}"
        return out


Study = Callable[[Design, pd.DataFrame, np.random.Generator, Record], None]
"""Measures one table of a design with these scales, and adds its intervals to the record."""


def law(design: Design, scales: pd.DataFrame, rng: np.random.Generator, record: Record) -> None:
    """Parameters, the law and a measurement at unseen scales, N*(C) by approach 3, the largest size held out."""
    df = design.measured(scales, rng)
    result = fit("chinchilla", df, y="loss")
    for name, value in laws.CHINCHILLA.reported(TRUTH).items():
        record.add(name, result.intervals[name].low, result.intervals[name].high, result.params[name], value)
    ahead = laws.CHINCHILLA.value(AHEAD, TRUTH)
    new = ahead * np.exp(design.new_sd * rng.standard_normal(2))
    for k, where in enumerate(("inside", "3x beyond")):
        row = result.predict(AHEAD).iloc[k]
        record.add(f"law {where} (CI)", row["ci_lo"], row["ci_hi"], row["value"], ahead[k])
        record.add(f"measurement {where} (PI)", row["pi_lo"], row["pi_hi"], row["value"], new[k])
    _frontier(record, "approach 3", lambda: parametric_frontier(result, df), 1e15)
    row = held_out(result, df, by="N").predictions.sort_values("D").iloc[-1]
    record.add("held-out size (PI)", row["pi_lo"], row["pi_hi"], row["predicted"], row["measured"])


def approaches(design: Design, scales: pd.DataFrame, rng: np.random.Generator, record: Record) -> None:
    """N*(C) by approaches 1 (of a grid) and 2 (of budgets)."""
    df, far = design.measured(scales, rng), 10 * float(scales["C"].max())
    approach, make = ("approach 2", isoflop_frontier) if design.isoflop else ("approach 1", envelope_frontier)
    _frontier(record, approach, lambda: make(df, y="loss", resamples=400), far)


def _frontier(record: Record, name: str, make: Callable[[], Frontier], flops: float) -> None:
    try:
        found = make()
    except AnalysisError:
        return
    i, at = found.exponent_interval, found.at(flops).iloc[0]
    record.add(f"{name}: exponent", i.low, i.high, found.exponent, EXPONENT)
    ends = np.log([at["N_lo"], at["N_hi"], at["N"]])
    record.add(f"{name}: N* beyond", *ends, LOG_K + EXPONENT * np.log(flops))


def effects(design: Design, scales: pd.DataFrame, rng: np.random.Generator, record: Record) -> None:
    """Correlations, a contrast, and its worth in compute."""
    pairs = [[1.0, CORRELATION], [CORRELATION, 1.0]]
    pair = rng.multivariate_normal([0, 0], pairs, len(scales))
    if design.errors != "independent":
        codes = np.unique(scales["run_id" if design.errors == "run" else "size"], return_inverse=True)[1]
        pair = (pair + rng.multivariate_normal([0, 0], pairs, codes.max() + 1)[codes]) / np.sqrt(2)
    truths = {"pearson": CORRELATION, "spearman": 6 / np.pi * np.arcsin(CORRELATION / 2)}
    for found in correlate(scales.assign(x=pair[:, 0], y=pair[:, 1]), x="x", y="y"):
        name = f"{found.method}, {found.compared}"
        record.add(name, found.low, found.high, found.value, truths[found.method])
    plain = scales.assign(images_seen=scales["D"], params_total=scales["N"], flops_train=scales["C"], prefix="paired")
    other = plain.assign(run_id=plain["run_id"] + "n", prefix="none")
    levels = [design.measured(plain, rng), design.measured(other, rng)]
    logs = [each.assign(log_loss=np.log(each["loss"]) + EFFECT * (each["prefix"] == "none")) for each in levels]
    table = pd.concat(logs, ignore_index=True)
    one = contrast(table, by="prefix", measures=["log_loss"], ignore=["loss"]).contrasts[0]
    record.add("contrast", one.low, one.high, one.difference, EFFECT)
    inner = other[other["D"].between(1.01 * other["D"].min(), 0.99 * other["D"].max())]
    faster = [design.measured(plain, rng), design.measured(inner.assign(D=GAIN * inner["D"]), rng)]
    table = pd.concat(faster, ignore_index=True).drop(columns=["N", "D", "C"]).rename(columns={"loss": "val_loss"})
    for each in gains(contrast(table, by="prefix", measures=["val_loss"])):
        if isinstance(each, Gain):
            record.add("gain", *np.log([each.low, each.high, each.factor, GAIN]))


def accuracies(design: Design, scales: pd.DataFrame, rng: np.random.Generator, record: Record) -> None:
    """Forecasts of a loss and an accuracy."""
    df = design.measured(scales, rng)
    sigmoid = {"floor": 0.1, "height": 0.8, "k": 12.0, "L0": 0.5}
    accuracy = laws.LINK_SIGMOID.value({"L": df["loss"].to_numpy()}, sigmoid)
    measured = np.clip(accuracy + ACCURACY_SD * rng.standard_normal(len(df)), 0, 1)
    df["probes"] = [[{"task": "t", "kind": "linear", "top1": float(each), "chance": 0.1}] for each in measured]
    at = forecast(df, pd.DataFrame(AHEAD).to_dict("records"), y="loss").table.set_index(["quantity", "at"])
    loss = laws.CHINCHILLA.value(AHEAD, TRUTH)
    curve = laws.LINK_SIGMOID.value({"L": loss}, sigmoid)
    new = laws.LINK_SIGMOID.value({"L": loss * np.exp(design.new_sd * rng.standard_normal(2))}, sigmoid)
    new = new + ACCURACY_SD * rng.standard_normal(2)
    for k, where in enumerate(("inside", "3x beyond")):
        row, measured_loss = at.loc[("t:linear", k)], loss[k] * np.exp(design.new_sd * rng.standard_normal())
        record.add(f"accuracy forecast {where} (CI)", row["ci_lo"], row["ci_hi"], row["value"], curve[k])
        record.add(f"accuracy forecast {where} (PI)", row["pi_lo"], row["pi_hi"], row["value"], new[k])
        row = at.loc[("loss", k)]
        record.add(f"loss forecast {where} (CI)", row["ci_lo"], row["ci_hi"], row["value"], loss[k])
        record.add(f"loss forecast {where} (PI)", row["pi_lo"], row["pi_hi"], row["value"], measured_loss)


def repeated(design: Design, scales: pd.DataFrame, rng: np.random.Generator, record: Record) -> None:
    """R_D, from pools of a thirtieth and a sixth of the largest D beside fresh data."""
    most = float(scales["D"].max())
    pools = [scales.assign(U=u, run_id=scales["run_id"] + f"u{u:.0f}") for u in (most / 30, most / 6, most)]
    table = pd.concat(pools, ignore_index=True)
    x = {v: table[v].to_numpy() for v in ("N", "D", "U")}
    df = design.measured(table, rng)
    df["loss"] *= laws.REPEATED.value(x, {**TRUTH, "R_D": R_D}) / laws.CHINCHILLA.value(x, TRUTH)
    found = repeats(df.rename(columns={"U": "unique_images", "D": "images_seen"}), y="loss").fit
    record.add("R_D", found.intervals["R_D"].low, found.intervals["R_D"].high, found.params["R_D"], R_D)


STUDIES: dict[str, Study] = {
    "law": law,
    "approaches": approaches,
    "effects": effects,
    "accuracies": accuracies,
    "repeats": repeated,
}


def main() -> None:
    """Print a table of each study as Markdown."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", type=int, default=400, help="simulated tables per design")
    parser.add_argument("--only", choices=list(STUDIES), nargs="*", default=list(STUDIES))
    options = parser.parse_args()
    kinds = [(1, "independent"), (1, "run"), (3, "independent"), (3, "run"), (3, "size")]
    for name in options.only:
        columns = {}
        for sizes, budgets in ((5, 4), (7, 5)):
            for seeds, errors in kinds:
                for isoflop in (False, True) if name == "approaches" else (False,):
                    design = Design(sizes=sizes, budgets=budgets, seeds=seeds, errors=errors, isoflop=isoflop)
                    rng, record = np.random.default_rng(0), Record()
                    for _ in range(options.tables):
                        STUDIES[name](design, design.scales(), rng, record)
                    columns.setdefault(f"{sizes} x {budgets}, {seeds} seed, {errors}", {}).update(record.shown())
        table = pd.DataFrame(columns).fillna("").rename_axis("interval").reset_index()
        rows = [list(map(str, table.columns)), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
        print("\n".join(f"| {' | '.join(row)} |" for row in rows), "\n", flush=True)


if __name__ == "__main__":
    main()
