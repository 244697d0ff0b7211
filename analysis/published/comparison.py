"""Our runs beside the published baselines: the same task under the same protocol, or named as not comparable.

Nothing is averaged over another set of tasks than the paper's fifteen, and no loss level is put beside the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.accuracy.links import forecast, link
from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.plots.style import human
from aimscale.analysis.published.own import beside_runs, read_baselines
from aimscale.analysis.published.published import BY_KEY, PAPER_EXPONENTS, TASKS, best_frozen
from aimscale.analysis.published.worked_example import paper_exponent
from aimscale.analysis.table.design import widest_slice
from aimscale.analysis.table.observations import is_complete
from aimscale.analysis.table.results import probe_frame, usable_rows

PROTOCOL = "attentive"
"""The only probe kind that Table 6 reports."""
ADAPTED = "lora"
"""The kind of probe that is none: it adapts the trunk, and its accuracy is that of no frozen feature."""
PAPER_SIDE = 224
TARGET = "aim-7B"
LAST, CHOSEN, UNSAID = "last", "chosen", "not said"
"""Blocks that a probe averages: the last six (the protocol's default), those that a hold-out chose, or a foreign table
that does not say which."""
REFERENCE = {LAST: "aim-7B", CHOSEN: "aim-7B-best", UNSAID: "aim-7B"}
"""AIM-7B's row under the same choice of blocks; the default where the table does not say."""
REACH = 1e6
"""How far beyond the largest run a size or budget that closes a gap is looked for."""


@dataclass(frozen=True, kw_only=True)
class Closing:
    """What would close the gap to AIM-7B on one task, by the fitted laws."""

    task: str
    scale: str
    """What is scaled while the rest stays: N or D."""
    value: float | None
    """The size or budget at which the point forecast reaches AIM-7B; None within `REACH` times the largest run."""
    low: float | None
    """Lower end of its 95 % interval; None if that lies beyond `REACH`."""
    high: float | None
    """Upper end; None if that lies beyond `REACH`."""
    extrapolation: float | None
    """`value` over the largest run's."""
    share_reached: float
    """Share of bootstrap resamples in which the target is reached at all."""

    def sentence(self) -> str:
        """In words."""
        what = {"N": "parameters", "D": "images seen"}[self.scale]
        if self.value is None:
            return (
                f"{self.task}: by the fitted laws no number of {what} up to {REACH:.0e} times the largest run closes "
                f"the gap ({100 * self.share_reached:.0f} % of resamples reach it)."
            )
        if self.extrapolation is not None and self.extrapolation <= 1:
            return f"{self.task}: no gap; by the fitted laws the largest run is already where AIM-7B is."
        low = "less" if self.low is None else human(self.low)
        high = "no limit found" if self.high is None else human(self.high)
        return (
            f"{self.task}: about {human(self.value)} {what} would close the gap [{low}, {high}], "
            f"{human(self.extrapolation or 1)} times the largest run, unverified "
            f"({100 * self.share_reached:.0f} % of resamples reach it)."
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Result):
    """Runs beside the published models."""

    tasks: pd.DataFrame
    """One row per shared task, run (its largest budget) and choice of blocks: size, params_total, images_seen, task,
    blocks (last, chosen, not said), top1, top1_lo95, top1_hi95, where test images were seen in training also
    test_in_train and test_in_pool, aim_7b (with the same choice of blocks), gap_to_aim_7b (ours minus theirs),
    best_frozen, best_frozen_top1, gap_to_best_frozen."""
    means: pd.DataFrame
    """Mean over all fifteen tasks of the runs that have them all: size, run_id, blocks, mean, aim_7b, gap."""
    baselines: pd.DataFrame
    """The runs' largest budgets beside the project's own baselines, on all tasks and frozen probes: `beside_runs`."""
    exponents: pd.DataFrame
    """Exponents: whose, N counts, exponent, low, high, n_low, n_high."""
    closing: tuple[Closing, ...]
    """What would close each gap."""
    left_out: tuple[str, ...]
    """What is not comparable, and why, in sentences."""

    @property
    def table(self) -> pd.DataFrame:
        """`tasks`."""
        return self.tasks

    def headline(self) -> str:
        """How much is comparable."""
        num = self.tasks["task"].nunique()
        return f"{num} of the paper's {len(TASKS)} tasks beside AIM, {len(self.left_out)} things not comparable"

    def summary(self) -> str:
        """For a terminal."""
        parts = ["Task by task, attentive probe on frozen features, top-1 in per cent", _percent_table(self.tasks)]
        if len(self.means):
            parts += ["", "Mean over the paper's fifteen tasks", _percent_table(self.means)]
        if len(self.baselines):
            shown = self.baselines
            if shown["params_total"].notna().any():
                shown = shown[shown["params_total"] == shown["params_total"].max()]
            parts += [
                "",
                "The largest run beside baselines on the same probes, top-1 in per cent",
                _percent_table(shown),
            ]
        parts += ["", "Scaling exponents, L ~ N^-a", self.exponents.to_string(index=False, float_format="%.4g")]
        if self.closing:
            parts += [
                "",
                "What would close the gap to AIM-7B",
                *[f"- {closing.sentence()}" for closing in self.closing],
            ]
        parts += ["", "Not comparable, and left out", *[f"- {line}" for line in self.left_out]]
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON: NaN becomes null."""
        frames = {
            "tasks": self.tasks, "means": self.means, "baselines": self.baselines, "exponents": self.exponents
        }  # fmt: skip
        plain = {name: frame.astype(object).where(frame.notna(), None) for name, frame in frames.items()}
        return {
            **{name: frame.to_dict("records") for name, frame in plain.items()},
            "closing": [vars(closing) | {"sentence": closing.sentence()} for closing in self.closing],
            "left_out": list(self.left_out),
        }


def _percent_table(frame: pd.DataFrame) -> str:
    if frame.empty:
        return "(no task of this table is one of the paper's)"
    shown = frame.copy()
    for name in shown.columns:
        if name.startswith(("top1", "aim", "gap", "mean")) or name in ("best_frozen_top1", "baseline_top1"):
            shown[name] = 100 * shown[name]
    return shown.to_string(index=False, float_format="%.1f")


def compare(frame: pd.DataFrame, *, resamples: int = 1000) -> Comparison:
    """Put the runs of a results table beside the published models, and beside the project's own baselines where the
    table's folder has some; what the table lacks is named in `left_out`.
    """
    usable, exclusions = usable_rows(frame)
    probes = probe_frame(frame[is_complete(frame)])
    left_out = [*exclusions, *_leaks(probes)]
    shared = _shared(probes, left_out)
    left_out.append(
        "Loss levels: the paper's are on IN-1k at 224 px with unstated prefixes, ours on this table's own images."
    )
    return Comparison(
        tasks=_task_rows(shared),
        means=_means(shared, left_out),
        baselines=beside_runs(_last_budgets(probes[probes["kind"] != ADAPTED]), read_baselines(frame)),
        exponents=_exponents(usable, left_out, resamples),
        closing=tuple(_closings(usable, shared, left_out, resamples)),
        left_out=tuple(left_out),
    )


def _shared(probes: pd.DataFrame, left_out: list[str]) -> pd.DataFrame:
    """Attentive results on the paper's tasks; what else there is goes to `left_out`."""
    own = [str(task) for task in dict.fromkeys(probes["task"]) if task not in TASKS]
    if own:
        left_out.append(f"Tasks that the paper does not have: {', '.join(own)}.")
    known = probes[probes["task"].isin(TASKS)]
    others = [str(kind) for kind in dict.fromkeys(known["kind"]) if kind != PROTOCOL]
    if others:
        left_out.append(f"Probes of another kind than Table 6's attentive one: {', '.join(others)}.")
    kept = known[known["kind"] == PROTOCOL].dropna(subset=["top1"])
    small = (
        sorted({int(side) for side in kept["image_size"].dropna() if side != PAPER_SIDE})
        if "image_size" in kept
        else []
    )
    if small:
        left_out.append(
            f"Resolution: these runs see {', '.join(map(str, small))} px, AIM {PAPER_SIDE} px: a part of every gap."
        )
    return kept


def _leaks(probes: pd.DataFrame) -> list[str]:
    """Sentences about test images that were seen in training."""
    found = []
    for column, where in (("test_in_train", "its training split"), ("test_in_pool", "the pre-training pool")):
        if column not in probes:
            continue
        seen = probes[probes[column] > 0].drop_duplicates(["task", column])
        found += [
            f"{row['task']}: {int(row[column])} of {int(row['n'])} test images are in {where}, too, byte for byte; "
            "its accuracies are shown, marked, and not to be trusted by more than that share."
            for _, row in seen.iterrows()
        ]
    return found


def _last_budgets(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each run's largest budget."""
    if "images_seen" not in rows or rows["images_seen"].isna().all():
        return rows
    key = [name for name in ("run_id", "size") if name in rows][:1]
    return rows[rows["images_seen"] == rows.groupby(key)["images_seen"].transform("max")] if key else rows


def _by_blocks(shared: pd.DataFrame) -> pd.DataFrame:
    """A row per probe and choice of blocks; `top1` and its interval are those of the choice named in `blocks`."""
    says = shared["last_top1"].notna()
    names = ("top1", "top1_lo95", "top1_hi95")
    last = shared[says].assign(blocks=LAST, **{name: shared.loc[says, f"last_{name}"] for name in names})
    own = shared.assign(blocks=np.where(says, CHOSEN, UNSAID))
    return pd.concat([last, own]).sort_index(kind="stable")


def _task_rows(shared: pd.DataFrame) -> pd.DataFrame:
    rows = _by_blocks(_last_budgets(shared))
    keep = [name for name in ("size", "params_total", "images_seen") if name in rows]
    seen = [name for name in ("test_in_train", "test_in_pool") if name in rows and (rows[name] > 0).any()]
    out = rows[[*keep, "task", "blocks", "top1", "top1_lo95", "top1_hi95", *seen]].reset_index(drop=True)
    out["aim_7b"] = [
        BY_KEY[REFERENCE[blocks]].accuracy(task) for blocks, task in zip(out["blocks"], out["task"], strict=True)
    ]
    out["gap_to_aim_7b"] = out["top1"] - out["aim_7b"]
    out["best_frozen"] = [best_frozen(task).key for task in out["task"]]
    out["best_frozen_top1"] = [best_frozen(task).accuracy(task) for task in out["task"]]
    out["gap_to_best_frozen"] = out["top1"] - out["best_frozen_top1"]
    return out


def _means(shared: pd.DataFrame, left_out: list[str]) -> pd.DataFrame:
    """Means of the runs that have all fifteen tasks, by choice of blocks."""
    columns = ["size", "run_id", "blocks", "mean", "aim_7b", "gap"]
    rows = _last_budgets(shared)
    if rows.empty or "run_id" not in rows:
        return pd.DataFrame(columns=columns)
    counts = rows.groupby("run_id")["task"].nunique()
    partial = counts[counts < len(TASKS)]
    if len(partial):
        left_out.append(
            f"The mean over tasks of {len(partial)} run{'s' if len(partial) > 1 else ''}: at most {partial.max()} of "
            f"the paper's {len(TASKS)} tasks were probed, and a mean over other tasks is another quantity."
        )
    full = _by_blocks(rows[rows["run_id"].isin(counts[counts == len(TASKS)].index)])
    if full.empty:
        return pd.DataFrame(columns=columns)
    groups = full.groupby(["run_id", "blocks"], sort=False)
    means = groups.agg(size=("size", "first"), mean=("top1", "mean"), tasks=("task", "nunique")).reset_index()
    means = means[
        means["tasks"] == len(TASKS)
    ]  # a mean over tasks that say their blocks and others that do not is none
    means["aim_7b"] = [BY_KEY[REFERENCE[blocks]].mean for blocks in means["blocks"]]
    means["gap"] = means["mean"] - means["aim_7b"]
    return means[columns].reset_index(drop=True)


def _exponents(usable: pd.DataFrame, left_out: list[str], resamples: int) -> pd.DataFrame:
    """The paper's slopes and ours: a pure power law, as theirs, over sizes at one budget."""
    rows: list[dict[str, Any]] = [
        {"whose": "AIM, four published points", "N": count} | paper_exponent(count) for count in PAPER_EXPONENTS
    ]
    for count in PAPER_EXPONENTS:
        if count not in usable or usable[count].isna().all() or usable.empty:
            continue
        subset, words = widest_slice(usable, count, "images_seen") if "images_seen" in usable else (usable, "all")
        try:
            ours = fit("power:N", subset, columns={"N": count}, resamples=resamples)
        except AnalysisError as error:
            left_out.append(f"Our exponent on {count}: {error}")
            continue
        interval = ours.intervals["a"]
        low, high = ours.ranges["N"]
        rows.append(
            {"whose": f"this table, {words} images seen", "N": count, "exponent": ours.params["a"], "low": interval.low,
             "high": interval.high, "n_low": low, "n_high": high}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _closings(usable: pd.DataFrame, shared: pd.DataFrame, left_out: list[str], resamples: int) -> list[Closing]:
    closings: list[Closing] = []
    if shared.empty:
        return closings
    try:
        joint = fit("chinchilla", usable, resamples=resamples)
    except AnalysisError as error:
        left_out.append(f"What would close the gaps: {error}")
        return closings
    for task, rows in shared.groupby("task", sort=False):
        target = BY_KEY[TARGET].accuracy(str(task))
        chance = rows["chance"].dropna()
        # on the blocks of AIM-7B's row, where the table has them
        rows = rows.assign(top1=rows["last_top1"].fillna(rows["top1"]))
        try:
            second = link(
                rows.reset_index(drop=True), chance=float(chance.iloc[0]) if len(chance) else None,
                resamples=resamples,
            )  # fmt: skip
            closings += [closing(str(task), joint, second, scale, target) for scale in ("N", "D")]
        except AnalysisError as error:
            left_out.append(f"What would close the gap on {task}: {error}")
    return closings


def closing(task: str, joint: Fit, second: Fit, scale: str, target: float) -> Closing:
    """The N (at the largest D) or D (at the largest N) at which the two-step forecast reaches a target accuracy."""
    largest = {name: joint.ranges[name][1] for name in ("N", "D")}
    factors = np.geomspace(1.0, REACH, 400)
    grid = {name: np.full(len(factors), value) for name, value in largest.items()}
    grid[scale] = factors * largest[scale]
    found = forecast(joint, second, grid)
    crossings = _first_reaching(found.curve_draws, target, grid[scale])
    point = _first_reaching(found.table["accuracy"].to_numpy()[None], target, grid[scale])[0]
    low, high = np.percentile(crossings, [2.5, 97.5], method="inverted_cdf")
    return Closing(
        task=task,
        scale=scale,
        value=_finite(point),
        low=_finite(low),
        high=_finite(high),
        extrapolation=_finite(point / largest[scale]),
        share_reached=float(np.mean(np.isfinite(crossings))),
    )


def _first_reaching(curves: np.ndarray, target: float, grid: np.ndarray) -> np.ndarray:
    """Per curve (num, n), the first grid value at which it reaches the target; infinity if none."""
    reached = curves >= target
    return np.where(reached.any(axis=1), grid[np.argmax(reached, axis=1)], np.inf)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
