"""How noisy a validation loss is, and why: seeds, and the images that it is measured on.

Everything is a standard deviation of ln loss, that is a fraction of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.design import foreign_settings, held_equal, varies, with_size
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.words import NOISE, Flag, flag_words


@dataclass(frozen=True, kw_only=True)
class Component:
    """One source of spread in the loss."""

    kind: str
    """Which of `words.NOISE`: table, seeds, shared, images, law."""
    value: float
    """Standard deviation as a fraction of the loss."""
    low: float = np.nan
    """Lower end of the 95 % interval; NaN if unknown."""
    high: float = np.nan
    number: float = 0
    """What it was estimated from: rows, degrees of freedom, points; of `shared` its per cent of the seeds."""

    @property
    def source(self) -> str:
        """What it is, in words."""
        return NOISE[self.kind][0]

    @property
    def basis(self) -> str:
        """What it was estimated from, in words."""
        return NOISE[self.kind][1].format(number=self.number)

    def sentence(self) -> str:
        """In words."""
        ends = f" [{100 * self.low:.3f}, {100 * self.high:.3f}]" if np.isfinite(self.low) else ""
        return f"{self.source}: {100 * self.value:.3f} %{ends} ({self.basis})."


@dataclass(frozen=True, kw_only=True, repr=False)
class Noise(Result):
    """Components of the spread of a loss."""

    components: tuple[Component, ...]
    """In the order of reading: the grid's own spread, seeds, images, the scatter about a law."""
    cells: pd.DataFrame
    """One row per size and budget with several seeds: size, images_seen, num_seeds, mean, sd (fraction of the loss)."""
    flags: tuple[Flag, ...]
    """What could not be told, and why."""

    def component(self, kind: str) -> Component | None:
        """The component of a kind."""
        return next((each for each in self.components if each.kind == kind), None)

    def sentences(self) -> list[str]:
        """One per component, and what could not be told."""
        return [*(each.sentence() for each in self.components), *flag_words(self.flags)]

    @property
    def table(self) -> pd.DataFrame:
        """One row per component: source, value, low, high (fractions of the loss), basis."""
        names = ("source", "value", "low", "high", "basis")
        return pd.DataFrame([{name: getattr(each, name) for name in names} for each in self.components])

    def headline(self) -> str:
        """The sources that were separated."""
        return f"Standard deviation of ln loss by {len(self.components)} sources"

    def summary(self) -> str:
        """Sentences, one a line."""
        head = "Standard deviations, per cent of the loss, with 95 % intervals:"
        return "\n".join([head, *(f"- {line}" for line in self.sentences())])


def noise(df: pd.DataFrame, *, y: str = "val_loss", confidence: float = 0.95) -> Noise:
    """Variance components of a loss.

    Args:
        df: a results table.

    Raises:
        AnalysisError: no usable loss, or neither seeds nor standard errors to tell noise from.
    """
    rows = usable_rows(with_size(df), y).rows
    if len(rows) < 2:
        raise AnalysisError(f"{len(rows)} complete rows have a positive {y}, too few to tell noise from.")
    log_y = np.log(rows[y].to_numpy(float))
    keys = held_equal(rows, {"seed", y})
    cells = rows.groupby(keys, dropna=False).ngroup() if keys else pd.Series(0, index=rows.index)
    spread = float(np.std(log_y, ddof=1))
    components, table = _seeds(rows, keys, log_y, cells, confidence)
    flags = [] if components else [Flag(kind="one_seed", subject=", ".join(foreign_settings(rows, {y})))]
    if y == "val_loss":
        components += _images(rows, y, confidence)
    if not components:
        raise AnalysisError(f"This table cannot tell noise from anything. {' '.join(map(str, flags))}")
    whole = Component(kind="table", value=spread, number=len(rows))
    components = [whole, *components, *_law(rows, y, confidence)]
    return Noise(components=tuple(components), cells=table, flags=tuple(flags))


def _seeds(
    rows: pd.DataFrame, keys: list[str], log_y: Array, cells: pd.Series, confidence: float
) -> tuple[list[Component], pd.DataFrame]:
    """Between seeds, pooled over cells; and how much of it a run's budgets share."""
    empty = pd.DataFrame(columns=["size", "images_seen", "num_seeds", "mean", "sd"])
    if "seed" not in rows or not varies(rows["seed"]):
        return [], empty
    groups = [name for name in keys if name != "images_seen"]
    scale = [name for name in ("size", "images_seen") if name in rows]
    table = rows[[*keys, "seed"]].assign(log_y=log_y, cell=cells)
    table["group"] = table.groupby(groups, dropna=False).ngroup() if groups else 0
    first = {name: (name, "first") for name in scale}
    table = table.groupby(["cell", "group", "seed"]).agg(log_y=("log_y", "mean"), **first).reset_index()
    table = table[table.groupby("cell")["seed"].transform("count") > 1]
    if table.empty:
        return [], empty
    table["deviation"] = table["log_y"] - table.groupby("cell")["log_y"].transform("mean")
    by_cell = table.groupby("cell")
    variance = float((table["deviation"] ** 2).sum() / (by_cell["seed"].count() - 1).sum())
    between, within, budgets = _squares(table)
    low, high = _ends([(between[0] / budgets, between[1]), (within[0] * (1 - 1 / budgets), within[1])], confidence)
    components = [Component(kind="seeds", value=np.sqrt(variance), low=low, high=high, number=between[1])]
    if within[1]:
        shared = max(0.0, (between[0] - within[0]) / budgets)
        part = 100 * min(1.0, shared / variance) if variance > 0 else 0.0
        components.append(Component(kind="shared", value=np.sqrt(shared), number=part))
    told = by_cell.agg(**first, num_seeds=("seed", "count"), mean=("log_y", "mean"), sd=("log_y", "std"))
    return components, told.assign(mean=np.exp(told["mean"])).reset_index(drop=True)


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
    return [Component(kind="law", value=law.errors.total, low=low, high=high, number=law.num_points)]


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


def _images(rows: pd.DataFrame, y: str, confidence: float) -> list[Component]:
    """The component of the images that the loss is measured on, by the rows' own standard errors."""
    if "val_loss_se" not in rows or rows["val_loss_se"].isna().all():
        return []
    found = (rows["val_loss_se"] / rows[y]).dropna().to_numpy(float)
    low, value, high = np.percentile(found, [50 * (1 - confidence), 50, 50 * (1 + confidence)])
    return [Component(kind="images", value=float(value), low=float(low), high=float(high), number=len(found))]
