"""The figures of a report: which ones a table allows, each with a caption, its data and its files."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.frontier.approaches import Approaches
from aimscale.analysis.frontier.measured import isoflop_points
from aimscale.analysis.frontier.optimum import points_of
from aimscale.analysis.plots.laws import plot_approaches, plot_cloud, plot_forecasts, plot_isoflop, plot_surface
from aimscale.analysis.plots.parts import axis_label
from aimscale.analysis.plots.scaling import (
    plot_beside_published,
    plot_fit,
    plot_loss_accuracy,
    plot_points,
    plot_residuals,
)
from aimscale.analysis.plots.style import human, png_bytes, svg_text, themed_svg
from aimscale.analysis.published.published import published_frame
from aimscale.analysis.report.study import Study, probe_kinds
from aimscale.analysis.report.tables import csv_uri
from aimscale.analysis.table.design import MEASURED_ON
from aimscale.analysis.table.names import names_of
from aimscale.analysis.table.read import loss_unit
from aimscale.analysis.table.select import widest_slice
from aimscale.analysis.words import accuracy_of


@dataclass(frozen=True, kw_only=True)
class PageFigure:
    """One figure of the page."""

    key: str
    """HTML id and file name of the downloads."""
    section: str
    """`scaling`, `accuracy`, `checks` or `published`."""
    title: str
    """Heading: what the figure shows."""
    caption: str
    """What is drawn, with the formula and its interval where a law is."""
    svg: str
    """Inline SVG whose colours follow the page's theme."""
    svg_uri: str
    png_uri: str
    csv_uri: str | None
    """The drawn points as a data URI, or None when they are too many."""


def page_figure(key: str, section: str, title: str, caption: str, figure: Figure, data: pd.DataFrame) -> PageFigure:
    """Render a figure in every format the page offers."""
    return PageFigure(
        key=key,
        section=section,
        title=title,
        caption=caption,
        svg=themed_svg(figure, key, f"{title}. {caption}"),
        svg_uri=data_uri("image/svg+xml", svg_text(figure).encode()),
        png_uri=data_uri("image/png", png_bytes(figure)),
        csv_uri=csv_uri(data),
    )


def data_uri(mime: str, content: bytes) -> str:
    """Content that travels inside the page."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def page_figures(study: Study) -> Iterator[PageFigure]:
    """Every figure that the table allows, in reading order."""
    yield from _scaling(study)
    yield from _accuracy(study)
    joint = study.fits.get("ND")
    if joint is not None:
        yield from _checks(study, joint)
    if study.approaches is not None and study.approaches.frontiers:
        yield from _frontiers(study, study.approaches)
    yield from _published(study)


def _law_caption(study: Study, key: str) -> str:
    """Formula, parameters with intervals, points and rows of a fit."""
    fit = study.fits[key]
    values = "; ".join(f"{p.name} = {fit.shown(p.name)}" for p in fit.law.parameters)
    return (
        f"{fit.law.formula}: {values}. Brackets: {100 * fit.confidence:.0f} % intervals, shaded for the curve. "
        f"{fit.num_points} points ({study.selections.get(key, 'all rows')})."
    )


def _scaling(study: Study) -> Iterator[PageFigure]:
    usable, fits = study.usable, study.fits
    se, bars = _error_bars(usable)
    for key, x, by, title in (
        ("N", "params_total", "images_seen", "Loss against parameters"),
        ("D", "images_seen", "params_total", f"Loss against {study.samples} seen"),
        ("C", "flops_train", None, "Loss against compute"),
    ):
        if usable.empty or x not in usable or usable[x].isna().all():
            continue
        rows = usable[[x, "val_loss"]].dropna()
        if key == "C" and key in fits:
            figure = plot_fit(fits["C"], se=se, background=rows.set_axis(["x", "y"], axis=1))
            caption = f"Grey: all measurements; blue: the envelope. {_law_caption(study, 'C')}{bars}"
        elif key != "C" and "ND" in fits:
            figure, rows = plot_fit(fits["ND"], x=key, se=se), fits["ND"].data
            caption = (_law_caption(study, "ND") if key == "N" else "The same law, a line for each size.") + bars
        elif key in fits:
            figure, caption, rows = plot_fit(fits[key], se=se), _law_caption(study, key) + bars, fits[key].data
        else:
            figure = plot_points(usable, x, by=by if by in usable and usable[by].notna().all() else None)
            caption = "No law could be fitted; see what is missing."
        yield page_figure(f"loss-{key}", "scaling", title, caption, figure, rows)


def _error_bars(usable: pd.DataFrame) -> tuple[pd.Series | None, str]:
    """Standard errors to draw and the caption's words for them.

    Runs scored on the same images share most of that error: bars would hide how sure their differences are.
    """
    se = usable.get("val_loss_se")
    if se is None or se.isna().all():
        return None, ""
    names = [name for name in MEASURED_ON if name in usable]
    if names and len(usable[names].drop_duplicates()) == 1:
        return None, (
            f" No error bars: all runs are scored on the same images, so their standard error, {se.median():.4f}, "
            "would move all points together; the scatter about the curves is what counts."
        )
    return se, " Bars: ± 1.96 standard errors over validation images."


def _accuracy(study: Study) -> Iterator[PageFigure]:
    probes = study.probes
    if probes.empty or "val_loss" not in probes or probes["val_loss"].isna().all():
        return
    names = ("size", "params_total", "images_seen", "val_loss", "task", "top1", "top1_lo95", "top1_hi95")
    for kind in probe_kinds(probes):
        rows = probes[probes["kind"] == kind]
        found = {task: study.correlations.get((kind, task), ()) for task in dict.fromkeys(rows["task"])}
        links = {task: link for (each, task), link in study.links.items() if each == kind}
        caption = (
            f"Each point is one run at one budget. Bars: 95 % intervals over test images. Brackets: 95 % intervals of "
            f"the correlation of {accuracy_of(kind)} with validation loss. Line: sigmoid above chance, its 95 % band."
        )
        figure, data = plot_loss_accuracy(rows, found, links), rows[[name for name in names if name in rows]]
        yield page_figure(f"accuracy-{kind}", "accuracy", f"Loss against {accuracy_of(kind)}", caption, figure, data)


def _checks(study: Study, joint: Fit) -> Iterator[PageFigure]:
    """Residuals, extrapolation tests, the cloud of exponents and the surface."""
    caption = (
        f"{joint.law.formula}. Points should scatter around zero; a pattern along an axis means that the form does not "
        "describe that variable."
    )
    title = "Residuals of the fitted law"
    yield page_figure("residuals", "checks", title, caption, plot_residuals(joint), joint.data)
    if joint.heldout:
        tests = {f"largest {'model' if t.variable == 'N' else 'budget'}": t.predictions for t in joint.heldout}
        caption = "Fitted without the largest scale, then asked for it. Bars: 95 % prediction intervals."
        data = pd.concat([rows.assign(left_out=label) for label, rows in tests.items()])
        figure = plot_forecasts(tests, axis_label("val_loss", joint.loss_unit, joint.names))
        yield page_figure("held-out", "checks", "Forecast against actual", caption, figure, data)
    if joint.draws:
        caption = f"Each point is one draw of both exponents ({joint.interval_method}); dashed: 95 % intervals."
        draws = pd.DataFrame({name: joint.reported_draws()[name] for name in ("alpha", "beta")})
        yield page_figure("cloud", "checks", "How sure the exponents are", caption, plot_cloud(joint), draws)
    frontiers = study.approaches.frontiers if study.approaches else ()
    path = next((frontier for frontier in frontiers if frontier.approach == 3), None)
    best = ", and the path of least loss at each compute" if path else "; approach 3 has no path of least loss to draw"
    caption, title = f"Contours of equal fitted loss, the measured points{best}.", "The fitted loss over N and D"
    yield page_figure("surface", "checks", title, caption, plot_surface(joint, path), joint.data)


def _frontiers(study: Study, approaches: Approaches) -> Iterator[PageFigure]:
    """N*(C) by every approach that the table allows, and the parabolas where approach 2 is one of them."""
    failed = "".join(f" Approach {number} is not possible here." for number in approaches.failures)
    caption = (
        "Lines: N* ~ C to the exponent, dotted beyond the measured budgets; shaded: 95 % intervals, "
        f"about N* less an approach's own bias on this design.{failed}"
    )
    figure = plot_approaches(approaches)
    yield page_figure("frontier", "checks", "Compute-optimal size", caption, figure, approaches.table)
    isoflop = next((frontier for frontier in approaches.frontiers if frontier.approach == 2), None)
    if isoflop is not None:
        points = isoflop_points(points_of(study.usable, y="val_loss", columns=None))
        caption = "Loss at equal compute with a parabola in ln N; crosses: minima that approach 2 accepts."
        data = pd.concat([frame.assign(C=flops) for flops, frame in points])
        figure = plot_isoflop(points, isoflop.pairs, loss_unit=loss_unit(study.usable), names=names_of(study.usable))
        yield page_figure("isoflop", "checks", "Loss at equal compute", caption, figure, data)


def _published(study: Study) -> Iterator[PageFigure]:
    usable = study.usable
    if not study.is_ours or not {"params_total", "images_seen"} <= set(usable) or usable["params_total"].isna().all():
        return
    rows, seen = widest_slice(usable, "params_total", "images_seen")
    if rows.empty:
        return
    ours = rows.loc[rows.groupby("params_total")["val_loss"].idxmin()].sort_values("params_total")
    sizes = f"{human(ours['params_total'].min())} to {human(ours['params_total'].max())}"
    published, keep = published_frame(), ["params_total", "val_loss"]
    caption = (
        f"Ours: lowest loss of each size after {seen} images, {sizes} parameters. AIM: IN-1k validation "
        "loss of the four published sizes. The levels are not comparable (other images, resolution, patches, prefixes "
        "and budgets); the slopes are, with the cautions below."
    )
    data = pd.concat([ours[keep].assign(family="this table"), published[keep].assign(family="AIM, published")])
    figure = plot_beside_published(ours, published)
    yield page_figure("beside-aim", "published", "Beside the published AIM models", caption, figure, data)
