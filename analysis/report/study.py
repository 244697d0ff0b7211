"""Results of a report: laws, forecasts, correlations, contrasts and noise of its tables, each or why there is none.

Laws are fitted to the main experiment of the tables (`table.select.main_part`) where its data are hardly repeated
(`fresh_part`); the other rows are what contrasts and repeats are made of.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.accuracy.correlation import correlate
from aimscale.analysis.accuracy.links import link, task_level
from aimscale.analysis.accuracy.result import Correlations
from aimscale.analysis.display import as_sentences
from aimscale.analysis.effects.contrasts import contrast, factors
from aimscale.analysis.effects.noise_sources import noise
from aimscale.analysis.effects.repetition import repeats
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.holdout import held_out
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.forecasts.forecast import forecast
from aimscale.analysis.forecasts.forecaster import forecaster
from aimscale.analysis.forecasts.points import AUTO
from aimscale.analysis.laws.catalogue import find_law
from aimscale.analysis.next.proposal import Proposal, grid_offer, propose
from aimscale.analysis.optimum.approaches import Gap, frontier, gap, gap_to_loss
from aimscale.analysis.optimum.frontier import points_of
from aimscale.analysis.optimum.measured import isoflop_budgets, with_budgets
from aimscale.analysis.published.comparison import compare
from aimscale.analysis.table.accuracies import unnamed
from aimscale.analysis.table.design import varies
from aimscale.analysis.table.measures import KIND, to_minimise
from aimscale.analysis.table.points import complete, usable_rows, with_compute
from aimscale.analysis.table.read import probe_frame
from aimscale.analysis.table.select import envelope_flags, fresh_part, lower_envelope, main_part, mixture_flags, spaced
from aimscale.analysis.words import Flag, said_once

MAX_FITTED = 200
"""Rows beyond which what is fitted many times over, for every probe and scale, is fitted to so many of them."""
MAX_FEATURES = 3
"""Tasks whose best size by the first kind of probe the page tells; `frontier --y` tells any."""
FORECAST_SCALES = (2.0, 10.0)
"""Multiples of the largest N and D that the page forecasts at; of an iso-FLOP design, of the largest C."""
QUIET = ("forecaster", "next runs", "noise")
"""Results that few tables allow: that there is none is not told."""

Progress = Callable[[str, float], None]
"""Called with what begins and the share of the time that went before it, as a report of some thirty rows takes it."""
Work = tuple[str, str, Callable[[], Any]]
"""Name of a result, its subject (such as TASK:KIND) or nothing, and what computes it."""


@dataclass(kw_only=True)
class Study:
    """Tables read as one, and what was found in them."""

    paths: tuple[Path, ...]
    frame: pd.DataFrame
    """All rows, as `read_tables` gives them."""
    main: pd.DataFrame
    """All rows of the main experiment."""
    usable: pd.DataFrame
    """Rows that laws are fitted to: complete, of the main experiment, with a loss, their data hardly repeated."""
    whose: str = ""
    """Which rows these are, in words; empty where they are all."""
    collect: dict[str, Any] = field(default_factory=dict)
    """The sweeps' collect.json, joined, or empty."""
    exclusions: list[str] = field(default_factory=list)
    """Rows left out and why, in sentences."""
    flags: tuple[Flag, ...] = ()
    """Cautions about the rows that laws are fitted to."""
    results: dict[tuple[str, str], Any] = field(default_factory=dict)
    """Name and subject -> a result, or the AnalysisError that says why there is none."""

    def get(self, name: str, subject: str = "") -> Any:
        """Get a result, None where there is none."""
        return self.all(name).get(subject)

    def all(self, name: str) -> dict[str, Any]:
        """Map subjects to the results of a name."""
        found = {subject: value for (each, subject), value in self.results.items() if each == name}
        return {subject: value for subject, value in found.items() if not isinstance(value, AnalysisError)}

    @property
    def missing(self) -> list[str]:
        """Sentences about what the tables did not allow, and why."""
        failed = [(n, str(v)) for n, v in self.results.items() if n[0] not in QUIET and isinstance(v, AnalysisError)]
        told = as_sentences([(" ".join(filter(None, name)), error) for name, error in failed])
        return list(dict.fromkeys([*map(str, unnamed(self.frame)), *told]))

    @cached_property
    def probes(self) -> pd.DataFrame:
        """`probe_frame` of the main experiment's complete rows."""
        return probe_frame(complete(self.main))

    @property
    def kinds(self) -> list[str]:
        """Kinds of probes that were run, the paper's own first: attentive, then efficient, linear, and the others."""
        first = ["attentive", "efficient", "linear"]
        found = list(dict.fromkeys(map(str, self.probes["kind"])))
        return sorted(found, key=lambda kind: first.index(kind) if kind in first else len(first))

    @cached_property
    def budgets(self) -> pd.Series | None:
        """Budget of compute of every usable row in an iso-FLOP design; None in any other."""
        return isoflop_budgets(points_of(self.usable, "val_loss")) if has_compute(self.usable) else None

    @property
    def samples(self) -> str:
        """What D counts, in words."""
        return "images" if self.is_ours else "samples"

    @property
    def is_ours(self) -> bool:
        """Whether this is a results table of aimscale, which may be put beside AIM's."""
        return "schema_version" in self.frame and bool(self.frame["schema_version"].notna().any())


def study_tables(
    paths: Sequence[Path], frame: pd.DataFrame, collect: dict[str, Any], progress: Progress = lambda *_: None
) -> Study:
    """Fit, test, correlate and compare what the tables allow."""
    study = chosen_rows(paths, frame, collect)
    for what, share, step in STEPS:
        progress(what, share)
        run(study, step)
    return study


def run(study: Study, step: Callable[[Study], Iterator[Work]]) -> None:
    """Compute the results of a step, one after another: a later one may read the earlier."""
    for name, subject, work in step(study):
        try:
            study.results[name, subject] = work()
        except AnalysisError as error:
            study.results[name, subject] = error


def chosen_rows(paths: Sequence[Path], frame: pd.DataFrame, collect: dict[str, Any]) -> Study:
    """Choose the rows that laws are fitted to, and say which were left out."""
    everything = usable_rows(frame)
    main, design = main_part(frame)
    chosen = usable_rows(main, best_by="val_loss")
    best = [each for each in chosen.exclusions if each.kind == "best of"]
    fresh, pool = fresh_part(chosen.rows)
    num_others, num_worn = len(frame) - len(main), len(chosen.rows) - len(fresh)
    told = [f"{each}." for each in dict.fromkeys((*everything.exclusions, *best))]
    if num_others:
        told.append(
            f"Laws and correlations use the experiment with most sizes and budgets ({design}); the other "
            f"{num_others} rows are in the contrasts."
        )
    if num_worn:
        told.append(f"Laws use the rows with {pool}; the other {num_worn} are in what repeats are worth.")
    study = Study(
        paths=tuple(paths),
        frame=frame,
        main=main,
        usable=fresh,
        whose=" ".join(["of the main experiment"] * bool(num_others) + [f"with {pool}"] * bool(num_worn)),
        collect=collect,
        exclusions=told,
        flags=(*chosen.flags, *mixture_flags(fresh, ["N", "D", "U"])),
    )
    thinned = ["forecasts", "what to run next", "best sizes for features"] if len(fresh) > MAX_FITTED else []
    if study.probes.groupby(["kind", "task"]).size().max() > MAX_FITTED:
        thinned += ["correlations of loss with accuracy", "links from one to the other"]
    if thinned:
        told.append(f"From {MAX_FITTED} rows each, evenly over compute: {', '.join(thinned)}.")
    return study


def has_compute(rows: pd.DataFrame) -> bool:
    """Tell whether rows have training FLOPs."""
    return "flops_train" in rows and bool(rows["flops_train"].notna().any())


def evenly(rows: pd.DataFrame) -> pd.DataFrame:
    """Choose at most `MAX_FITTED` rows, the same ones every time: evenly in order of compute, the ends among them."""
    by = [name for name in ("flops_train", "images_seen", "params_total") if name in rows]
    if len(rows) <= MAX_FITTED or not by:
        return rows
    order = np.lexsort([rows[name].to_numpy() for name in reversed(by)])
    return rows.iloc[np.sort(order[spaced(len(rows), MAX_FITTED)])]


def _laws(study: Study) -> Iterator[Work]:
    """Fit the joint law of the page and what follows from it, and a law along the envelope."""
    usable, some = study.usable, evenly(study.usable)
    if usable.empty:
        study.results["law", ""] = AnalysisError("no row has a validation loss, so no law is fitted")
        return
    yield "forecaster", "", partial(forecaster, some)
    laws = study.get("forecaster")
    yield "law", "", partial(fit, with_compute(usable), laws.law if laws else find_law("chinchilla"))
    if has_compute(usable):
        yield "law of the envelope", "", partial(_envelope, usable)
    if (joint := study.get("law")) is None:
        return
    by_compute = study.budgets is not None
    rows = with_budgets(usable, "val_loss") if by_compute else with_compute(usable)
    for variable in ("C",) if by_compute else ("N", "D"):
        yield "held-out test over the largest", variable, partial(held_out, joint, rows, by=variable)
    tests = tuple(study.all("held-out test over the largest").values())
    joint = dataclasses.replace(joint, heldout=tests, flags=said_once((*joint.flags, *study.flags)))
    study.results["law", ""] = joint
    if has_compute(usable):
        yield "compute-optimal frontier", "", partial(frontier, usable, law=joint)
    if laws is None:
        study.results["forecast", ""] = study.results["forecaster", ""]
    else:
        yield "forecast", "", partial(forecast, _first_kind(study, some), next_scales(study), law=laws)
    yield "next runs", "", partial(_proposal, study, joint)


def _envelope(usable: pd.DataFrame) -> Fit:
    """Fit a law of compute to the rows that no cheaper row beats."""
    rows = lower_envelope(usable)
    found = fit(rows, find_law("power_offset:C"))
    return dataclasses.replace(found, flags=(*found.flags, *envelope_flags(rows)))


def _first_kind(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
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
    return propose(evenly(study.usable), target, offer, budget=budget, unit="FLOP", law=laws)


def next_scales(study: Study) -> list[dict[str, float]]:
    """Choose scales to forecast at: multiples of the largest N and D; of an iso-FLOP design, the next budgets'
    optima."""
    found = study.get("compute-optimal frontier")
    if study.budgets is not None and found is not None:
        at = found.frontiers[-1].at([times * study.budgets.max() for times in FORECAST_SCALES])
        return [{"N": float(n), "D": float(d)} for n, d in at[["N", "D"]].to_numpy()]
    return [{v: times * study.get("law").ranges[v][1] for v in ("N", "D")} for times in FORECAST_SCALES]


def correlate_probes(study: Study) -> Iterator[Work]:
    """Correlate loss and accuracy of every probe of the main experiment, and link one to the other."""
    probes = study.probes
    if probes.empty and study.is_ours:
        error = AnalysisError("the table has no probe results, so loss is not compared with accuracy")
        study.results["correlation", ""] = error
    groups = {(str(kind), str(task)): rows for (kind, task), rows in probes.groupby(["kind", "task"], sort=False)}
    kinds = study.kinds
    for kind, task in sorted(groups, key=lambda group: kinds.index(group[0])) if len(study.usable) else ():
        rows, name = evenly(groups[kind, task]), f"{task}:{kind}"
        yield "correlation of loss with", name, partial(_correlations, rows.reset_index(drop=True))
        known = rows.dropna(subset=["val_loss", "top1"]).reset_index(drop=True)
        chance, ideal = (task_level(known, level) for level in ("chance", "ideal"))
        yield "link from loss to", name, partial(link, known, chance=chance, ideal=ideal, is_tested=False)


def _correlations(rows: pd.DataFrame) -> Correlations:
    """Correlate at equal compute, over all rows, and within a size (Pearson)."""
    found = [*correlate(rows)]
    size = next((name for name in ("size", "params_total") if name in rows and varies(rows[name])), None)
    if size is not None:
        with contextlib.suppress(AnalysisError):  # every size may have a single row
            found += correlate(rows, methods=("pearson",), within=size)
    return Correlations(correlations=tuple(found))


def _best_sizes(study: Study) -> Iterator[Work]:
    """Compare the best size by a probe's error with that by the loss, both by the joint law."""
    by_loss = study.get("compute-optimal frontier")
    names = [name for name in study.all("correlation of loss with") if name.endswith(f":{study.kinds[0]}")]
    for name in names[:MAX_FEATURES] if by_loss else ():
        yield "best size by", name, partial(_gap, study, name)


def _gap(study: Study, name: str) -> Gap | None:
    options: dict[str, Any] = {"is_tested": False, "law": study.get("law").law}
    by_loss = study.get("compute-optimal frontier")
    try:
        rows, y = to_minimise(evenly(study.usable), name)
        found = frontier(rows, y=y, **options)
        return gap(found, by_loss) if rows[y].notna().all() else gap_to_loss(found, rows, y, **options)
    except AnalysisError:
        raise AnalysisError(f"not known; aimscale frontier --y {name} says why") from None


def _effects(study: Study) -> Iterator[Work]:
    """Compare the table with published models, and tell single changes, noise and repeats."""
    if study.is_ours:
        yield "published models", "", partial(compare, study.main)
    rows = complete(study.frame)
    for name in factors(rows):  # kinds of probes are compared over all their runs
        if name != KIND or len(study.kinds) > 1:
            yield "contrast by", name, partial(contrast, study.main if name == KIND else rows, by=name)
    if study.usable.empty:
        return
    yield "noise", "", partial(noise, study.usable, law=study.get("law"))
    main = usable_rows(study.main).rows
    if "unique_images" in main and varies(main["unique_images"]):
        yield "worth of repeats", "", partial(repeats, main)


STEPS = (
    ("laws", 0.0, _laws),
    ("correlations", 0.45, correlate_probes),
    ("best sizes", 0.55, _best_sizes),
    ("contrasts", 0.65, _effects),
)
"""What begins, the share of the time that went before it, and the results that it yields."""
