"""The board: public tables cut at a fraction of their compute, forecast from what is left, and scored on the rest.

`python tests/experiments/board.py tests/board MY_TABLES --to docs/board.csv` takes minutes; the site's build shows
it. `--record FILE` also writes the record by distance that forecasts are told with (`analysis/forecasts/record.csv`).

A table is a CSV with columns N, D, C and loss under three lines of provenance (`# source:`, `# licence:`, `# rows:`).
`# family:` names tables that share runs: what is calibrated on the others leaves the whole family out. `# columns:`
says which columns are accuracies, as `--columns` does. `during/` beside a table may hold a file of its name with points
during training and the compute of their run (`C_run`): whether they forecast better than budgets alone is judged.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.stats import t as student

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import CONFIDENCE
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.forecasts.candidates import JOINT, Cache
from aimscale.analysis.forecasts.forecaster import (
    DOF,
    LOSSES,
    TERMS,
    Calibration,
    Forecaster,
    accuracy_forecaster,
    forecaster,
)
from aimscale.analysis.laws import Array
from aimscale.analysis.table.columns import parse_columns
from aimscale.analysis.table.read import read_table
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.select import probe_frame

CUTS = (3.0, 10.0, 30.0, 100.0)
"""Tables are cut at their largest compute over these."""
MIN_ROWS, MIN_SIZES, MIN_RANGE = 12, 4, 8.0
"""Rows, sizes and factor in compute that must be left below a cut."""
STACK, STRAIGHT = "stack", "straight line"
CHOSEN, CHOSEN_ON_ALL = "single law, chosen below the cut", "single law, chosen on all runs"
"""The law that `fit --law auto` takes of the runs that are left, or would take with the help of those to forecast."""
WITH_POINTS = "stack, points during training too"
BINS = (1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
"""Distances, in factors beyond the table, between which forecasts are counted together."""
LOSS = "val_loss"


@dataclass(frozen=True, kw_only=True)
class BoardTable:
    """A table of the board."""

    name: str
    family: str
    source: str
    licence: str
    rows: str
    """What was kept and how it was derived."""
    frame: pd.DataFrame
    during: pd.DataFrame
    """Points during training of the same runs, if there are any."""


def read_board(folders: Sequence[Path]) -> list[BoardTable]:
    """All tables of folders, by name.

    Raises:
        AnalysisError: a folder holds none, or a table lacks its provenance or a column.
    """
    found: list[BoardTable] = []
    for path in folders:
        files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
        if not files:
            raise AnalysisError(f"{path} holds no CSV; give a folder of tables such as tests/board.")
        found += map(_board_table, files)
    return found


def _board_table(path: Path) -> BoardTable:
    frame = read_table(path, {"L": "loss"}).frame  # says it where there is no such file
    notes: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        if not line.startswith("# "):
            break
        key, _, value = line[2:].partition(": ")
        notes[key] = value.strip()
    if lost := [key for key in ("source", "licence", "rows") if not notes.get(key)]:
        raise AnalysisError(f"{path} does not say its {lost[0]}; begin it with a line '# {lost[0]}: ...'.")
    if "columns" in notes:
        frame = read_table(path, {"L": "loss", **parse_columns([notes["columns"]])}).frame
    points = path.parent / "during" / path.name
    return BoardTable(
        name=path.stem,
        family=notes.get("family", path.stem),
        source=notes["source"],
        licence=notes["licence"],
        rows=notes["rows"],
        frame=frame,
        during=read_table(points, {"L": "loss"}).frame if points.is_file() else frame.iloc[:0],
    )


def play(tables: Sequence[BoardTable], workers: int) -> Iterator[tuple[str, pd.DataFrame]]:
    """The name of every table and its forecasts, as each is done (see `forecast_cuts`)."""
    with ProcessPoolExecutor(workers) as pool:
        yield from zip((table.name for table in tables), pool.map(forecast_cuts, tables), strict=True)


def forecast_cuts(table: BoardTable) -> pd.DataFrame:
    """Every cut of a table that leaves enough, forecast by every method.

    Returns:
        One row a point: table, family, cut, quantity, method, distance, measured, predicted, low, high, and of the
        stack what a `Calibration` weighs: the variance without the misfit (known), the rate of misfit, and ln distance.
    """
    rows, on_all = [], forecaster(table.frame).law.name
    for cut in CUTS:
        for quantity, method, part in _methods(table.frame, table.during, cut, on_all):
            rows.append(part.assign(cut=cut, quantity=quantity, method=method))
    if not rows:
        return pd.DataFrame(columns=["table", "family", "cut", "quantity", "method"])
    return pd.concat(rows, ignore_index=True).assign(table=table.name, family=table.family)


def _methods(
    frame: pd.DataFrame, during: pd.DataFrame, cut: float, on_all: str
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Quantity, method and its forecasts of the points above a cut; `on_all` is the law that all rows choose."""
    top = float(frame["flops_train"].max())
    below = frame["flops_train"] <= top / cut * (1 + 1e-6)
    train, test = frame[below].reset_index(drop=True), frame[~below].reset_index(drop=True)
    scale = train["flops_train"]
    if len(train) < MIN_ROWS or train["params_total"].nunique() < MIN_SIZES or scale.max() / scale.min() < MIN_RANGE:
        return
    shared = {"distance": test["flops_train"] / scale.max(), "measured": test[LOSS]}
    stack = forecaster(train)
    yield LOSS, STACK, _of_stack(stack, test).assign(measured=test[LOSS])
    if len(during):
        known = during[during["C_run"] <= top / cut * (1 + 1e-6)]
        together = pd.concat([train, known], ignore_index=True)
        yield LOSS, WITH_POINTS, _of_stack(forecaster(together), test).assign(measured=test[LOSS])
    rivals: dict[str, Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame]] = {
        **{law: partial(_by_fit, law) for law in JOINT},
        CHOSEN: partial(_by_fit, stack.law.name),
        CHOSEN_ON_ALL: partial(_by_fit, on_all),
        STRAIGHT: _by_line,
    }
    for name, method in rivals.items():
        try:
            yield LOSS, name, method(train, test).assign(**shared)
        except AnalysisError:
            continue
    if "probes" in frame:
        yield from ((name, STACK, part) for name, part in _of_probes(train, test))


def _of_probes(train: pd.DataFrame, test: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """TASK:KIND and the forecasts of its error rates above a cut."""
    below, above = (probe_frame(part).frame.dropna(subset=["top1"]) for part in (train, test))
    fits = Cache()
    for key, probed in below.groupby(["task", "kind"]):
        asked = above[(above["task"] == key[0]) & (above["kind"] == key[1])].reset_index(drop=True)
        if asked.empty:
            continue
        try:
            rows = _of_stack(accuracy_forecaster(Runs(probed), fits), asked)
        except AnalysisError:
            continue
        yield ":".join(map(str, key)), rows.assign(measured=1 - asked["top1"])


def _of_stack(found: Forecaster, test: pd.DataFrame) -> pd.DataFrame:
    """The stack's forecasts; of an accuracy, of its error rate."""
    named = {**{v: found.points.columns[v] for v in found.points.x}, "C": "flops_train"}
    places = found.place({v: test[name].to_numpy(float) for v, name in named.items()})
    rows = found.predict(places)
    share = found.calibration.share(rows["distance"].to_numpy())
    known = sum((rows[name] / share) ** 2 for name in TERMS if name != "misfit")
    ends = {"predicted": rows["value"], "low": rows["pi_lo"], "high": rows["pi_hi"]}
    if found.is_accuracy:
        ends = {name: 1 - ends[other] for name, other in (("predicted", "predicted"), ("low", "high"), ("high", "low"))}
    terms = {"known": known, "rate": found.misfit, "log_distance": np.log(rows["distance"])}
    return pd.DataFrame({**ends, **terms, "distance": rows["distance"]})


def _by_fit(law: str, train: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    """A law as `aimscale fit` fits it, with its own prediction intervals."""
    found = fit(train, law, y=LOSS, is_tested=False).predict(test)
    return pd.DataFrame({"predicted": found["value"], "low": found["pi_lo"], "high": found["pi_hi"]})


def _by_line(train: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    """A plane in ln N and ln D by least squares, with Student's intervals."""
    x, z = (np.log(part[["params_total", "images_seen"]].to_numpy(float)) for part in (train, test))
    x, z = (np.column_stack([np.ones(len(each)), each]) for each in (x, z))
    y = np.log(train[LOSS].to_numpy(float))
    inverse = np.linalg.pinv(x)
    spare = len(y) - x.shape[1]
    spread = np.sqrt(np.sum((y - x @ inverse @ y) ** 2) / spare * (1 + np.sum((z @ inverse) ** 2, axis=1)))
    return _ends(z @ inverse @ y, spread, spare)


def _ends(log_value: Array, spread: Array, dof: float) -> pd.DataFrame:
    reach = student.ppf(0.5 + CONFIDENCE / 2, dof) * spread
    return pd.DataFrame(
        {name: np.exp(log_value + by) for name, by in (("predicted", 0.0), ("low", -reach), ("high", reach))}
    )


def calibrated(points: pd.DataFrame) -> Calibration:
    """Find the constants that the stack's forecasts of losses speak for most, each family alike, and narrow them until
    95 % of the runs are inside: their errors have lighter tails than Student's. The least rate is held."""
    of_stack = points[(points["method"] == STACK) & (points["quantity"] == LOSS)]
    if of_stack.empty:
        return LOSSES
    miss = np.log(of_stack["measured"].to_numpy() / of_stack["predicted"].to_numpy())
    sizes = of_stack.groupby(["table", "cut"])["cut"].transform("size")
    of_family = of_stack[["family", "table", "cut"]].drop_duplicates().groupby("family").size()
    weight = 1 / np.asarray(sizes * of_stack["family"].map(of_family), float)

    def at(logs: Array) -> Calibration:
        return Calibration(*np.exp(logs).tolist(), least=LOSSES.least)

    def surprise(logs: Array) -> float:
        sd = _spread(of_stack, at(logs))
        return float(np.sum(weight * (np.log(sd) - student.logpdf(miss / sd, DOF))))

    options = {"xatol": 0.01, "fatol": 1e-5}
    found = at(minimize(surprise, np.log(LOSSES[:2]), method="Nelder-Mead", options=options).x)
    reach = np.abs(miss) / (student.ppf(0.5 + CONFIDENCE / 2, DOF) * _spread(of_stack, found))
    order = np.argsort(reach)
    narrower = float(np.interp(CONFIDENCE, np.cumsum(weight[order]) / weight.sum(), reach[order]))
    return found._replace(known=narrower * found.known, misfit=narrower * found.misfit)


def _spread(points: pd.DataFrame, by: Calibration) -> Array:
    """Standard deviation of ln loss of the stack's forecasts."""
    known, rate, far = (points[name].to_numpy(float) for name in ("known", "rate", "log_distance"))
    return np.hypot(by.share(np.exp(far)) * np.sqrt(known), (by.misfit * rate + by.least) * far)


def left_out(points: pd.DataFrame) -> pd.DataFrame:
    """Replace the stack's intervals of losses of every family by those that the other families speak for."""
    mine = (points["method"] == STACK) & (points["quantity"] == LOSS)
    out = [points[~mine]]
    for family, own in points[mine].groupby("family"):
        spread = _spread(own, calibrated(points[points["family"] != family]))
        ends = _ends(np.log(own["predicted"].to_numpy(float)), spread, DOF).set_index(own.index)
        out.append(own.assign(low=ends["low"], high=ends["high"]))
    return pd.concat(out, ignore_index=True)


def scores(points: pd.DataFrame) -> pd.DataFrame:
    """One row a table, cut, quantity and method: num_points, inside, error, half_width and score.

    The error is the mean of |ln predicted - ln measured|, of an accuracy of |predicted - measured|; half width and
    score (of Winkler: the width, and 40 times what a measurement lies outside by) are in the same units.
    """
    is_loss = points["quantity"] == LOSS
    plain = {
        name: points[name].where(is_loss, 1 - points[name].clip(0, 1))
        for name in ("predicted", "measured", "low", "high")
    }
    ends = {"low": plain["low"].where(is_loss, plain["high"]), "high": plain["high"].where(is_loss, plain["low"])}
    p, m, low, high = (
        np.log(each).where(is_loss, each) for each in (plain["predicted"], plain["measured"], ends["low"], ends["high"])
    )
    missed = (low - m).clip(lower=0) + (m - high).clip(lower=0)
    each = pd.DataFrame(
        {
            "inside": missed == 0,
            "error": (p - m).abs(),
            "half_width": (high - low) / 2,
            "score": high - low + 2 / (1 - CONFIDENCE) * missed,
        }
    )
    keys = [points[name] for name in ("family", "table", "cut", "quantity", "method")]
    return each.groupby(keys).mean().assign(num_points=each.groupby(keys).size()).reset_index()


def record_table(points: pd.DataFrame) -> pd.DataFrame:
    """Count the stack's forecasts by distance (`forecast.records`), every family alike in each range."""
    own = points[points["method"] == STACK]
    is_loss = own["quantity"] == LOSS
    predicted, measured = own["predicted"].to_numpy(float), own["measured"].to_numpy(float)
    off = np.abs(np.where(is_loss, np.log(predicted / measured), predicted - measured))
    each = own.assign(off=off, held=own["measured"].between(own["low"], own["high"]), is_loss=is_loss)
    each["bin"] = np.clip(np.searchsorted(BINS, each["distance"]), 1, len(BINS) - 1)
    of_tables = each.groupby(["is_loss", "bin", "family", "table"])[["held", "off"]].mean()
    means = of_tables.groupby(["is_loss", "bin", "family"]).mean().groupby(["is_loss", "bin"]).mean()
    families = each[is_loss].groupby("bin")["family"].nunique()
    losses, accuracies = means.loc[True], means.loc[False].reindex(families.index)
    return pd.DataFrame(
        {
            "low": [BINS[k - 1] for k in families.index],
            "high": [BINS[k] for k in families.index],
            "num_families": families,
            "inside": losses["held"],
            "error": losses["off"],
            "accuracy_inside": accuracies["held"],
            "accuracy_error": accuracies["off"],
        }
    )


def main() -> None:
    """Judge forecasts on the tables, and write their scores and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+", help="tables with their provenance (CSV), or folders of them")
    parser.add_argument("--to", type=Path, default=Path("board.csv"), help="scores (CSV)")
    parser.add_argument("--record", type=Path, help="record by distance (CSV)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    asked = parser.parse_args()
    found, parts = read_board(asked.tables), []
    for name, rows in play(found, asked.workers):
        print(name, *(f"1/{cut:.0f}" for cut in sorted(rows["cut"].unique())), flush=True)
        parts.append(rows)
    points = left_out(pd.concat(parts, ignore_index=True))
    if points.empty:
        parser.error(f"no table leaves {MIN_ROWS} rows, {MIN_SIZES} sizes and a range of {MIN_RANGE:g} in compute")
    scores(points).to_csv(asked.to, index=False, float_format="%.5g")
    if asked.record:
        record_table(points).to_csv(asked.record, index=False, float_format="%.4g")
    families = [calibrated(points[points["family"] != family]) for family in points["family"].unique()]
    whole = calibrated(points)
    for name in ("known", "misfit"):
        each = [getattr(found, name) for found in families]
        print(f"{name}: {getattr(whole, name):.3g}, without a family {min(each):.3g} to {max(each):.3g}")


if __name__ == "__main__":
    main()
