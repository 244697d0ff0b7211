"""Numbers of the pages on the two studies, from their tables in `tests/studies`.

python docs/generate/studies.py                  # rewrites the tables in docs/study/cifar.md and fashion.md
python docs/generate/studies.py renew cifar      # first renews a study's numbers and figures: where the report changes
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aimscale.analysis.correlation import correlate
from aimscale.analysis.display import in_command
from aimscale.analysis.effects.contrasts import contrast
from aimscale.analysis.effects.result import Contrast
from aimscale.analysis.publication.folder import page_numbers
from aimscale.analysis.report.page import write_page
from aimscale.analysis.report.study import CORRELATION, HELD_OUT, Study, read_study
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.select import probe_frame, read_tables

STUDIES = Path(__file__).parents[1] / "study"
TABLES = Path(__file__).parents[2] / "tests/studies"
FIGURES = Path(__file__).parents[1] / "figures/study"
DRAWN = {"cifar": {"loss-N": "loss-N", "finding-accuracy": "accuracy"}, "fashion": {"loss-N": "loss-N"}}
"""Study -> figure of its report -> its name in `docs/figures/study`."""
PROBED = {"cifar": ["cifar", "cifar-next"], "fashion": ["main", "isoflop", "isoflop-between"]}
"""Study -> tables whose accuracies and losses its page compares within a size."""
WHERE = {"cifar": [], "fashion": ["D>=16384"]}
MARK = "<!-- {}: written by docs/generate/studies.py -->"
CHANGES = (
    ("causal attention instead of a prefix", "prefix", "none"),
    ("no pixel head instead of one block", "head_depth", "0"),
    ("four blocks of head instead of one", "head_depth", "4"),
    ("twelve blocks of head instead of one", "head_depth", "12"),
    ("the authors' spiral instead of raster", "patch_order", "outward_spiral"),
    ("the authors' checkerboard instead of raster", "patch_order", "checkerboard"),
    ("a fixed random order, `hashed`, instead of raster", "patch_order", "hashed"),
    ("raw instead of normalised targets", "target", "raw"),
    ("a fifth of the images crops of other photographs", "data_fingerprint", "666a9a216cd70445"),
    ("Muon instead of AdamW, at AdamW's rate", "optimiser.name", "muon"),
)
"""Name for a reader, column, level."""
KINDS = ("linear", "attentive", "knn")


def record(study: str) -> dict[str, Any]:
    """Read a study's tables, conditions and numbers of the report, by name and subject."""
    told: dict[str, Any] = json.loads((TABLES / study / "numbers.json").read_text())
    return told


def read(study: str) -> Study:
    """Study the tables as their report does."""
    told = record(study)
    return read_study([TABLES / study / name for name in told["tables"]], {}, told["where"])


@in_command()  # sentences name options
def recomputed(study: str) -> dict[str, Any]:
    """Compute the numbers of a study's report."""
    return page_numbers(read(study))


def renew(study: str) -> None:
    """Write a study's numbers and figures anew."""
    told = record(study) | {"numbers": recomputed(study)}
    (TABLES / study / "numbers.json").write_text(json.dumps(told, allow_nan=False) + "\n")
    with tempfile.TemporaryDirectory() as aside:
        write_page(read(study), Path(aside) / "report.html", Path(aside), kinds=("png",))
        for name, ours in DRAWN[study].items():
            shutil.copyfile(Path(aside) / f"{name}.png", FIGURES / f"{study}-{ours}.png")


def sentences(study: str) -> Iterator[str]:
    """Write what the page on a study says of its laws."""
    numbers = record(study)["numbers"]
    law, tests = numbers["law"][""], numbers[HELD_OUT]
    e, alpha, beta = (_interval(law, name, digits) for name, digits in (("E", 3), ("alpha", 2), ("beta", 2)))
    yield f"L = {e} + A N^-{alpha} + B D^-{beta} ({law['num_points']} points)"
    for variable, name in (("N", "size"), ("D", "budget")):
        ours, line = (100 * tests[variable][f"{of}mean_abs_relative_error"] for of in ("", "naive_"))
        yield f"the largest {name} within {ours:.1f} % (a straight line in log-log: {line:.1f} %)"
    if "tuning" in numbers:
        rates = numbers["tuning"][""]["laws"]["lr"]
        yield f"N^{_interval(rates, 'a', 2)} D^{_interval(rates, 'b', 2)}"


def _interval(law: Mapping[str, Any], name: str, digits: int) -> str:
    """Write a parameter with its interval."""
    ends = law["intervals"][name]
    value, low, high = (f"{number:.{digits}f}" for number in (law["params"][name], ends["low"], ends["high"]))
    return f"{value} [{low}, {high}]"


def correlations(study: str) -> str:
    """Write a row per task and probe: correlation of loss and accuracy at equal compute, within a size, over all."""
    folder = TABLES / study
    rows = read_tables([folder / f"{name}.parquet" for name in PROBED[study]], where=WHERE[study])
    probes = probe_frame(rows)
    lines = ["| probe | at equal compute | within a size | over all runs |", "|---|---|---|---|"]
    for subject, found in record(study)["numbers"][CORRELATION].items():
        task, kind = subject.split(":")
        chosen = probes[(probes["task"] == task) & (probes["kind"] == kind)]
        within = [each for each in correlate(chosen, within="size") if each.method == "pearson"][-1]
        equal, over_all = (
            next(c for c in found["correlations"] if c["method"] == "pearson" and bool(c["partial_on"]) is is_equal)
            for is_equal in (True, False)
        )
        told = [(c["value"], c["low"], c["high"]) for c in (equal, over_all)]
        told.insert(1, (within.value, within.low, within.high))
        cells = " | ".join(f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in told)
        lines.append(f"| {task}, {'k-NN' if kind == 'knn' else kind} | {cells} |")
    return "\n".join([*lines, ""])


def directions() -> str:
    """Write a row per change: loss, compute, and each kind of probe."""
    tables = TABLES / "cifar"
    rows = read_tables([tables / "cifar.parquet", tables / "cifar-directions.parquet"])
    rows = rows[rows["size"].isin(["w20-d2", "w52-d2"])]
    return "\n".join([*_lines(rows), ""])


def _lines(rows: Runs) -> Iterator[str]:
    yield "| change | validation loss, % | FLOPs, % | linear, points | attentive | k-NN |"
    yield "|---|---|---|---|---|---|"
    ignored = {"data_fingerprint": ["unique_images"]}
    contrasts = {by: contrast(rows, by=by, ignore=ignored.get(by, [])) for _, by, _ in CHANGES}
    for words, by, level in CHANGES:
        found = {each.measure.name: each for each in contrasts[by].contrasts if each.level == level}
        by_kind = {name.rsplit(":", 1)[-1]: each for name, each in found.items() if name != "val_loss"}
        loss = found.get("val_loss")
        cells = [
            "another question" if by == "patch_order" else _ratio(loss),
            _flops(rows, by, level),
            *(_points(by_kind[kind]) for kind in KINDS),
        ]
        yield f"| {words} | {' | '.join(cells)} |"


def _ratio(loss: Contrast | None) -> str:
    if loss is None:
        return "another unit"
    return _bold(loss, *(100 * (each - 1) for each in (loss.ratio, loss.ratio_low, loss.ratio_high)))


def _points(accuracy: Contrast) -> str:
    return _bold(accuracy, *(100 * each for each in (accuracy.difference, accuracy.low, accuracy.high)))


def _bold(found: Contrast, value: float, low: float, high: float) -> str:
    """Write a difference with its interval, bold where that misses zero."""
    text = f"{value:+.1f} [{low:.1f}, {high:.1f}]"
    return text if not found.is_significant else f"**{text}**"


def _flops(rows: Runs, by: str, level: str) -> str:
    ignored = ["unique_images"] if by == "data_fingerprint" else []
    found = contrast(rows, by=by, ignore=ignored, measures=["flops_train"]).contrasts
    ratio = next(each.ratio for each in found if each.level == level)
    return f"{100 * (ratio - 1):+.0f}"


def rewrite(study: str) -> str:
    """Return the page on a study with its tables between their marks."""
    page = page_of(study).read_text()
    for name, write in {"directions": directions, "correlations": lambda: correlations(study)}.items():
        start, end = f"{MARK.format(name)}\n\n", f"\n<!-- {name}: end -->"
        before, found, rest = page.partition(start)
        if found:
            page = f"{before}{start}{write()}{end}{rest.partition(end)[2]}"
    return page


def page_of(study: str) -> Path:
    """Name the page on a study."""
    return STUDIES / f"{study}.md"


if __name__ == "__main__":
    if sys.argv[1:2] == ["renew"]:
        for study in sys.argv[2:]:
            renew(study)
    for study in PROBED:
        page_of(study).write_text(rewrite(study))
