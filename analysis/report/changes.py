"""What the report says of single changes, repeats, definitions and noise: words first, a figure, the numbers folded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from aimscale.analysis.effects.compared import Contrasts
from aimscale.analysis.plots.intervals import plot_contrasts, plot_definitions, plot_noise, plot_repeats
from aimscale.analysis.plots.style import human
from aimscale.analysis.report.cells import PageTable, number, page_table, text, whole
from aimscale.analysis.report.figures import PageFigure, page_figure
from aimscale.analysis.report.study import Study
from aimscale.analysis.table.measures import BLOCKS, KIND


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One question with its answer."""

    section: str
    """`laws`, `changes` or `noise`."""
    title: str
    sentences: tuple[str, ...]
    figure: PageFigure | None
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


def findings(study: Study) -> list[Finding]:
    """Every finding that the tables allow, in reading order."""
    return [*_laws(study), *_changes(study), *_noise(study)]


def _changes(study: Study) -> Iterator[Finding]:
    for name, found in study.contrasts.items():
        key = f"contrast-{''.join(c if c.isalnum() else '-' for c in name)}"
        pairs = [
            each.pairs.assign(measure=each.measure.name, level=each.level, baseline=each.baseline)
            for each in found.contrasts
        ]
        caption = (
            f"{name} against {found.baseline}, with 95 % intervals; small ticks are pairs of runs. Filled marks: the "
            "interval leaves zero out."
        )
        title = TITLES.get(name, f"Effect of {name}")
        figure = page_figure(key, "changes", f"{title}, differences", caption, plot_contrasts(found), pd.concat(pairs))
        yield Finding(
            section="changes",
            title=title,
            sentences=tuple(contrast_words(found)),
            figure=figure,
            tables=(_contrast_table(key, found),),
        )


def contrast_words(found: Contrasts) -> list[str]:
    """One sentence per level, losses first, then how many probes it helps, and what to be careful about."""
    lines = []
    for level in dict.fromkeys(each.level for each in found.contrasts):
        mine = [each for each in found.contrasts if each.level == level]
        parts = []
        for each in mine:
            if each.measure.is_accuracy:
                continue
            change = 100 * each.difference / each.baseline_mean
            low, high = 100 * each.low / each.baseline_mean, 100 * each.high / each.baseline_mean
            ends = f" [{low:+.2f}, {high:+.2f}]" if each.num_run_pairs > 1 else " (one pair: no interval)"
            parts.append(f"{each.measure.title} {change:+.2f} %{ends}, {each.verdict}")
        probes = [each for each in mine if each.measure.is_accuracy]
        if probes:
            named = [
                f"{each.measure.title} {each.measure.shown_difference(each.difference)} "
                f"[{each.measure.shown_difference(each.low)}, {each.measure.shown_difference(each.high)}]"
                for each in probes
                if each.verdict != "not shown to differ"
            ]
            shown = f"{len(named)} of {len(probes)} accuracies shown to differ"
            parts.append(f"{shown}: {'; '.join(named)} points" if named else shown)
        num = {each.num_run_pairs for each in mine}
        over = f"{min(num)} to {max(num)}" if len(num) > 1 else str(num.pop())
        unseen = [each for each in mine if each.verdict == "not shown to differ" and each.num_run_pairs > 1]
        tail = ""
        if unseen:
            first = unseen[0]
            size = first.measure.shown_size(first.detectable)
            tail = f" Where nothing is shown, {size} ({first.measure.title}) would have been seen four times in five."
        lines.append(f"{level} against {found.baseline}, over {over} pairs of runs: {'. '.join(parts)}.{tail}")
    num_intervals = sum(each.num_run_pairs > 1 for each in found.contrasts)
    if num_intervals >= 5:
        lines.append(f"{num_intervals} intervals at 95 %: about {num_intervals / 20:.1g} miss zero by chance alone.")
    return [*lines, *([found.caution] if found.caution else []), *found.left_out]


def _contrast_table(key: str, found: Contrasts) -> PageTable:
    frame = found.table
    form = number(4)
    return page_table(
        f"{key}-table",
        f"{found.by}, every difference",
        f"Against {found.baseline}; equal within pairs: {', '.join(found.equal) or 'all else'}. Losses in their unit, "
        "accuracies as fractions.",
        frame,
        [
            ("measure", "measure", text),
            ("level", "level", text),
            ("num_run_pairs", "pairs of runs", whole),
            ("num_pairs", "pairs of rows", whole),
            ("baseline_mean", f"at {found.baseline}", form),
            ("level_mean", "at the level", form),
            ("difference", "difference", form),
            ("low", "low", form),
            ("high", "high", form),
            ("detectable", "would be seen", form),
            ("verdict", "verdict", text),
        ],
    )


def _noise(study: Study) -> Iterator[Finding]:
    found = study.noise
    if found is None:
        return
    frame = pd.DataFrame([vars(each) for each in found.components])
    for name in ("value", "low", "high"):
        frame[name] = 100 * frame[name]
    caption = "Standard deviation of the loss by source, per cent of the loss, with 95 % intervals or ranges."
    yield Finding(
        section="noise",
        title="Standard deviations by source, per cent of the loss",
        sentences=tuple(found.sentences()),
        figure=page_figure("noise-parts", "noise", "Sources of spread", caption, plot_noise(found), frame),
        tables=(
            page_table(
                "noise-cells",
                "Between seeds, cell by cell",
                "Standard deviation of ln loss over seeds.",
                found.cells,
                [
                    ("size", "size", text),
                    ("images_seen", "D (images)", whole),
                    ("num_seeds", "seeds", whole),
                    ("mean", "mean loss", number(4)),
                    ("sd", "spread (fraction)", number(5)),
                ],
            ),
        )
        if len(found.cells)
        else (),
    )


def _laws(study: Study) -> Iterator[Finding]:
    if study.repeats is not None:
        yield _repeats(study)
    if study.definitions is not None:
        yield _definitions(study)


def _repeats(study: Study) -> Finding:
    found = study.repeats
    assert found is not None
    _, points = found.curves()
    caption = (
        f"{found.fit.law.formula}. Marks: measurements at the size with most pool sizes; lines: the law; dotted: were "
        f"every {found.sample} new."
    )
    figure = page_figure(
        "repeats", "laws", f"Loss against {found.sample}s seen, by pool size", caption,
        plot_repeats(found), points,
    )  # fmt: skip
    return Finding(
        section="laws",
        title=f"What repeated {found.sample}s are worth",
        sentences=tuple(found.sentences()),
        figure=figure,
        tables=(
            page_table(
                "repeats-table",
                f"The worth of the k-th sight of {found.a_sample}",
                f"As a share of a new {found.sample}'s; passes beyond {human(found.max_epochs)} were not measured.",
                found.table,
                [
                    ("epochs", "passes", whole),
                    ("worth", "worth", number(3)),
                    ("worth_low", "low", number(3)),
                    ("worth_high", "high", number(3)),
                    ("effective", "worth of all passes", number(2)),
                    ("effective_low", "low", number(2)),
                    ("effective_high", "high", number(2)),
                ],
            ),
        ),
    )


def _definitions(study: Study) -> Finding:
    found = study.definitions
    assert found is not None
    caption = f"Joint law refitted for every meaning of N; {found.interval_method}."
    figure = page_figure(
        "definitions", "laws", "Exponents by definition", caption, plot_definitions(found), found.table
    )
    return Finding(
        section="laws",
        title="What N and C count",
        sentences=(found.sentence(),),
        figure=figure,
        tables=(
            page_table(
                "definitions-table",
                "Exponents by what N and C count",
                "alpha, beta: exponents of N and D; exponent: of N*(C). Missing: not identified.",
                found.table,
                [
                    ("N", "N", text),
                    ("C", "C", text),
                    *[
                        (f"{name}{end}", f"{name}{end.replace('_', ' ')}", number(3))
                        for name in ("alpha", "beta", "exponent")
                        for end in ("", "_low", "_high")
                    ],
                ],
            ),
        ),
    )
