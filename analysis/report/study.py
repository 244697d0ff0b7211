"""What a report says about its tables: fits, correlations, contrasts, noise, each or a sentence why it is not there.

Laws are fitted to the main experiment of the tables (`design.main_part`) where its data are hardly repeated
(`design.fresh_part`); the other rows are what contrasts and repeats are made of.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from aimscale.analysis.accuracy.correlation import correlate
from aimscale.analysis.accuracy.links import link, task_level
from aimscale.analysis.accuracy.result import Correlation
from aimscale.analysis.effects.contrasts import contrast, factors
from aimscale.analysis.effects.noise_sources import Noise, noise
from aimscale.analysis.effects.repetition import Repeats, repeats
from aimscale.analysis.effects.result import Contrasts
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.holdout import held_out
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.forecasts.forecast import Forecast, forecast
from aimscale.analysis.forecasts.forecaster import Forecaster, forecaster
from aimscale.analysis.forecasts.points import AUTO
from aimscale.analysis.laws.catalogue import find_law
from aimscale.analysis.next.proposal import Proposal, grid_offer, propose
from aimscale.analysis.optimum.approaches import Approaches, Gap, frontier, gap, gap_to_loss
from aimscale.analysis.optimum.cost import points_of
from aimscale.analysis.optimum.measured import isoflop_budgets, with_budgets
from aimscale.analysis.published.comparison import Comparison, compare, read_baselines
from aimscale.analysis.table.accuracies import unnamed
from aimscale.analysis.table.design import varies
from aimscale.analysis.table.measures import KIND, to_minimise
from aimscale.analysis.table.points import complete, usable_rows, with_compute
from aimscale.analysis.table.read import probe_frame, read_curves
from aimscale.analysis.table.select import envelope_flags, fresh_part, lower_envelope, main_part, mixture_flags, spaced
from aimscale.analysis.words import Flag, said_once

ResultT = TypeVar("ResultT")


@dataclass(kw_only=True)
class Study:
    """Tables read as one, analysed."""

    paths: tuple[Path, ...]
    frame: pd.DataFrame
    """All rows, as `read_tables` gives them."""
    main: pd.DataFrame
    """All rows of the main experiment."""
    usable: pd.DataFrame
    """Complete rows of the main experiment, with a loss, whose data are hardly repeated: what laws are fitted to."""
    whose: str = ""
    """Which rows these are, in words; empty where they are all."""
    num_usable: int
    """Complete rows with a validation loss, of all experiments."""
    probes: pd.DataFrame
    """`probe_frame` of the main experiment's complete rows."""
    collect: dict[str, Any]
    """The sweeps' collect.json, joined, or empty."""
    exclusions: list[str]
    """Rows left out and why, in sentences."""
    flags: tuple[Flag, ...] = ()
    """Cautions about the rows that laws are fitted to."""
    fits: dict[str, Fit] = field(default_factory=dict)
    """`ND` the joint law, which everything on the page is by; `C` a power law with offset along the envelope."""
    correlations: dict[tuple[str, str], tuple[Correlation, ...]] = field(default_factory=dict)
    """(probe kind, task) -> correlations of validation loss and top-1, at equal compute first."""
    links: dict[tuple[str, str], Fit] = field(default_factory=dict)
    """(probe kind, task) -> sigmoid from loss to accuracy, floor at chance."""
    forecaster: Forecaster | None = None
    """The laws that forecast the loss, weighted by how well each predicts the table's own larger runs."""
    ahead: Forecast | None = None
    """Loss and accuracies at `next_scales`."""
    proposal: Proposal | None = None
    """The runs to buy next for the first of the page's forecasts, for half of what that run costs."""
    budgets: pd.Series | None = None
    """Budget of compute of every usable row in an iso-FLOP design; None in any other."""
    approaches: Approaches | None = None
    """Compute-optimal frontiers by the approaches that the table allows, approach 3 by the joint law."""
    features: dict[str, Gap] = field(default_factory=dict)
    """Probe, TASK:KIND -> how far the best size by its error lies from that by the loss."""
    contrasts: dict[str, Contrasts] = field(default_factory=dict)
    """Column -> what its levels do with everything else equal."""
    noise: Noise | None = None
    """Where the spread of the main experiment's loss comes from."""
    repeats: Repeats | None = None
    baselines: pd.DataFrame = field(default_factory=lambda: probe_frame(pd.DataFrame({"probes": []})))
    """`published.comparison.read_baselines` of the tables' folders."""
    comparison: Comparison | None = None
    """The runs beside published models and baselines, of a table that is ours."""
    curves: pd.DataFrame = field(default_factory=lambda: read_curves(()))
    """Points during training of the main experiment's runs."""
    missing: list[str] = field(default_factory=list)
    """What the table did not allow, in sentences."""

    @cached_property
    def with_loss(self) -> pd.DataFrame:
        """Complete rows of the main experiment, with a loss."""
        return usable_rows(self.main).rows

    @property
    def samples(self) -> str:
        """What D counts, in words."""
        return "images" if self.is_ours else "samples"

    @property
    def is_ours(self) -> bool:
        """Whether this is a results table of aimscale, which may be put beside AIM's."""
        return "schema_version" in self.frame and bool(self.frame["schema_version"].notna().any())

    def attempt(self, what: str, work: Callable[[], ResultT]) -> ResultT | None:
        """Do a piece of analysis; where the data do not allow it, note what is missing and why."""
        try:
            return work()
        except AnalysisError as error:
            self.missing.append(f"{what}: {error}")
            return None


MAX_FITTED = 200
"""Rows beyond which what is fitted many times over, for every probe and scale, is fitted to so many of them."""


def evenly(rows: pd.DataFrame) -> pd.DataFrame:
    """At most `MAX_FITTED` rows, the same ones every time: evenly in order of compute, the ends among them."""
    by = [name for name in ("flops_train", "images_seen", "params_total") if name in rows]
    if len(rows) <= MAX_FITTED or not by:
        return rows
    order = np.lexsort([rows[name].to_numpy() for name in reversed(by)])
    return rows.iloc[np.sort(order[spaced(len(rows), MAX_FITTED)])]


Progress = Callable[[str, float], None]
"""Called with what begins and the share of the time that went before it, as a report of some thirty rows takes it."""


def study_tables(
    paths: Sequence[Path], frame: pd.DataFrame, collect: dict[str, Any], progress: Progress = lambda *_: None
) -> Study:
    """Fit, test, correlate and compare what the tables allow."""
    progress("laws", 0)
    everything = usable_rows(frame)
    main, design = main_part(frame)
    chosen = usable_rows(main, best_by="val_loss")
    usable, best = chosen.rows, [each for each in chosen.exclusions if each.kind == "best of"]
    fresh, pool = fresh_part(usable)
    num_others, num_worn = len(frame) - len(main), len(usable) - len(fresh)
    whose = ["of the main experiment"] * bool(num_others) + [f"with {pool}"] * bool(num_worn)
    study = Study(
        paths=tuple(paths),
        frame=frame,
        main=main,
        usable=fresh,
        whose=" ".join(whose),
        num_usable=len(everything.rows),
        probes=probe_frame(complete(main)),
        collect=collect,
        exclusions=[f"{each}." for each in dict.fromkeys((*everything.exclusions, *best))],
        flags=(*chosen.flags, *mixture_flags(fresh, ["N", "D", "U"])),
    )
    if num_others:
        study.exclusions.append(
            f"Laws and correlations use the experiment with most sizes and budgets ({design}); the other "
            f"{num_others} rows are in the contrasts."
        )
    if num_worn:
        study.exclusions.append(f"Laws use the rows with {pool}; the other {num_worn} are in what repeats are worth.")
    thinned = ["forecasts", "what to run next", "best sizes for features"] if len(study.usable) > MAX_FITTED else []
    if study.probes.groupby(["kind", "task"]).size().max() > MAX_FITTED:
        thinned += ["correlations of loss with accuracy", "links from one to the other"]
    if thinned:
        study.exclusions.append(f"From {MAX_FITTED} rows each, evenly over compute: {', '.join(thinned)}.")
    study.missing += map(str, unnamed(frame))
    if study.usable.empty:
        study.missing.append("No row has a validation loss, so no law is fitted.")
    else:
        _fit_laws(study)
    progress("correlations", 0.45)
    if study.is_ours:
        study.baselines = read_baselines(frame)
        study.comparison = compare(study.main)
    _training(study)
    correlate_probes(study)
    progress("best sizes", 0.55)
    _features(study)
    progress("contrasts", 0.65)
    _contrast(study)
    if not study.usable.empty:
        _explain(study)
    return study


def _training(study: Study) -> None:
    """Points during training of the main experiment's runs."""
    if "run_id" not in study.main:
        return
    curves = read_curves(study.paths)
    study.curves = curves[curves["run_id"].isin(study.main["run_id"])]


def _contrast(study: Study) -> None:
    """Every column that the tables vary, and kinds of probes over all their runs."""
    rows = complete(study.frame)
    for name in factors(rows):
        try:
            study.contrasts[name] = contrast(study.main if name == KIND else rows, by=name)
        except AnalysisError as error:
            if name != KIND:  # else fewer than two kinds were run, or none was probed
                study.missing.append(f"Contrast by {name}: {error}")


def _explain(study: Study) -> None:
    """Noise and repeats, where the tables hold what they need."""
    with contextlib.suppress(AnalysisError):  # neither seeds nor standard errors
        study.noise = noise(study.usable, law=study.fits.get("ND"))
    main = study.with_loss
    if "unique_images" in main and varies(main["unique_images"]):
        study.repeats = study.attempt("What repeats are worth", partial(repeats, main))


def _fit_laws(study: Study) -> None:
    usable, some = study.usable, evenly(study.usable)
    joint, why = find_law("chinchilla"), list[str]()
    try:
        weighed = forecaster(some)
        joint = weighed.law
    except AnalysisError as error:
        weighed, why = None, [f"Forecast: {error}"]
    rows = {"ND": (joint, with_compute(usable))}
    if "flops_train" in usable and usable["flops_train"].notna().any():
        rows["C"] = (find_law("power_offset:C"), lower_envelope(usable))
    for key, (law, subset) in rows.items():
        found = study.attempt(f"The law {law.name} on {len(subset)} rows", partial(fit, subset, law))
        if found is not None:
            inside = envelope_flags(subset) if key == "C" else ()
            study.fits[key] = dataclasses.replace(found, flags=(*found.flags, *inside))
    if "ND" not in study.fits:
        return
    study.forecaster, study.missing = weighed, [*study.missing, *why]
    if "C" in rows:
        study.budgets = isoflop_budgets(points_of(usable, "val_loss"))
    study.fits["ND"] = _with_tests(study, study.fits["ND"])
    if "C" in rows:
        work = partial(frontier, usable, law=study.fits["ND"])
        study.approaches = study.attempt("Compute-optimal frontier", work)
    if study.forecaster is not None:
        ahead = partial(forecast, _headline(some), next_scales(study), law=study.forecaster)
        study.ahead = study.attempt("Forecast", ahead)
    with contextlib.suppress(AnalysisError):  # nothing on offer is affordable
        study.proposal = _proposal(study, study.fits["ND"])


def _headline(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the entries of the first kind of probe alone, which is forecast for every task."""
    if "probes" not in rows:
        return rows
    kinds = probe_kinds(pd.DataFrame([entry for entries in rows["probes"] for entry in entries]))
    chosen = [[entry for entry in each if entry["kind"] == kinds[0]] for each in rows["probes"]]
    return rows.assign(probes=pd.Series(chosen, index=rows.index, dtype=object))


def _proposal(study: Study, joint: Fit) -> Proposal:
    """What to buy of the table's own grid and steps beyond it, priced at 6 N D."""
    target = next_scales(study)[0]
    offer = grid_offer(joint.data, target, steps=1)
    offer["price"] = 6 * offer["N"] * offer["D"]
    budget = 3 * target["N"] * target["D"]
    return propose(evenly(study.usable), target, offer, budget=budget, unit="FLOP", law=study.forecaster or AUTO)


def _with_tests(study: Study, joint: Fit) -> Fit:
    """The law with its largest sizes and data left out in turn; of an iso-FLOP design, its largest budget."""
    by_compute = study.budgets is not None
    rows = with_budgets(study.usable, "val_loss") if by_compute else with_compute(study.usable)
    tests = []
    for variable in ("C",) if by_compute else ("N", "D"):
        test = study.attempt(f"Held-out test over the largest {variable}", partial(held_out, joint, rows, by=variable))
        tests += [test] if test else []
    return dataclasses.replace(joint, heldout=tuple(tests), flags=said_once((*joint.flags, *study.flags)))


MAX_FEATURES = 3
"""Tasks whose best size by the first kind of probe the page tells; `frontier --y` tells any."""


def _features(study: Study) -> None:
    """The best size by a probe's error beside that by the loss, both by the joint law."""
    options: dict[str, Any] = {"is_tested": False}
    options["law"] = study.fits["ND"].law if "ND" in study.fits else "chinchilla"
    by_loss = study.approaches
    failed: list[str] = []
    first = next(iter(study.correlations), (None,))[0]
    names = [f"{task}:{kind}" for kind, task in study.correlations if kind == first]
    for name in names[:MAX_FEATURES] if by_loss else ():
        try:
            rows, y = to_minimise(evenly(study.usable), name)
            found, is_whole = frontier(rows, y=y, **options), rows[y].notna().all()
            differs = gap(found, by_loss) if is_whole and by_loss else gap_to_loss(found, rows, y, **options)
        except AnalysisError:
            failed.append(name)
        else:
            study.features |= {name: differs} if differs is not None else {}
    if failed:
        asked = f"aimscale frontier --y {failed[0]} says why"
        study.missing.append(f"The best size by the error of {' and '.join(failed)} is not known; {asked}.")


def correlate_probes(study: Study) -> None:
    """Correlations of loss and accuracy, and links between them, of every probe of the main experiment."""
    probes = study.probes
    if probes.empty:
        if study.is_ours:
            study.missing.append("The table has no probe results, so loss is not compared with accuracy.")
        return
    if study.usable.empty:
        return
    kinds = probe_kinds(probes)
    groups = {(str(kind), str(task)): rows for (kind, task), rows in probes.groupby(["kind", "task"], sort=False)}
    for kind, task in sorted(groups, key=lambda group: kinds.index(group[0])):
        rows = evenly(groups[kind, task])
        found = study.attempt(
            f"Correlation of loss with {kind} accuracy on {task}", partial(_correlations, rows.reset_index(drop=True))
        )
        if found:
            study.correlations[kind, task] = found
        known = rows.dropna(subset=["val_loss", "top1"]).reset_index(drop=True)
        chance, ideal = (task_level(known, name) for name in ("chance", "ideal"))
        work = partial(link, known, chance=chance, ideal=ideal, is_tested=False)
        linked = study.attempt(f"Link from loss to {kind} accuracy on {task}", work)
        if linked is not None:
            study.links[kind, task] = linked


def _correlations(rows: pd.DataFrame) -> tuple[Correlation, ...]:
    """Correlate at equal compute, over all rows, and within a size (Pearson)."""
    found = [*correlate(rows)]
    size = next((name for name in ("size", "params_total") if name in rows and varies(rows[name])), None)
    if size is not None:
        with contextlib.suppress(AnalysisError):  # every size may have a single row
            found += correlate(rows, methods=("pearson",), within=size)
    return tuple(found)


FORECAST_SCALES = (2.0, 10.0)
"""Multiples of the largest N and D that the page forecasts at; of an iso-FLOP design, of the largest C."""


def next_scales(study: Study) -> list[dict[str, float]]:
    """Where the page forecasts: multiples of the largest N and D; of an iso-FLOP design, the next budgets' optima."""
    if study.budgets is not None and study.approaches is not None:
        at = study.approaches.frontiers[-1].at([times * study.budgets.max() for times in FORECAST_SCALES])
        return [{"N": float(n), "D": float(d)} for n, d in at[["N", "D"]].to_numpy()]
    return [{v: times * study.fits["ND"].ranges[v][1] for v in ("N", "D")} for times in FORECAST_SCALES]


def probe_kinds(probes: pd.DataFrame) -> list[str]:
    """The kinds that were run, the paper's own first: attentive, then efficient, linear, and the others."""
    order = {"attentive": 0, "efficient": 1, "linear": 2}
    kinds: list[str] = list(dict.fromkeys(probes["kind"])) if "kind" in probes else []
    return sorted(kinds, key=lambda kind: order.get(kind, 3))
