"""Parameters of the laws, what they expect, whether they extrapolate."""

from __future__ import annotations

import pandas as pd

from aimscale.analysis.plots.style import human
from aimscale.analysis.report.cells import PageTable, number, page_table, prose, spans, text, whole
from aimscale.analysis.report.expected import forecasts
from aimscale.analysis.report.study import Study


def law_tables(study: Study) -> list[PageTable]:
    """The parameters of every fit."""
    tables = []
    for key, fit in study.fits.items():
        frame = fit.table
        frame["shown"] = [fit.shown(name) for name in fit.params]
        numeric = [None if isinstance(v, str) else float(v) for v in frame["value"]]
        frame["value"] = pd.Series(numeric, dtype="float64")
        tables.append(
            page_table(
                f"law-{key}",
                f"{fit.law.formula}, fitted to {fit.num_points} points",
                f"Rows: {study.selections.get(key, 'all')}. Intervals: {fit.interval_method}.",
                frame,
                [
                    ("parameter", "parameter", text),
                    ("shown", f"value [{100 * fit.confidence:.0f} % interval]", text),
                    ("note", "note", prose),
                ],
            )
        )
    return tables


def forecast_table(study: Study) -> PageTable | None:
    """What the law that predicts best expects beyond the table."""
    frame, law = forecasts(study), study.forecaster
    if frame.empty or law is None:
        return None
    frame["scale"] = [f"{n:g} × N, {d:g} × D" for n, d in zip(frame["times_n"], frame["times_d"], strict=True)]
    frame["interval"] = spans(frame["pi_lo"], frame["pi_hi"], number(4))
    return page_table(
        "forecast",
        "What the joint law expects beyond this table",
        f"By {law.law.formula}, from the largest size and budget. The interval is for one new measurement; it assumes "
        "that the law holds there, unverified as far as the last column says.",
        frame,
        [
            ("scale", "scale", text),
            ("N", "N", human),
            ("D", f"D ({study.samples})", human),
            ("value", "expected loss", number(4)),
            ("interval", "95 % prediction interval", text),
            ("beyond_range", "beyond range (×)", number(1)),
        ],
    )


def heldout_table(study: Study) -> PageTable | None:
    """Extrapolation tests of the joint law."""
    joint = study.fits.get("ND")
    if joint is None or not joint.heldout:
        return None
    frame = pd.DataFrame(
        {
            "variable": f"largest {test.variable} ({', '.join(map(human, test.values))})",
            "num_train": test.num_train,
            "num_test": test.num_test,
            "error": test.mean_abs_relative_error,
            "naive": test.naive_mean_abs_relative_error,
            "inside": f"{test.num_inside} of {test.num_test}",
        }
        for test in joint.heldout
    )
    return page_table(
        "heldout",
        "Does the law extrapolate?",
        f"Fitted without the largest scale, then compared with it. The baseline is {joint.heldout[0].naive}.",
        frame,
        [
            ("variable", "left out", text),
            ("num_train", "fitted", whole),
            ("num_test", "predicted", whole),
            ("error", "mean error of the law (%)", lambda v: f"{100 * v:.2f}"),
            ("naive", "of the baseline (%)", lambda v: f"{100 * v:.2f}"),
            ("inside", "inside their 95 % interval", text),
        ],
    )


def frontier_table(study: Study) -> PageTable | None:
    """Exponents of N*(C) by each approach."""
    if study.approaches is None or not study.approaches.frontiers:
        return None
    return page_table(
        "frontiers",
        "Compute-optimal size, by approach",
        "N* grows as a power of C; 1: envelope of training curves, 2: a parabola at each compute, 3: the joint law. "
        "Low and high: 95 % interval, of the exponent less the bias that the approach has by itself on this design.",
        study.approaches.table,
        [
            ("approach", "approach", whole),
            ("exponent", "exponent", number(3)),
            ("low", "low", number(3)),
            ("high", "high", number(3)),
            ("bias", "its own bias", number(3)),
            ("method", "method", prose),
            ("refused", "budgets refused", whole),
        ],
    )
