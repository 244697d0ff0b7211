"""Published results as cited tables: AIM's Table 6, its four sizes, and its ablations beside the same changes here.

`data/*.csv` hold the figures with their sources: copied from the paper (El-Nouby et al., arXiv 2401.08541) in per cent
as printed, or counted from the released weights. The tables made of them hold accuracies as fractions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from aimscale.analysis.effects.result import Contrasts, level_names
from aimscale.analysis.table.design import DEFAULT
from aimscale.analysis.words import human, measured_by

DATA = Path(__file__).parent / "data"
TASKS = (
    *("imagenet-1k", "inat18", "cifar10", "cifar100", "food101", "dtd", "pets", "cars", "iwildcam", "camelyon17"),
    *("pcam", "rxrx1", "eurosat", "fmow", "infographic"),
)
"""The fifteen benchmarks by the names that a sweep's `probes` must use to be compared, in the order of Table 6."""
KINDS = ["linear", "attentive"]
"""Probes of the paper's ablations."""


def _read(name: str, shares: list[str]) -> pd.DataFrame:
    """Read a table whose shares are printed in per cent."""
    out = pd.read_csv(DATA / name)
    return out.assign(**(out[shares] / 100).round(4))


@functools.cache
def table6() -> pd.DataFrame:
    """Read Table 6, all eleven rows: a frozen backbone, an attentive probe, the test splits of fifteen benchmarks.

    Returns:
        By our short name (`aim-7B`): method, arch, data, layers (whose outputs the probe averages: `last 6`, `best 6`,
        or `as published` for the other methods), image_size, one column per task of `TASKS`, printed_mean, source, and
        mean (recomputed).
    """
    out = _read("table6.csv", [*TASKS, "printed_mean"]).set_index("key")
    return out.assign(mean=out[list(TASKS)].mean(axis=1))


@functools.cache
def published_frame() -> pd.DataFrame:
    """Read the four released sizes as a results table.

    Images seen are left out on purpose: the four losses share one number of updates, which Figure 1 does not state.

    Returns:
        size, width, depth; params_trunk (equal to the released files), params_head (never released), params_total,
        flops_per_image (3 x forward, 256 tokens); val_loss (IN-1k, Figure 1); in1k_last6, in1k_best6 (Table 6),
        in1k_lora (Table 8, not frozen); source.
    """
    out = _read("sizes.csv", ["in1k_last6", "in1k_best6", "in1k_lora"]).drop(columns="images_seen")
    return out.astype({"flops_per_image": float})


def best_frozen(task: str) -> str:
    """Find the row of Table 6 with the highest accuracy on a task."""
    return str(table6()[task].idxmax())


@functools.cache
def ablations() -> pd.DataFrame:
    """Read the published cells: ablation, setting, ours (`column=level`, several with | between; empty where a results
    table has no column for it), linear and attentive (top-1 as fractions), task, source.
    """
    return _read("ablations.csv", KINDS).fillna({"ours": ""})


@functools.cache
def _cells() -> dict[str, pd.Series]:
    """Map `column=level` to the cell that means it."""
    return {name: cell for _, cell in ablations().iterrows() for name in cell["ours"].split("|") if name}


def _varied() -> set[str]:
    """List the columns that the paper varied, too."""
    return {"head_depth", *(name.partition("=")[0] for name in _cells())}


def beside_paper(found: Contrasts) -> pd.DataFrame:
    """Put the paper's difference beside each of a contrast, where it has both settings and that kind of probe.

    Returns:
        change (level over baseline, in the paper's words), kind, published (its difference in top-1, a fraction without
        an interval), published_on, task, difference (ours), low, high, over (what the interval covers), N (parameters
        of our smallest and largest run: of the backbone, where the table counts them).
    """
    rows, out = found.rows, list[dict[str, Any]]()
    count = "params_trunk" if "params_trunk" in rows else "params_total"
    asked = (c for c in found.contrasts if c.measure.column == "top1" and c.measure.kind in KINDS)
    for each in asked if found.by in _varied() else ():
        keys, kind = [name for name in each.pairs if name in rows], each.measure.kind
        paired = rows.astype(dict.fromkeys(keys, object)).merge(each.pairs[keys].drop_duplicates())
        names = level_names(paired[found.by])
        ours, theirs = (_settings(paired[names == name], found.by, name) for name in (each.level, each.baseline))
        column = next((c for c in ours if c in theirs), None)
        if column is None or ours[column]["setting"] == theirs[column]["setting"] or pd.isna(ours[column][kind]):
            continue
        level, baseline, sizes = ours[column], theirs[column], (paired[count].min(), paired[count].max())
        row = {"change": f"{level['setting']} over {baseline['setting']}", "kind": kind}
        row |= {"published": level[kind] - baseline[kind], "published_on": level["task"], "task": each.measure.task}
        row |= {name: getattr(each, name) for name in ("difference", "low", "high", "over")}
        out.append(row | {"N": " to ".join(dict.fromkeys(map(human, sizes)))})
    return pd.DataFrame(out)


def _settings(rows: pd.DataFrame, by: str, level: str) -> dict[str, pd.Series]:
    """Map columns to the published cells that rows of a level have: of the one compared, and of the rule of heads.

    Blocks of a head by the rule are no number of their own, and no block at all is the paper's head of none.
    """
    names = {by: level}
    if by == "head_depth" and "head_rule" in rows:
        own = [name for name in ("model.head_depth", "model.head_width", "model.head_kind") if name in rows]
        rules = rows["head_rule"].unique().tolist() if (rows[own] == DEFAULT).all(axis=None) else []
        names |= {"head_rule": "none"} if level == "0" else {"head_rule": rules[0]} if len(rules) == 1 else {}
    return {name: _cells()[f"{name}={each}"] for name, each in names.items() if f"{name}={each}" in _cells()}


def in_words(beside: pd.DataFrame) -> Iterator[str]:
    """Write a sentence per row of `beside_paper`."""
    for row in beside.to_dict("records"):
        interval = f" [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]" if row["over"] else ""
        yield (
            f"{row['change']} {100 * row['published']:+.1f} ({measured_by(row['kind'])} on "
            f"{row['published_on']}, AIM-0.6B); here {100 * row['difference']:+.1f}{interval} "
            f"({row['task']}, N = {row['N']})."
        )
