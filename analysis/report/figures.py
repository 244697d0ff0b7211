"""The figures of a report, each with a caption, its data and its files, and what changes, repeats and noise come to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure

from aimscale.analysis.effects.contrasts import Contrasts
from aimscale.analysis.effects.noise_sources import Noise
from aimscale.analysis.effects.repetition import Repeats
from aimscale.analysis.frontier.approaches import Approaches
from aimscale.analysis.plots.scaling import plot_approaches, plot_fit, plot_loss_accuracy, plot_points
from aimscale.analysis.plots.style import alone, png_bytes, themed_svg
from aimscale.analysis.report.study import Study, probe_kinds
from aimscale.analysis.report.tables import PageTable, data_uri, page_table
from aimscale.analysis.words import accuracy_of, flag_words


@dataclass(frozen=True, kw_only=True)
class PageFigure:
    """One figure of the page."""

    key: str
    """HTML id and file name of the downloads."""
    title: str
    """Heading: what the figure shows."""
    caption: str
    """What is drawn, with the formula and its interval where a law is."""
    svg: str
    """Inline SVG whose colours follow the page's theme."""
    svg_uri: str
    png_uri: str


def page_figure(key: str, title: str, caption: str, figure: Figure) -> PageFigure:
    """Render a figure in every format the page offers."""
    svg = themed_svg(figure, key, f"{title}. {caption}")
    return PageFigure(
        key=key,
        title=title,
        caption=caption,
        svg=svg,
        svg_uri=data_uri("image/svg+xml", alone(svg).encode()),
        png_uri=data_uri("image/png", png_bytes(figure)),
    )


def page_figures(study: Study) -> dict[str, list[PageFigure]]:
    """Every figure that the table allows, by section of the page, in reading order."""
    checks = [_frontiers(study.approaches)] if study.approaches is not None else []
    return {"scaling": [*_scaling(study)], "accuracy": [*_accuracy(study)], "checks": checks}


def _law_caption(study: Study, key: str) -> str:
    """Formula, parameters with intervals, points and rows of a fit."""
    fit = study.fits[key]
    values = "; ".join(f"{p.name} = {fit.shown(p.name)}" for p in fit.law.parameters)
    return f"{fit.law.formula}: {values}. Brackets: 95 % intervals, shaded for the curve. {fit.num_points} points."


def _scaling(study: Study) -> Iterator[PageFigure]:
    usable, fits = study.usable, study.fits
    for key, x, by, title in (
        ("N", "params_total", "images_seen", "Loss against parameters"),
        ("D", "images_seen", "params_total", f"Loss against {study.samples} seen"),
        ("C", "flops_train", None, "Loss against compute"),
    ):
        if usable.empty or x not in usable or usable[x].isna().all():
            continue
        if key == "C" and key in fits:
            rows = usable[[x, "val_loss"]].dropna()
            figure = plot_fit(fits["C"], background=rows.set_axis(["x", "y"], axis=1))
            caption = f"Grey: all measurements; blue: the envelope. {_law_caption(study, 'C')}"
        elif key != "C" and "ND" in fits:
            figure = plot_fit(fits["ND"], x=key)
            caption = _law_caption(study, "ND") if key == "N" else "The same law, a line for each size."
        else:
            figure = plot_points(usable, x, by=by if by in usable and usable[by].notna().all() else None)
            caption = "No law could be fitted; see what is missing."
        yield page_figure(f"loss-{key}", title, caption, figure)


def _accuracy(study: Study) -> Iterator[PageFigure]:
    probes = study.probes
    if probes.empty or "val_loss" not in probes or probes["val_loss"].isna().all():
        return
    for kind in probe_kinds(probes):
        rows = probes[probes["kind"] == kind]
        found = {task: study.correlations.get((kind, task), ()) for task in dict.fromkeys(rows["task"])}
        links = {task: link for (each, task), link in study.links.items() if each == kind}
        bars = "" if rows["top1_lo95"].isna().all() else " Bars: 95 % intervals over test images."
        caption = (
            f"Each point is one run at one budget.{bars} Brackets: 95 % intervals of "
            f"the correlation of {accuracy_of(kind)} with validation loss. Line: sigmoid above chance, its 95 % band."
        )
        figure = plot_loss_accuracy(rows, found, links)
        yield page_figure(_key("accuracy", kind), f"Loss against {accuracy_of(kind)}", caption, figure)


def _key(what: str, name: str) -> str:
    """HTML id of what bears a name of the table's own."""
    return f"{what}-{''.join(c if c.isalnum() else '-' for c in name)}"


def _frontiers(approaches: Approaches) -> PageFigure:
    """N*(C) by every approach that the table allows."""
    failed = "".join(f" Approach {number} is not possible here." for number in approaches.failures)
    caption = f"Lines: N* ~ C to the exponent, dotted beyond the measured budgets; shaded: 95 % intervals.{failed}"
    return page_figure("frontier", "Compute-optimal size", caption, plot_approaches(approaches))


def findings(study: Study) -> dict[str, list[PageTable]]:
    """What repeats, single changes and noise come to, by section of the page."""
    return {
        "laws": [] if study.repeats is None else [_repeats(study.repeats)],
        "changes": [_change(name, found) for name, found in study.contrasts.items()],
        "noise": [] if study.noise is None else [_noise(study.noise)],
    }


def _change(name: str, found: Contrasts) -> PageTable:
    note = (
        f"Against {found.baseline}; equal within pairs: {', '.join(found.equal) or 'all else'}. Losses in their unit, "
        "accuracies as fractions."
    )
    columns = (
        *("measure", "level", "num_run_pairs", "num_pairs", "baseline_mean", "level_mean", "difference", "low", "high"),
        *("detectable", "verdict"),
    )
    title = f"Effect of {name}"
    return page_table(_key("contrast", name), title, note, found.table, columns, sentences=change_words(found))


def change_words(found: Contrasts) -> Iterator[str]:
    """A sentence per loss and per accuracy that differs, how many others do not, and what to be careful about."""
    told = [each for each in found.contrasts if not each.measure.is_accuracy or each.is_significant]
    yield from (each.sentence() for each in told)
    if rest := len(found.contrasts) - len(told):
        yield f"{rest} of {len(found.contrasts)} differences in accuracy are not significant: see the table."
    yield from flag_words(found.flags)


def _noise(found: Noise) -> PageTable:
    frame = found.table
    frame[["value", "low", "high"]] *= 100
    note = "Standard deviation of the loss by source, per cent of the loss, with 95 % intervals or ranges."
    return page_table("noise-parts", "Sources of spread", note, frame, frame.columns, sentences=found.sentences())


def _repeats(found: Repeats) -> PageTable:
    title, frame = f"What repeated {found.sample}s are worth", found.table
    note = (
        f"{found.fit.law.formula}. Worth of pass k, and of all k passes together, in passes over new {found.sample}s."
    )
    return page_table("repeats", title, note, frame, frame.columns, sentences=found.sentences())
