"""The gallery: every figure of the analysis with the call that makes it, drawn when the site is built; and two sample
reports."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from generate import studies

from aimscale.analysis.plots.style import png_bytes
from aimscale.analysis.report.page import write_page, write_report

ROOT = Path(__file__).parents[2]
FIRST = """\
from aimscale.analysis import contrast, correlate, fit, forecast, frontier, laws
from aimscale.analysis import plot_accuracy, plot_loss_accuracy, plot_points
from aimscale.analysis import probe_frame, read_table, read_tables

demo = read_table("docs/figures/demo/results.parquet")
study = "tests/studies/cifar"
cifar = read_tables([f"{study}/cifar.parquet", f"{study}/cifar-next.parquet"])
isoflop = read_table(f"{study}/cifar-isoflop.parquet")
directions = read_tables([f"{study}/cifar.parquet", f"{study}/cifar-directions.parquet"])
"""
CALLS = {
    "law": ("A law and its points, a line per budget", 'figure = fit(demo, laws.CHINCHILLA).plot(x="N")'),
    "compute": (
        "Loss against compute, a line per size",
        'figure = plot_points(cifar, "flops_train", by="params_total")',
    ),
    "frontier": ("The compute-optimal size, by two approaches", "figure = frontier(isoflop).plot()"),
    "accuracy": (
        "Accuracy against size, data and compute",
        'probes = probe_frame(cifar)\nfigure = plot_accuracy(probes[probes["kind"] == "linear"])',
    ),
    "loss-accuracy": (
        "Accuracy against loss, with its correlation",
        'knn = probes[probes["kind"] == "knn"]\nfigure = plot_loss_accuracy(knn, {"cifar10-10k": correlate(knn)})',
    ),
    "forecast": ("A forecast beyond the table", 'figure = forecast(cifar, {"N": 5e6, "D": 1e6}).plot()'),
    "two-laws": (
        "Two laws on one axes",
        'law = fit(demo, "chinchilla")\nfigure = law.plot(label="chinchilla")\n'
        'figure = fit(demo, "kaplan").plot(ax=figure.axes[0], label="kaplan")',
    ),
    "correlations": ("Correlations with their intervals", "figure = correlate(cifar).plot()"),
    "contrast": ("One change, all else equal", 'figure = contrast(directions, by="prefix").plot()'),
}
"""Name -> what the figure shows, and the call."""
REPORTS = ("demo-report", *(f"{study}-report" for study in studies.PROBED))
"""Sample reports of the site: the demo's, and those of the studies."""


def markdown(folder: Path) -> str:
    """Draw every figure into a folder beside the page, and write the page."""
    folder.mkdir(exist_ok=True)
    known: dict[str, Any] = {}
    said = "Every figure of the analysis, and the call that makes it. Run it in a clone of the repository."
    parts = [f"# Gallery\n\n{said}\n\n```python\n{FIRST}```\n"]
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()):
        exec(FIRST, known)
        for name, (title, call) in CALLS.items():
            exec(call, known)
            (folder / f"{name}.png").write_bytes(png_bytes(known["figure"], dpi=150))
            parts.append(f"## {title}\n\n```python\n{call}\n```\n\n![{title}]({folder.name}/{name}.png)\n")
    links = "".join(f'<li><a href="{name}.html">{name}.html</a></li>' for name in REPORTS)
    parts.append(f"## Whole reports\n\n<ul>{links}</ul>\n")
    return "\n".join(parts)


def write_reports(folder: Path) -> None:
    """Write the sample reports into a folder that the site takes over as it is."""
    folder.mkdir(exist_ok=True)
    for study in studies.PROBED:
        if not (page := folder / f"{study}-report.html").exists():
            write_page(studies.read(study), page)
    if not (page := folder / "demo-report.html").exists():
        write_report(ROOT / "docs/figures/demo/results.parquet", page)
