"""Text of README and docs/quickstart.md about the demo, and its figures, from the tables that the demo left.

    python docs/generate/demo.py aimscale-runs/demo             # takes its tables over, draws, rewrites both pages
    python docs/generate/demo.py aimscale-runs/demo OTHER ...   # and adds runs with other seeds or another torch

The tables are kept in `docs/figures/demo/`; a test compares the pages with them. README has the first lines of the
report itself, so the two cannot disagree.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from aimscale.analysis import correlate, probe_frame, read_table
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.plots.style import png_bytes
from aimscale.analysis.report.study import Study, study_tables
from aimscale.analysis.report.summary import findings, verdict
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.select import read_tables

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "docs/figures/demo"
FIGURES = ROOT / "docs/figures/demo.png", ROOT / "docs/figures/demo-accuracy.png"
MARKS = "<!-- demo: written by docs/generate/demo.py -->", "<!-- demo: end -->"
SEEDS = "seeds.csv"


def study_of(folder: Path) -> Study:
    """Study a demo's table as its report does."""
    tables = [folder / "results.parquet"]
    return study_tables(tables, read_tables(tables))


def first_lines(folder: Path = TABLES) -> str:
    """Write README's text about a run of the demo: the report's own findings, and whether to trust them."""
    study = study_of(folder)
    lines = [f"- **{each.title}.** {each.caption}" for each in findings(study)]
    lines += [f"- **{line.question.rstrip('?')}**: {line.answer}" for line in verdict(study)[:1]]
    text = "\n".join([*lines, ""])
    return text.replace("alpha", "α").replace("beta", "β")


def section(folder: Path = TABLES) -> str:
    """Write the text of docs/quickstart.md about the runs of the demo, in Markdown."""
    table = read_table(folder / "results.parquet")
    return "\n".join([ranges(read_seeds(folder)), "", *_accuracy(table, folder), ""])


def read_seeds(folder: Path) -> pd.DataFrame:
    """Read the summaries of runs by seed and torch."""
    return pd.read_csv(folder / SEEDS, dtype={"torch": str})


def ranges(seeds: pd.DataFrame) -> str:
    """Say in a sentence what all seeds show."""
    errors = [f"{_span(seeds[v] * 100)} % (a straight line: {_span(seeds[f'{v}_line'] * 100)} %)" for v in ("N", "D")]
    torch = " and ".join(sorted(seeds["torch"].unique()))
    known = [f"{seeds[f'{v}_tests'].astype(bool).sum()} times" for v in "ND"]
    return (
        f"We ran the demo {len(seeds)} times, with {seeds['seed'].nunique()} seeds, on torch {torch}. α "
        f"was {_span(seeds['alpha'])} and β {_span(seeds['beta'])}. The error on "
        f"the left-out largest size was {errors[0]}, and on the largest budget {errors[1]}. Without the largest size, "
        f"the exponents were identified {known[0]}, and without the largest budget {known[1]}. Over all "
        f"rows, where both follow compute, loss and k-NN accuracy correlated by {_span(seeds['r'])}."
    )


def _span(values: pd.Series) -> str:
    low, high = (f"{each:.2g}" for each in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def seed_row(folder: Path) -> dict[str, Any]:
    """Summarise the runs of one seed: its law, hold-outs and accuracies."""
    study = study_of(folder)
    joint: Fit = study.get("law")
    tests = {test.variable: test for test in joint.heldout}
    probes, *_, r = study.probes, *correlate(study.probes, methods=("pearson",))
    pixels = probe_frame(read_table(folder / "baselines.parquet")).frame.set_index("size")["top1"]["raw-pixels"]
    return {
        "seed": study.frame["seed"].iloc[0],
        "law": joint.law.name,
        "alpha": joint.params["alpha"],
        "beta": joint.params["beta"],
        **{v: tests[v].mean_abs_relative_error for v in "ND"},
        **{f"{v}_line": tests[v].naive_mean_abs_relative_error for v in "ND"},
        **{f"{v}_tests": tests[v].is_test for v in "ND"},
        "r": r.value,
        "least": probes["top1"].min(),
        "most": probes["top1"].max(),
        "pixels": pixels,
    }


def _torch(folder: Path) -> str:
    """Read the minor version of torch that trained a sweep."""
    run = json.loads(next(folder.glob("runs/*/results.json")).read_text())
    return str(run["starts"][0]["packages"]["torch"].rpartition(".")[0])


def _accuracy(table: Runs, folder: Path) -> Iterator[str]:
    """Write a row per task and kind of probe: accuracies at least and most compute, of baselines, and correlations."""
    probes = probe_frame(table).frame.sort_values("flops_train")
    baselines = probe_frame(read_table(folder / "baselines.parquet")).frame.set_index(["task", "kind", "size"])["top1"]
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


def draw(folder: Path = TABLES) -> None:
    """Draw README's figures: loss against parameters with the law, and k-NN accuracy against loss."""
    for path, each in zip(FIGURES, findings(study_of(folder)), strict=True):
        path.write_bytes(png_bytes(each.draw()))


def rewrite(page: str, text: str) -> str:
    """Return a page with the text between the marks."""
    before, after = (re.escape(mark) for mark in MARKS)
    return re.sub(f"(?<={before}\n).*?(?={after})", lambda _: text, page, flags=re.DOTALL)


PAGES = {ROOT / "README.md": first_lines, ROOT / "docs/quickstart.md": section}
"""Page -> what stands between its marks."""


def main(demo: Path, others: list[Path]) -> None:
    """Take the tables over, add a row per other run, draw, rewrite the pages."""
    TABLES.mkdir(exist_ok=True)
    for name in ("results.parquet", "baselines.parquet"):
        if demo.resolve() != TABLES:
            shutil.copyfile(demo / name, TABLES / name)
    rows = pd.DataFrame([seed_row(each) | {"torch": _torch(each)} for each in others]).round(4)
    seeds = pd.concat([read_seeds(TABLES), rows])
    seeds.drop_duplicates(["torch", "seed"], keep="last").sort_values(["torch", "seed"]).to_csv(
        TABLES / SEEDS, index=False
    )
    draw()
    for page, write in PAGES.items():
        page.write_text(rewrite(page.read_text(), write()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
