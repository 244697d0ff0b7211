"""What single changes, repeats and noise come to: words first, then a figure and the numbers, folded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from aimscale.analysis.effects.contrasts import Contrasts
from aimscale.analysis.effects.noise_sources import Noise
from aimscale.analysis.effects.repetition import Repeats
from aimscale.analysis.plots.intervals import plot_contrasts, plot_noise, plot_repeats
from aimscale.analysis.plots.style import human
from aimscale.analysis.report.figures import PageFigure, page_figure
from aimscale.analysis.report.study import Study
from aimscale.analysis.report.tables import PageTable, page_table
from aimscale.analysis.table.measures import BLOCKS, KIND
from aimscale.analysis.words import flag_words


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One question with its answer."""

    section: str
    """`laws`, `changes` or `noise`."""
    title: str
    sentences: tuple[str, ...]
    figure: PageFigure
    tables: tuple[PageTable, ...]


TITLES = {
    "prefix": "How prefixes are drawn while training",
    "head_depth": "Depth of the pixel head",
    "head_rule": "The pixel head",
    "patch_order": "Order of patches",
    "target": "What is predicted",
    KIND: "Kinds of probes",
    BLOCKS: "Blocks chosen on a hold-out against the last ones",
}
"""Column -> heading."""


def findings(study: Study) -> Iterator[Finding]:
    """Every finding that the tables allow, in reading order."""
    if study.repeats is not None:
        yield _repeats(study.repeats)
    for name, found in study.contrasts.items():
        yield _change(name, found)
    if study.noise is not None:
        yield _noise(study.noise)


def _change(name: str, found: Contrasts) -> Finding:
    key, title = f"contrast-{''.join(c if c.isalnum() else '-' for c in name)}", TITLES.get(name, f"Effect of {name}")
    caption = (
        f"{name} against {found.baseline}, with 95 % intervals; small ticks are pairs of runs. Filled marks: the "
        "interval leaves zero out."
    )
    pairs = pd.concat(
        each.pairs.assign(measure=each.measure.name, level=each.level, baseline=each.baseline)
        for each in found.contrasts
    )
    note = (
        f"Against {found.baseline}; equal within pairs: {', '.join(found.equal) or 'all else'}. Losses in their unit, "
        "accuracies as fractions."
    )
    columns = ("measure", "level", "num_run_pairs", "num_pairs", "baseline_mean", "level_mean", "difference", "low")
    numbers = page_table(
        f"{key}-table", f"{name}, every difference", note, found.table, (*columns, "high", "detectable", "verdict")
    )
    return Finding(
        section="changes",
        title=title,
        sentences=tuple(change_words(found)),
        figure=page_figure(key, "changes", f"{title}, differences", caption, plot_contrasts(found), pairs),
        tables=(numbers,),
    )


def change_words(found: Contrasts) -> Iterator[str]:
    """A sentence per loss and per accuracy that differs, how many others do not, and what to be careful about."""
    told = [each for each in found.contrasts if not each.measure.is_accuracy or each.is_shown]
    yield from (each.sentence() for each in told)
    if rest := len(found.contrasts) - len(told):
        yield f"{rest} of {len(found.contrasts)} differences are not shown: see the table."
    yield from flag_words(found.flags)


def _noise(found: Noise) -> Finding:
    frame = found.table
    frame[["value", "low", "high"]] *= 100
    caption = "Standard deviation of the loss by source, per cent of the loss, with 95 % intervals or ranges."
    cells = page_table(
        "noise-cells",
        "Between seeds, cell by cell",
        "Standard deviation of ln loss over seeds.",
        found.cells.rename(columns={"mean": "mean loss"}),
        ("size", "images_seen", "num_seeds", "mean loss", "sd"),
    )
    return Finding(
        section="noise",
        title="Standard deviations by source, per cent of the loss",
        sentences=tuple(found.sentences()),
        figure=page_figure("noise-parts", "noise", "Sources of spread", caption, plot_noise(found), frame),
        tables=(cells,) if len(found.cells) else (),
    )


def _repeats(found: Repeats) -> Finding:
    caption = (
        f"{found.fit.law.formula}. Marks: measurements at the size with most pool sizes; lines: the law; dotted: were "
        f"every {found.sample} new."
    )
    title, points = f"Loss against {found.sample}s seen, by pool size", found.curves()[1]
    numbers = page_table(
        "repeats-table",
        f"The worth of the k-th pass over the same {found.sample}s",
        f"As a share of a new {found.sample}'s; passes beyond {human(found.max_epochs)} were not measured.",
        found.table,
        ("epochs", "worth", "worth_low", "worth_high", "effective", "effective_low", "effective_high"),
    )
    return Finding(
        section="laws",
        title=f"What repeated {found.sample}s are worth",
        sentences=tuple(found.sentences()),
        figure=page_figure("repeats", "laws", title, caption, plot_repeats(found), points),
        tables=(numbers,),
    )
