"""Results of a report: laws, forecasts, correlations and contrasts of its tables, each or why there is none.

Laws are fitted to the main experiment of the tables (`table.select.main_part`) where its data are hardly repeated
(`fresh_part`); the other rows are what contrasts and the law of repeated data are made of.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from aimscale.analysis.correlation import correlate
from aimscale.analysis.display import PROBES, Flag, as_sentences
from aimscale.analysis.effects.contrasts import contrast
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit, held_out, link
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.forecasts.candidates import AUTO
from aimscale.analysis.forecasts.forecast import forecast
from aimscale.analysis.forecasts.forecaster import forecaster
from aimscale.analysis.forecasts.trajectory import Trajectory, run_points, trajectory
from aimscale.analysis.laws import repeated
from aimscale.analysis.next import Proposal, grid_offer, next_runs
from aimscale.analysis.optimum.approaches import frontier
from aimscale.analysis.optimum.isoflop import with_budgets
from aimscale.analysis.published import compare
from aimscale.analysis.table.columns import counted, unnamed
from aimscale.analysis.table.groups import isoflop_budgets, spaced
from aimscale.analysis.table.points import compute_points, error_column, usable_rows
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.schema import HEAD, MEASURED_ON, varies
from aimscale.analysis.table.select import (
    REPEATS_FROM,
    fresh_part,
    main_part,
    mixture_flags,
    most_passes,
    probe_frame,
    read_curves,
    read_tables,
    task_level,
)
from aimscale.analysis.tuning.rates import tuned_where_known
from aimscale.analysis.tuning.result import EDGE

MAX_FITTED = 200
"""Rows beyond which what is fitted many times over, for every probe and scale, is fitted to so many of them."""
FORECAST_SCALES = (2.0, 10.0)
"""Multiples of the largest N and D that the page forecasts at; of an iso-FLOP design, of the largest C."""
QUIET = ("forecaster", "next runs", "trajectory")
"""Results that few tables allow: that there is none is not told."""
HELD_OUT, CORRELATION, LINK = "held-out test over the largest", "correlation of loss with", "link from loss to"


@dataclass(kw_only=True)
class Study:
    """Tables read as one, and what was found in them."""

    paths: Sequence[Path]
    runs: Runs
    """All rows, as `read_tables` gives them."""
    main: Runs
    """All rows of the main experiment."""
    usable: Runs
    """Rows that laws are fitted to: complete, of the main experiment, with a loss, their data hardly repeated."""
    whose: str = ""
    """Which rows these are, in words behind "rows"; empty where they are all."""
    exclusions: list[str] = field(default_factory=list)
    """Rows left out and why, in sentences."""
    flags: tuple[Flag, ...] = ()
    """Cautions about the rows that laws are fitted to."""
    tuning: str = ""
    """How well the largest size was tuned."""
    results: defaultdict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    """Name, then subject (such as TASK:KIND, or nothing) -> a result, or the AnalysisError that says why not."""

    @property
    def frame(self) -> pd.DataFrame:
        """All rows as a data frame."""
        return self.runs.frame

    def attempt(self, name: str, work: Callable[..., Any], *args: Any, subject: str = "", **options: Any) -> Any:
        """Compute a result, keep it, or why there is none, and return it or None."""
        try:
            self.results[name][subject] = work(*args, **options)
        except AnalysisError as error:
            self.results[name][subject] = error
        return self.get(name, subject)

    def get(self, name: str, subject: str = "") -> Any:
        """Get a result, None where there is none."""
        return self.all(name).get(subject)

    def all(self, name: str) -> dict[str, Any]:
        """Map subjects to the results of a name."""
        return {subject: v for subject, v in self.results.get(name, {}).items() if not isinstance(v, AnalysisError)}

    def by_task(self, name: str, kind: str) -> dict[str, Any]:
        """Map tasks to the results of a name for one kind of accuracy."""
        results = self.all(name)
        return {task: results[key] for task in self.probes["task"].unique() if (key := f"{task}:{kind}") in results}

    @property
    def missing(self) -> list[str]:
        """Sentences about what the tables did not allow, and why."""
        told = [(name, each) for name, results in self.results.items() if name not in QUIET for each in results.items()]
        failed = [(f"{name} {subject}".strip(), str(v)) for name, (subject, v) in told if isinstance(v, AnalysisError)]
        return list(dict.fromkeys([*map(str, unnamed(self.frame)), *as_sentences(failed)]))

    @cached_property
    def run_points(self) -> pd.DataFrame:
        """Losses during training and at budgets of the runs that laws are fitted to."""
        return run_points(read_curves(self.paths).frame, self.usable.frame)

    @cached_property
    def probes(self) -> Runs:
        """`probe_frame` of the main experiment's complete rows."""
        return probe_frame(self.main.complete())

    @property
    def kinds(self) -> list[str]:
        """Kinds of probes that were run: those that most rows have first, among equals the paper's own."""
        rows = self.probes["kind"][self.probes["top1"].notna()].map(str).value_counts()
        rank = {kind: PROBES.index(kind) if kind in PROBES else len(PROBES) for kind in rows.index}
        return sorted(rank, key=lambda kind: (-int(rows[kind]), rank[kind], kind))

    @cached_property
    def budgets(self) -> pd.Series | None:
        """Budget of compute of every usable row in an iso-FLOP design; None in any other."""
        if "flops_train" not in self.usable or self.usable["flops_train"].isna().all():
            return None
        return isoflop_budgets(compute_points(self.usable, "val_loss").numbers)

    @property
    def samples(self) -> str:
        """Name of the items that D counts."""
        return counted(self.runs.frame) or ("images" if self.is_ours else "samples")

    @property
    def is_ours(self) -> bool:
        """Whether this is a results table of aimscale's own runs, which may be put beside AIM's."""
        is_table = "schema_version" in self.runs and bool(self.runs["schema_version"].notna().any())
        return is_table and counted(self.runs.frame) is None


def read_study(
    paths: Sequence[Path],
    columns: Mapping[str, str] | None,
    where: Sequence[str],
    groups: Mapping[str, str | float] | None = None,
) -> Study:
    """Read the tables of a page and study them.

    Raises:
        AnalysisError: a table cannot be read, or they hold neither losses nor probes.
    """
    runs = read_tables(paths, columns, where=where, groups=groups)
    if "probes" not in runs and ("val_loss" not in runs or runs["val_loss"].isna().all()):
        raise runs.no_column("val_loss")
    return study_tables(paths, runs)


def study_tables(paths: Sequence[Path], runs: Runs) -> Study:
    """Fit, test, correlate and compare what the tables allow."""
    study = _chosen_rows(paths, runs)
    _fit_laws(study)
    correlate_probes(study)
    _measure_effects(study)
    return study


def _chosen_rows(paths: Sequence[Path], runs: Runs) -> Study:
    """Choose the rows that laws are fitted to, and say which were left out."""
    main, design = main_part(runs)
    chosen = usable_rows(main, best_by="val_loss")
    best = [each for each in chosen.exclusions if each.kind == "best of"]
    fresh, pool = fresh_part(chosen.rows)
    told, whose = [f"{each}." for each in dict.fromkeys((*usable_rows(runs).exclusions, *best))], ""
    if num := len(runs) - len(main):
        whose = " of the main experiment"
        told.append(
            f"Laws and correlations use the experiment with most sizes and budgets ({design}); the other {num} rows "
            "are in the contrasts."
        )
    if num := len(chosen.rows) - len(fresh):
        whose += f" with {pool}"
        told.append(f"Laws use the rows with {pool}; the other {num} are in the law of repeated data.")
    corrected, tuning, rates = tuned_where_known(fresh_part(main)[0])
    flags = chosen.flags
    if error_column("val_loss") in corrected and rates:
        fresh, flags = corrected, tuple(flag for flag in rates.flags if flag.kind == EDGE)  # others are of its own law
        told.append("Losses that laws use are corrected to those of the best learning rates.")
    study = Study(paths=paths, runs=runs, main=main, usable=fresh, whose=whose, exclusions=told)
    study.tuning, study.flags = tuning, (*flags, *mixture_flags(fresh, ["N", "D", "U"]))
    if rates:
        study.results["tuning"][""] = rates
    thinned = ["forecasts", "what to run next"] if len(fresh) > MAX_FITTED else []
    if study.probes.frame.groupby(["kind", "task"]).size().max() > MAX_FITTED:
        thinned += ["correlations of loss with accuracy", "links from one to the other"]
    if thinned:
        told.append(f"From {MAX_FITTED} rows each, evenly over compute: {', '.join(thinned)}.")
    return study


def _evenly(rows: Runs) -> Runs:
    """Choose at most `MAX_FITTED` rows, the same ones every time: evenly in order of compute, the ends among them."""
    by = [name for name in ("flops_train", "images_seen", "params_total") if name in rows]
    if len(rows) <= MAX_FITTED or not by:
        return rows
    return rows.with_rows(rows.frame.sort_values(by).iloc[spaced(len(rows), MAX_FITTED)].sort_index())


def _fit_laws(study: Study) -> None:
    """Fit the joint law of the page and what follows from it."""
    usable, some = study.usable, _evenly(study.usable)
    if not len(usable):
        study.results["law"][""] = AnalysisError("no row has a validation loss, so no law is fitted")
        return
    laws = study.attempt("forecaster", forecaster, some)
    joint = study.attempt("law", fit, usable.with_compute(), laws.law if laws else "chinchilla")
    if joint is None:
        return
    by_compute = study.budgets is not None
    rows = with_budgets(usable, "val_loss") if by_compute else usable.with_compute()
    for variable in ("C",) if by_compute else ("N", "D"):
        test = laws.held_out if laws else held_out
        study.attempt(HELD_OUT, test, joint, rows, by=variable, subject=variable)
    tests = tuple(study.all(HELD_OUT).values())
    study.results["law"][""] = joint = dataclasses.replace(joint, heldout=tests, cautions=study.flags)
    study.attempt("compute-optimal frontier", frontier, usable, law=joint, laws=laws)
    if laws is None:
        study.results["forecast"] = study.results["forecaster"]
    else:
        study.attempt("forecast", forecast, _with_first_kind(study, some), next_scales(study), law=laws)
    study.attempt("next runs", _proposal, study, joint)
    if {"run_id", "params_total"} <= set(usable):
        study.attempt("trajectory", _trajectory, study)


def _trajectory(study: Study) -> Trajectory:
    """Forecast the trajectory of the largest size from the smaller ones."""
    rows = study.run_points
    return trajectory(rows[rows["params_total"] < rows["params_total"].max()], rows["params_total"].max())


def _with_first_kind(study: Study, rows: Runs) -> Runs:
    """Keep entries of the first kind of probe alone, which is forecast for every task."""
    if "probes" not in rows:
        return rows
    chosen = [[entry for entry in each if entry["kind"] == study.kinds[0]] for each in rows["probes"]]
    return rows.assign(probes=pd.Series(chosen, index=rows.index, dtype=object))


def _proposal(study: Study, joint: Fit) -> Proposal:
    """Choose what to buy of the table's own grid and steps beyond it, priced at 6 N D."""
    target = next_scales(study)[0]
    offer = grid_offer(joint.data, target, steps=1)
    offer["price"] = 6 * offer["N"] * offer["D"]
    budget, laws = 3 * target["N"] * target["D"], study.get("forecaster") or AUTO
    return next_runs(_evenly(study.usable), target, offer, budget=budget, unit="FLOP", law=laws)


def next_scales(study: Study) -> list[dict[str, float]]:
    """Choose scales to forecast at: multiples of the largest N and D; of an iso-FLOP design, the next budgets'
    optima."""
    frontiers = study.get("compute-optimal frontier")
    if study.budgets is not None and frontiers is not None:
        at = frontiers.leading.at([times * study.budgets.max() for times in FORECAST_SCALES])
        return [{"N": float(n), "D": float(d)} for n, d in at[["N", "D"]].to_numpy()]
    return [{v: times * study.get("law").ranges[v][1] for v in ("N", "D")} for times in FORECAST_SCALES]


def correlate_probes(study: Study) -> None:
    """Correlate loss and accuracy of every probe of the main experiment, and link one to the other."""
    probes = study.probes
    if not len(probes) and study.is_ours:
        error = AnalysisError("the table has no probe results, so loss is not compared with accuracy")
        study.results["correlation"][""] = error
    for kind in study.kinds if len(study.usable) else ():
        for task, rows in probes[probes["kind"].map(str) == kind].frame.groupby("task", sort=False):
            name, probed = f"{task}:{kind}", _evenly(probes.with_rows(rows)).numbered()
            study.attempt(CORRELATION, correlate, probed, subject=name)
            measured = probed[probed[["val_loss", "top1"]].notna().all(axis=1)].numbered()
            levels = {level: task_level(measured.frame, level) for level in ("chance", "ideal")}
            study.attempt(LINK, link, measured, **levels, is_tested=False, subject=name)


def _measure_effects(study: Study) -> None:
    """Compare the table with published models, and tell single changes and repeats."""
    if study.is_ours:
        study.attempt("published models", compare, study.main)
    rows = study.runs.complete()
    for name in factors(rows):
        study.attempt("contrast by", contrast, rows, by=name, subject=name)
    if not len(study.usable):
        return
    main = usable_rows(study.main).rows
    if "unique_images" in main and varies(main["unique_images"]) and most_passes(main) > REPEATS_FROM:
        has_sizes = "params_total" in main and varies(main["params_total"])
        study.attempt("law of repeated data", fit, main, repeated(sizes=has_sizes))


def factors(runs: Runs) -> list[str]:
    """List the columns that `contrast` may compare in a table: those of the design that vary."""
    frame = runs.frame
    varied = [name for name in runs.design_columns() if name not in MEASURED_ON]
    parts = {*HEAD} & {*varied}
    if not parts:
        return varied
    if parts == {"model.head_width"}:
        head = "model.head_width"
    else:  # the actual depth tells the heads apart; else it varies with size alone
        head = "head_depth" if "head_depth" in frame and varies(frame["head_depth"]) else "head_rule"
    return [head, *(name for name in varied if name not in parts)]
