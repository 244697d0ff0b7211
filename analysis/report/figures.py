"""The figures of a report, each with a caption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from aimscale.analysis.effects.plateau import plateau_flags
from aimscale.analysis.plots.accuracy import plot_accuracy, plot_loss_accuracy, plot_published
from aimscale.analysis.plots.scaling import plot_approaches, plot_fit, plot_points
from aimscale.analysis.plots.style import inline_svg, save
from aimscale.analysis.plots.training import plot_curves
from aimscale.analysis.published.comparison import ADAPTED, CHOSEN, LAST, PROTOCOL
from aimscale.analysis.published.published import TASKS, best_frozen, published_frame, table6
from aimscale.analysis.report.study import Study, probe_kinds
from aimscale.analysis.report.tables import html_id
from aimscale.analysis.table.points import complete
from aimscale.analysis.table.read import probe_frame
from aimscale.analysis.words import accuracy_of

MAX_TASKS = 5
"""Tasks in one figure of accuracies; more make further figures, each of which fits a page."""


@dataclass(frozen=True, kw_only=True)
class PageFigure:
    """One figure of the page and of a paper."""

    key: str
    """HTML id, and name of its files."""
    title: str
    """Heading: what the figure shows."""
    caption: str
    """What is drawn, with the formula and its interval where a law is."""
    figure: Figure
    svg: str
    """Inline SVG."""
    is_wide: bool
    """Whether it takes two columns of a paper."""


def page_figure(key: str, title: str, caption: str, figure: Figure) -> PageFigure:
    """Render a figure for the page."""
    svg = inline_svg(figure, key, f"{title}. {caption}")
    is_wide = figure.get_figwidth() > 5
    return PageFigure(key=key, title=title, caption=caption, figure=figure, svg=svg, is_wide=is_wide)


def page_figures(study: Study) -> dict[str, list[PageFigure]]:
    """Every figure that the table allows, by section of the page, in reading order; of accuracies the headline kind of
    probe comes first."""
    sections: dict[str, Callable[[Study], Iterator[PageFigure]]] = {
        "scaling": _scaling,
        "accuracy": _accuracy,
        "linked": _loss_accuracy,
        "training": _training,
        "frontier": _frontiers,
        "published": _published,
    }
    return {section: list(draw(study)) for section, draw in sections.items()}


def save_figures(figures: dict[str, list[PageFigure]], folder: Path) -> list[Path]:
    """Write every figure into a folder as SVG, PDF, PNG and CSV, at a paper's width.

    Raises:
        AnalysisError: the folder cannot be written.
    """
    return [path for each in figures.values() for made in each for path in save(made.figure, folder / made.key)]


def _law_caption(study: Study, key: str) -> str:
    """Formula, parameters with intervals, points and rows of a fit."""
    fit = study.fits[key]
    values = "; ".join(fit.equation(name, name) for name in fit.params if name not in fit.law.derived)
    return f"{fit.law.formula}: {values}. {fit.num_points} points. Brackets and shading: 95 % intervals."


def _scaling(study: Study) -> Iterator[PageFigure]:
    usable, fits = study.usable, study.fits
    for key, x, by, title in (
        ("N", "params_total", "images_seen", "Loss against parameters"),
        ("D", "images_seen", "params_total", f"Loss against {study.samples} seen"),
        ("C", "flops_train", "params_total", "Loss against compute"),
    ):
        if usable.empty or x not in usable or usable[x].isna().all():
            continue
        others = by if by in usable and usable[by].notna().all() else None
        if key != "C" and "ND" in fits:
            figure = plot_fit(fits["ND"], x=key)
            caption = _law_caption(study, "ND") if key == "N" else "The same law, a line for each size."
        else:
            figure = plot_points(usable, x, by=others, envelope=fits.get("C") if key == "C" else None)
            caption = "Lines join a size's budgets." if key == "C" else "No law could be fitted; see what is missing."
            if key == "C" and "C" in fits:
                caption += f" Dashed: the law of the envelope, {_law_caption(study, 'C')}"
        yield page_figure(f"loss-{key}", title, caption, figure)


def _accuracy(study: Study) -> Iterator[PageFigure]:
    """Against size, data and compute, a row of panels per task."""
    for kind in probe_kinds(study.probes):
        rows = study.probes[(study.probes["kind"] == kind) & study.probes["top1"].notna()]
        tasks = list(dict.fromkeys(rows["task"]))
        bars = "" if rows["top1_lo95"].isna().all() else " Bars: 95 % intervals over test images."
        for number, first in enumerate(range(0, len(tasks), MAX_TASKS), start=1):
            some = rows[rows["task"].isin(tasks[first : first + MAX_TASKS])]
            figure = plot_accuracy(some, _levels(study, kind, some))
            caption = f"One point per run and budget. Lines join points of one size, in the first panel of one D.{bars}"
            key, more = html_id("accuracy", kind), "" if number == 1 else f"-{number}"
            yield page_figure(f"{key}{more}", _capital(accuracy_of(kind)), caption, figure)


def _levels(study: Study, kind: str, rows: pd.DataFrame) -> pd.DataFrame:
    """What accuracies of a kind may be compared with: the table's own baselines, and on its tasks the paper."""
    same = rows[["task", "n"]].drop_duplicates()
    theirs = study.baselines[study.baselines["kind"].eq(kind) & (kind != ADAPTED)].rename(columns={"size": "name"})
    own = (
        theirs.merge(same, on=["task", "n"]).reindex(columns=["task", "name", "top1"]).drop_duplicates(["task", "name"])
    )
    shared = [task for task in same["task"].unique() if task in TASKS] if kind == PROTOCOL and study.is_ours else []
    paper = [
        {"task": task, "name": f"{key}, published", "top1": table6().loc[key, task]}
        for task in shared
        for key in dict.fromkeys(("aim-7B", best_frozen(task)))
    ]
    return pd.concat([own.sort_values("top1"), pd.DataFrame(paper, columns=own.columns)], ignore_index=True)


def _loss_accuracy(study: Study) -> Iterator[PageFigure]:
    probes = study.probes
    if probes.empty or "val_loss" not in probes or probes["val_loss"].isna().all():
        return
    for kind in probe_kinds(probes):
        rows = probes[probes["kind"] == kind]
        found = {task: study.correlations.get((kind, task), ()) for task in dict.fromkeys(rows["task"])}
        links = {task: link for (each, task), link in study.links.items() if each == kind}
        caption = (
            f"{_capital(accuracy_of(kind))} and validation loss. Brackets: 95 % intervals of the correlations, "
            "at equal compute first; over all rows both follow compute. "
            "Line and band: a sigmoid above chance with its 95 % interval."
        )
        figure = plot_loss_accuracy(rows, found, links)
        yield page_figure(html_id("loss-accuracy", kind), f"Loss against {accuracy_of(kind)}", caption, figure)


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _training(study: Study) -> Iterator[PageFigure]:
    curves = study.curves.dropna(subset=["val_loss", "params_total"])
    if curves.empty:
        return
    probes = probe_frame(study.curves)
    kinds = probe_kinds(probes)
    budgets = complete(study.main).dropna(subset=["val_loss", "params_total"])
    figure = plot_curves(curves, budgets, probes[probes["kind"] == kinds[0]] if kinds else probes)
    told = " Markers: budgets, each joined to the point where its decay began."
    told += "".join(f" {flag}" for flag in plateau_flags(budgets))
    yield page_figure("curves", "Training curves", f"Validation loss during training, before decays.{told}", figure)


def _frontiers(study: Study) -> Iterator[PageFigure]:
    """N*(C) by every approach that the table allows."""
    found = study.approaches
    if found is None or not found.frontiers:
        return
    caption = "Lines: N* as a power of C, dotted beyond the measured compute. Shading: 95 % intervals."
    yield page_figure("frontier", "Compute-optimal size", caption, plot_approaches(found))


def _published(study: Study) -> Iterator[PageFigure]:
    """The released AIMs and these runs, where a task is one of the paper's and was read by its protocol."""
    comparison = study.comparison
    if comparison is None or comparison.tasks.empty or "params_total" not in comparison.tasks:
        return
    ours = comparison.tasks
    blocks = LAST if (ours["blocks"] == LAST).any() else ours["blocks"].iloc[0]
    sizes = published_frame().set_index("size")["params_total"]
    rows = [
        {"task": task, "params_total": num, "top1": table6().loc[name, task]}
        for name, num in zip(map(str, sizes.index), sizes, strict=True)
        for task in ours["task"].unique()
    ]
    words = {CHOSEN: ", on chosen blocks", LAST: ", on the last blocks"}
    caption = (
        f"Attentive probe, frozen features: these runs at their largest budgets{words.get(blocks, '')}, AIM on its "
        "last six blocks."
    )
    figure = plot_published(ours[ours["blocks"] == blocks], pd.DataFrame(rows))
    yield page_figure("published-models", "Beside the published AIM models", caption, figure)
