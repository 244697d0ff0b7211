"""How noisy a validation loss is, and why: seeds, the images it is measured on, the prefixes they are given.

Everything is a standard deviation of ln loss, that is a fraction of the loss. Per-image losses are read as plain files
from `runs/<run_id>/validation/<images_seen>.npz` beside the table, where they are.
"""

from __future__ import annotations

import itertools
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chi2

from aimscale.analysis.display import Result, plain_types
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.table.design import foreign_settings, held_equal, varies, with_size
from aimscale.analysis.table.names import FOLDER, no_column
from aimscale.analysis.table.points import complete

MAX_FILES = 200
"""Runs whose per-image losses are read; enough for the noise of a mean."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One source of spread in the loss."""

    source: str
    """What it is, in words."""
    value: float
    """Standard deviation as a fraction of the loss."""
    low: float
    """Lower end of the 95 % interval; NaN if unknown."""
    high: float
    basis: str
    """What it was estimated from."""

    def sentence(self) -> str:
        """In words."""
        ends = f" [{100 * self.low:.3f}, {100 * self.high:.3f}]" if np.isfinite(self.low) else ""
        return f"{self.source}: {100 * self.value:.3f} %{ends} ({self.basis})."


@dataclass(frozen=True, kw_only=True, repr=False)
class Noise(Result):
    """Components of the spread of a loss."""

    components: tuple[Component, ...]
    """In the order of reading: the grid's own spread, seeds, images, prefixes."""
    seed_share: float
    """Share of the variance of ln loss over the table that is between seeds; NaN without several seeds."""
    cells: pd.DataFrame = field(repr=False)
    """One row per size and budget with several seeds: size, images_seen, num_seeds, mean, sd (fraction of the loss)."""
    missing: tuple[str, ...]
    """What could not be told, and why, in sentences."""

    def component(self, start: str) -> Component | None:
        """The component whose source starts with these words."""
        return next((each for each in self.components if each.source.startswith(start)), None)

    def sentences(self) -> list[str]:
        """One per component, and the share of seeds in the whole."""
        lines = [each.sentence() for each in self.components]
        if np.isfinite(self.seed_share):
            lines.append(f"Seeds make {100 * self.seed_share:.2g} % of the variance of ln loss over this table.")
        return [*lines, *self.missing]

    @property
    def table(self) -> pd.DataFrame:
        """One row per component: source, value, low, high (fractions of the loss), basis."""
        return pd.DataFrame([vars(each) for each in self.components])

    def headline(self) -> str:
        """The sources that were separated."""
        return f"Standard deviation of ln loss by {len(self.components)} sources"

    def summary(self) -> str:
        """Sentences, then the seeds' spread cell by cell."""
        lines = ["Standard deviations, per cent of the loss, with 95 % intervals:"]
        lines += [f"- {line}" for line in self.sentences()]
        for name in [name for name in ("size", "images_seen") if name in self.cells and len(self.cells)]:
            groups = self.cells.groupby(name, sort=name != "size")
            shown = pd.DataFrame({name: value, "between seeds (%)": _pooled(cells)} for value, cells in groups)
            lines += ["", shown.to_string(index=False, float_format=lambda v: f"{v:.3g}")]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return plain_types(
            {
                "components": [vars(each) for each in self.components],
                "seed_share": self.seed_share,
                "cells": self.cells.to_dict("records"),
                "missing": list(self.missing),
                "sentences": self.sentences(),
            }
        )


def _pooled(cells: pd.DataFrame) -> float:
    """Standard deviation between seeds over some cells, per cent."""
    spare = cells["num_seeds"] - 1
    return 100 * float(np.sqrt((cells["sd"] ** 2 * spare).sum() / spare.sum()))


def noise(df: pd.DataFrame, *, y: str = "val_loss", confidence: float = 0.95) -> Noise:
    """Variance components of a loss.

    Args:
        df: a results table, best read by `read_tables`, which says where the per-image losses lie.

    Raises:
        AnalysisError: no usable loss, or neither seeds nor standard errors to tell noise from.
    """
    df = with_size(df)
    rows = complete(df)
    if y not in rows:
        raise no_column(rows, y)
    rows = rows[pd.to_numeric(rows[y], errors="coerce") > 0]
    if len(rows) < 2:
        raise AnalysisError(f"{len(rows)} complete rows have a positive {y}, too few to tell noise from.")
    log_y = np.log(rows[y].to_numpy(float))
    missing: list[str] = []
    components = [
        Component(source="spread over the whole table", value=float(np.std(log_y, ddof=1)), low=np.nan, high=np.nan,
                  basis=f"{len(rows)} rows")
    ]  # fmt: skip
    found, cells = _seeds(rows, y, log_y, confidence)
    components += found
    if not found:
        settings = foreign_settings(rows, {y})
        also = f" ({', '.join(settings)} must agree, too)" if settings else ""
        missing.append(
            f"No two rows differ in the seed alone{also}, so the noise of seeds is not known; run more seeds."
        )
    share = float("nan")
    if found:
        share = min(1.0, found[0].value ** 2 / components[0].value ** 2) if components[0].value > 0 else np.nan
    if y == "val_loss":
        components += _validation(rows, y, _cells(rows, y), confidence, missing)
    if len(components) == 1:
        raise AnalysisError(f"This table cannot tell noise from anything: {' '.join(missing)}")
    components += _law(rows, y, confidence)
    return Noise(components=tuple(components), seed_share=share, cells=cells, missing=tuple(missing))


def _seeds(rows: pd.DataFrame, y: str, log_y: np.ndarray, confidence: float) -> tuple[list[Component], pd.DataFrame]:
    """Between seeds, pooled over cells; and how much of it a run's budgets share."""
    empty = pd.DataFrame(columns=["size", "images_seen", "num_seeds", "mean", "sd"])
    if "seed" not in rows or not varies(rows["seed"]):
        return [], empty
    keys = _keys(rows, y)
    table = rows[[*keys, "seed"]].assign(log_y=log_y, cell=_cells(rows, y))
    groups = [name for name in keys if name != "images_seen"]
    table["group"] = table.groupby(groups, dropna=False).ngroup() if groups else 0
    table = table.groupby(["cell", "group", "seed"]).agg(
        log_y=("log_y", "mean"), **{n: (n, "first") for n in ("size", "images_seen") if n in table}
    ).reset_index()  # fmt: skip
    counts = table.groupby("cell")["seed"].transform("count")
    table = table[counts > 1]
    if table.empty:
        return [], empty
    table["deviation"] = table["log_y"] - table.groupby("cell")["log_y"].transform("mean")
    by_cell = table.groupby("cell")
    variance = float((table["deviation"] ** 2).sum() / (by_cell["seed"].count() - 1).sum())
    between, within, budgets = _squares(table)
    low, high = _ends([(between[0] / budgets, between[1]), (within[0] * (1 - 1 / budgets), within[1])], confidence)
    counted = f"{by_cell.ngroups} cell{'s' * (by_cell.ngroups > 1)}"
    basis = f"{counted}; {between[1]} degrees of freedom of runs, {within[1]} of rows within them"
    components = [Component(source="between seeds", value=np.sqrt(variance), low=low, high=high, basis=basis)]
    if within[1]:
        shared = max(0.0, (between[0] - within[0]) / budgets)
        part = f"{100 * min(1.0, shared / variance):.0f} % of the seeds' variance" if variance > 0 else "none"
        source = "of it, shared by all budgets of a run"
        components.append(Component(source=source, value=np.sqrt(shared), low=np.nan, high=np.nan, basis=part))
    cells = by_cell.agg(
        **{name: (name, "first") for name in ("size", "images_seen") if name in table},
        num_seeds=("seed", "count"),
        mean=("log_y", lambda v: float(np.exp(v.mean()))),
        sd=("log_y", lambda v: float(np.std(v, ddof=1))),
    )
    return components, cells.reset_index(drop=True)


def _keys(rows: pd.DataFrame, y: str) -> list[str]:
    """Columns in which two rows of a cell agree: all of the design but the seed."""
    return held_equal(rows, free=("seed", y))


def _cells(rows: pd.DataFrame, y: str) -> pd.Series:
    """Number of each row's cell, by row label."""
    keys = _keys(rows, y)
    return rows.groupby(keys, dropna=False).ngroup() if keys else pd.Series(0, index=rows.index)


def _law(rows: pd.DataFrame, y: str, confidence: float) -> list[Component]:
    """Scatter about the joint law, where one can be fitted: what is more than seeds is the form or the tuning."""
    repeated = "unique_images" in rows and varies(rows["unique_images"])
    try:
        law = fit("repeated" if repeated else "chinchilla", rows, y=y)
    except AnalysisError:
        return []
    if law.errors is None:
        return []
    low, high = law.errors.interval(confidence)
    basis = f"residuals of {law.num_points} points; more than seeds and images explain is the law's form or the tuning"
    return [Component(source="scatter about the joint law", value=law.errors.total, low=low, high=high, basis=basis)]


def _ends(parts: list[tuple[float, int]], confidence: float) -> tuple[float, float]:
    """Interval of the standard deviation whose variance is a sum of mean squares with these degrees of freedom.

    Exact for one of them, the modified large-sample interval (Graybill and Wang 1980) for several.
    """
    total = sum(square for square, _ in parts)
    ends = []
    for tail in ((1 + confidence) / 2, (1 - confidence) / 2):
        moves = [square * (spare / chi2.ppf(tail, spare) - 1) for square, spare in parts if spare]
        ends.append(np.sqrt(max(0.0, total + np.sign(0.5 - tail) * np.sqrt(np.sum(np.square(moves))))))
    return float(ends[0]), float(ends[1])


def _squares(table: pd.DataFrame) -> tuple[tuple[float, int], tuple[float, int], float]:
    """Mean squares and degrees of freedom of runs about their cells and of rows about their runs; budgets of a run."""
    sums, spare, budgets = np.zeros(2), np.zeros(2, int), []
    for _, group in table.groupby("group"):
        grid = group.pivot_table(index="seed", columns="cell", values="deviation").dropna(axis=1)
        seeds, num = grid.shape
        if seeds < 2 or num < 1:
            continue
        means = grid.mean(axis=1).to_numpy()
        sums += num * float((means**2).sum()), float(((grid.to_numpy() - means[:, None]) ** 2).sum())
        spare += seeds - 1, (seeds - 1) * (num - 1)
        budgets.append(num)
    between, within = sums / np.maximum(spare, 1)
    return (float(between), int(spare[0])), (float(within), int(spare[1])), float(np.mean(budgets or [1]))


def _validation(rows: pd.DataFrame, y: str, cells: pd.Series, confidence: float, missing: list[str]) -> list[Component]:
    """Components of the images and prefixes that the loss is measured on."""
    components = []
    if "val_loss_se" in rows and rows["val_loss_se"].notna().any():
        relative = (rows["val_loss_se"] / rows[y]).dropna()
        num = f", {rows['val_num_images'].median():.0f} images" if "val_num_images" in rows else ""
        components.append(
            Component(
                source="validation images, shared by all runs scored on them", value=float(relative.median()),
                low=float(relative.quantile((1 - confidence) / 2)), high=float(relative.quantile((1 + confidence) / 2)),
                basis=f"median and range over {len(relative)} rows' standard errors{num}; it moves all runs together",
            )
        )  # fmt: skip
    files = read_losses(rows)
    if not files:
        where = "runs/<run_id>/validation/ beside the table"
        missing.append(f"No per-image losses were found in {where}, so noise of paired differences is not known.")
        return components
    components += _paired(files, cells, confidence)
    prefixes = [value for value in (_prefix_noise(each) for each in files.values()) if value is not None]
    if prefixes:
        low, high = np.percentile(prefixes, [50 * (1 - confidence), 50 * (1 + confidence)])
        num = next(iter(files.values()))["prefix_len"].shape[1]
        components.append(
            Component(
                source="which prefixes were drawn, at most", value=float(np.median(prefixes)), low=float(low),
                high=float(high), basis=f"{num} prefixes per image, {len(prefixes)} rows; the same for all runs",
            )
        )  # fmt: skip
    else:
        missing.append("The per-image losses are not kept per prefix, so the noise of prefixes is not known.")
    return components


def read_losses(rows: pd.DataFrame) -> dict[Any, dict[str, np.ndarray]]:
    """Row label -> arrays of its `validation/<images_seen>.npz`; rows without a readable file are left out."""
    found: dict[Any, dict[str, np.ndarray]] = {}
    if not {FOLDER, "run_id", "images_seen"} <= set(rows.columns):
        return found
    for label, row in rows.iterrows():
        path = Path(str(row[FOLDER])) / "runs" / str(row["run_id"]) / "validation" / f"{int(row['images_seen'])}.npz"
        if len(found) == MAX_FILES or not path.exists():
            continue
        try:
            with np.load(path, allow_pickle=False) as stored:
                found[label] = {key: stored[key] for key in stored.files}
        except (OSError, ValueError, zipfile.BadZipFile, KeyError):
            continue
    return found


def _paired(files: dict[Any, dict[str, np.ndarray]], cells: pd.Series, confidence: float) -> list[Component]:
    """Standard error of ln(loss of one run / loss of another) over images, for runs scored on the same ones."""
    first = next(iter(files.values()))
    scores = {
        label: _scores(each["loss_sum"], each["num_targets"])
        for label, each in files.items()
        if np.array_equal(each["index"], first["index"]) and np.array_equal(each["num_targets"], first["num_targets"])
    }
    labels, rng = list(scores), np.random.default_rng(0)
    drawn = {tuple(sorted(rng.choice(len(labels), 2, replace=False))) for _ in range(400)} if len(labels) > 1 else set()
    alike = [(a, b) for _, group in cells.loc[labels].groupby(cells) for a, b in itertools.combinations(group.index, 2)]
    out = []
    for what, pairs in (("any two runs", [(labels[i], labels[j]) for i, j in sorted(drawn)]), ("two seeds", alike)):
        errors = [float(np.std(scores[a] - scores[b], ddof=1) / np.sqrt(len(scores[a]))) for a, b in pairs]
        if errors:
            low, high = np.percentile(errors, [50 * (1 - confidence), 50 * (1 + confidence)])
            basis = f"the same {len(first['index'])} images, median and range over {len(errors)} pairs of rows"
            source = f"validation images, difference of {what}"
            out.append(
                Component(source=source, value=float(np.median(errors)), low=float(low), high=float(high), basis=basis)
            )
    return out


def _scores(loss_sum: np.ndarray, num_targets: np.ndarray) -> np.ndarray:
    """Influence of each image on ln loss (delta method of a ratio of sums), scaled so that its mean is the estimate."""
    loss = loss_sum.sum() / num_targets.sum()
    return (loss_sum - loss * num_targets) / (loss * num_targets.mean())


def _prefix_noise(arrays: dict[str, np.ndarray]) -> float | None:
    """Upper bound of the standard deviation of ln loss over draws of the prefixes, images kept.

    Prefixes are stratified: every image draws one length from each of P equal strata of 1..N-1. A draw moves ln loss in
    two ways. The image counts with more or fewer targets, which matters as its loss per target r differs from the mean
    L: that part is known, (r - L)^2 times the variance of a uniform length. And its targets are easier or harder than r
    says: what is left of each prefix's loss after r holds that, and the image's own shape too, so it bounds from above.
    """
    if "prefix_loss_sum" not in arrays or arrays["prefix_loss_sum"].ndim != 2:
        return None
    loss_sums, lengths = arrays["prefix_loss_sum"], arrays["prefix_len"].astype(float)
    num, columns = loss_sums.shape
    if columns < 2 or num < 3:
        return None
    num_tokens = round(float((arrays["num_targets"] + lengths.sum(1)).mean()) / columns)
    targets = num_tokens - lengths
    loss = loss_sums.sum() / targets.sum()
    rate = loss_sums.sum(1, keepdims=True) / targets.sum(1, keepdims=True)
    width = (num_tokens - 1) / columns
    counted = columns * float(((rate - loss) ** 2).sum()) * max(0.0, width**2 - 1) / 12
    left = loss_sums - rate * targets
    left = left - left.mean(axis=0)
    shape = float((left**2).sum()) * columns / (columns - 1)
    return float(np.sqrt(counted + shape) / (loss * targets.sum()))
