"""Text of README and docs/demo.md about the demo, and its figures, from the tables that the demo left.

    python docs/generate/demo.py aimscale-runs/demo    # takes its tables over, draws the figures, rewrites both pages

The tables are kept in `docs/figures/demo/`; a test compares the pages with them. README has the first lines of the
report itself, so the two cannot disagree.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from aimscale.analysis import correlate, fit, frontier, held_out, laws, plot_fit, probe_frame, read_table
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.plots.accuracy import plot_loss_accuracy
from aimscale.analysis.plots.style import png_bytes
from aimscale.analysis.report.findings import findings
from aimscale.analysis.report.study import study_tables
from aimscale.analysis.report.verdict import verdict
from aimscale.analysis.table.read import read_tables

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "docs/figures/demo"
FIGURES = ROOT / "docs/figures/demo.png", ROOT / "docs/figures/demo-accuracy.png"
MARKS = "<!-- demo: written by docs/generate/demo.py -->", "<!-- demo: end -->"
TASK = "photographs"


def law(table: pd.DataFrame) -> Fit:
    """Return the joint law of the demo's table."""
    return fit(table, laws.CHINCHILLA)


def first_lines(folder: Path = TABLES) -> str:
    """Write README's text about a run of the demo: the report's own findings and summary, but for what to run next."""
    tables = [folder / "results.parquet"]
    study = study_tables(tables, read_tables(tables))
    lines = [f"- **{each.sentence}.** {each.detail}" for each in findings(study)]
    lines += [f"- **{line.question.rstrip('?')}**: {line.answer}" for line in verdict(study)[:-1]]
    text = "\n".join([*lines, ""])
    return text.replace("alpha", "α").replace("beta", "β")


def section(folder: Path = TABLES) -> str:
    """Write the text of docs/demo.md about a run of the demo, in Markdown."""
    table = read_table(folder / "results.parquet")
    return "\n".join([*_law(table), "", *_accuracy(table, folder), ""])


def _law(table: pd.DataFrame) -> Iterator[str]:
    joint = law(table)
    predicted = joint.predict({"N": table["params_total"].to_numpy(), "D": table["images_seen"].to_numpy()})["value"]
    residual = np.median(np.abs(predicted.to_numpy() / table["val_loss"].to_numpy() - 1))
    yield (
        f"- **Loss follows a joint law**: L = E + A N^-α + B D^-β with α = {joint.shown('alpha', 3)}, "
        f"β = {joint.shown('beta', 3)}, E = {joint.shown('E', 3)}."
    )
    yield f"  Its {joint.num_points} points lie {100 * residual:.1f} % off it (median)."
    model, budget = (held_out(joint, table, by=by) for by in ("N", "D"))
    yield (
        "- **It predicts what it has not seen**: the largest model within "
        f"{100 * model.mean_abs_relative_error:.1f} % (a straight line in log-log: "
        f"{100 * model.naive_mean_abs_relative_error:.1f} %), the largest budget within "
        f"{100 * budget.mean_abs_relative_error:.1f} % ({100 * budget.naive_mean_abs_relative_error:.1f} %)."
    )
    if unknown := model.not_identified & {"alpha", "beta"}:
        yield f"  Without the largest model {' and '.join(sorted(unknown))} cannot be identified."
    exponents = [
        f"C^{each.exponent:.2f} [{each.exponent_interval.low:.2f}, {each.exponent_interval.high:.2f}] by approach "
        f"{each.approach}"
        for each in frontier(table).frontiers
    ]
    yield f"- **The compute-optimal size grows** as {', '.join(exponents)}."


def _accuracy(table: pd.DataFrame, folder: Path) -> Iterator[str]:
    """Write a row per task and kind of probe: accuracies at least and most compute, of baselines, and correlations."""
    probes = probe_frame(table).sort_values("flops_train")
    baselines = probe_frame(read_table(folder / "baselines.parquet")).set_index(["task", "kind", "size"])["top1"]
    names = list(dict.fromkeys(baselines.index.get_level_values("size")))
    yield (
        f"| task, probe | least compute | most compute | {' | '.join(names)} | Pearson with loss, at equal compute | "
        "within a size | over all runs |"
    )
    yield "|---|---|---|" + "---|" * (len(names) + 3)
    for task, kind in probes[["task", "kind"]].drop_duplicates().to_numpy():
        rows = probes[(probes["task"] == task) & (probes["kind"] == kind)]
        equal, pooled = correlate(rows, methods=("pearson",))
        (inside,) = correlate(rows, methods=("pearson",), within="size")
        top1 = [*rows["top1"].iloc[[0, -1]], *(baselines[task, kind, name] for name in names)]
        told = [f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in (equal, inside, pooled)]
        yield f"| {task}, {kind} | {' | '.join([*(f'{100 * each:.0f} %' for each in top1), *told])} |"


def _of_task(table: pd.DataFrame) -> pd.DataFrame:
    probes = probe_frame(table)
    return probes[probes["task"] == TASK]


def draw(table: pd.DataFrame) -> None:
    """README's figures: loss against parameters with the law, and the task's accuracy against loss."""
    probes = _of_task(table)
    probes = probes[probes["kind"] == "linear"].assign(task=f"{TASK}, linear probe")
    pearson = correlate(probes, methods=("pearson",))
    figures = plot_fit(law(table), x="N"), plot_loss_accuracy(probes, {probes["task"].iloc[0]: pearson})
    for path, figure in zip(FIGURES, figures, strict=True):
        path.write_bytes(png_bytes(figure))


def rewrite(page: str, text: str) -> str:
    """Return a page with the text between the marks."""
    before, after = (re.escape(mark) for mark in MARKS)
    return re.sub(f"(?<={before}\n).*?(?={after})", lambda _: text, page, flags=re.DOTALL)


PAGES = {ROOT / "README.md": first_lines, ROOT / "docs/demo.md": section}
"""Page -> what stands between its marks."""


def main(demo: Path) -> None:
    """Take the tables over, draw, rewrite."""
    TABLES.mkdir(exist_ok=True)
    for name in ("results.parquet", "baselines.parquet"):
        if demo.resolve() != TABLES:
            shutil.copyfile(demo / name, TABLES / name)
    draw(read_table(TABLES / "results.parquet"))
    for page, write in PAGES.items():
        page.write_text(rewrite(page.read_text(), write()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
