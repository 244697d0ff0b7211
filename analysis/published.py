"""Our runs beside the published baselines: the same task under the same protocol, or named as not comparable.

Nothing is averaged over tasks, and no loss level is put beside the paper's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, Result, by_chance, fact_lines, flag_words, text_table
from aimscale.analysis.distributions import normal_quantile
from aimscale.analysis.effects.result import POWER
from aimscale.analysis.table.files import files_of
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.read import read_table
from aimscale.analysis.table.runs import Runs, Table, joined
from aimscale.analysis.table.schema import FOLDER, frame_cells
from aimscale.analysis.table.select import probe_frame

DATA = Path(__file__).parent / "data"
TASKS = (
    *("imagenet-1k", "inat18", "cifar10", "cifar100", "food101", "dtd", "pets", "cars", "iwildcam", "camelyon17"),
    *("pcam", "rxrx1", "eurosat", "fmow", "infographic"),
)
"""The fifteen benchmarks by the names that a sweep's `probes` must use to be compared, in the order of Table 6."""
PROTOCOL = "attentive"
"""The only probe kind that Table 6 reports."""
ADAPTED = "lora"
"""The kind of probe that is none: it adapts the backbone, and its accuracy is that of no frozen feature."""
PAPER_SIDE = 224
LAST, CHOSEN, UNSAID = "last", "chosen", "not said"
"""Blocks that a probe averages: the last six (the protocol's default), those that a hold-out chose, or unknown ones."""
REFERENCE = {LAST: "aim-7B", CHOSEN: "aim-7B-best", UNSAID: "aim-7B"}
"""AIM-7B's row under the same choice of blocks."""
BASELINES_FILE = "baselines.parquet"
"""Raw pixels, random weights and timm models on the same probes, gathered by `aimscale collect` beside the table, which
laws would take them for runs of; `size` names them."""


def _read(name: str, shares: list[str]) -> pd.DataFrame:
    """Read a table whose shares are printed in per cent."""
    out = pd.read_csv(DATA / name)
    return out.assign(**(out[shares] / 100).round(4))


@functools.cache
def table6() -> pd.DataFrame:
    """Read Table 6, all eleven rows: a frozen backbone, an attentive probe, the test splits of fifteen benchmarks.

    Returns:
        By our short name (`aim-7B`): method, arch, data, layers (whose outputs the probe averages: `last 6`, `best 6`,
        or `as published`), image_size, one column per task of `TASKS`, printed_mean, source, and mean (recomputed).
    """
    out = _read("published-table6.csv", [*TASKS, "printed_mean"]).set_index("key")
    return out.assign(mean=out[list(TASKS)].mean(axis=1))


@functools.cache
def published_frame() -> pd.DataFrame:
    """Read the four released sizes as a results table.

    Images seen are left out: the four losses share one number of updates, which Figure 1 does not state.

    Returns:
        size, width, depth; params_trunk (equal to the released files), params_head (never released), params_total,
        flops_per_image (3 x forward, 256 tokens); val_loss (IN-1k, Figure 1); in1k_last6, in1k_best6 (Table 6),
        in1k_lora (Table 8, not frozen); source.
    """
    out = _read("published-sizes.csv", ["in1k_last6", "in1k_best6", "in1k_lora"]).drop(columns="images_seen")
    return out.astype({"flops_per_image": float})


def best_frozen(task: str) -> str:
    """Find the row of Table 6 with the highest accuracy on a task."""
    return str(table6()[task].idxmax())


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Result):
    """Runs beside the published models."""

    tasks: pd.DataFrame
    """One row per shared task, run (its largest budget) and choice of blocks: size, params_total, images_seen, task,
    blocks (last, chosen, not said), top1, top1_lo95, top1_hi95, aim_7b (with the same choice of blocks),
    gap_to_aim_7b (ours minus theirs), best_frozen, best_frozen_top1, gap_to_best_frozen."""
    baselines: pd.DataFrame
    """The runs' largest budgets beside the project's own baselines, on all tasks and frozen probes: `beside_runs`."""
    left_out: tuple[Flag, ...]
    """Things that are not comparable, and why."""

    @property
    def table(self) -> pd.DataFrame:
        """`tasks`."""
        return self.tasks

    def headline(self) -> str:
        """Say how much is comparable."""
        num = self.tasks["task"].nunique()
        return (
            f"{num} of the paper's {len(TASKS)} tasks compared with AIM, {len(self.left_out)} limits to the comparison"
        )

    def facts(self) -> list[tuple[str, str]]:
        """Say what is not comparable, how much is, and how many gaps to baselines are significant."""
        gaps = [*self.baselines["verdict"].isin(["above", "below"])]
        facts = [*(("left out", line) for line in flag_words(self.left_out)), ("compared", self.headline())]
        return [*facts, *[("significant", by_chance(gaps))] * bool(gaps)]

    def summary(self) -> str:
        """Write both tables for a terminal, of the baselines' the largest run's rows alone."""
        sizes = self.baselines["params_total"]
        largest = self.baselines if sizes.isna().all() else self.baselines[sizes == sizes.max()]
        parts = {
            "Task by task, attentive probe on frozen features": self.tasks,
            "The largest run beside baselines on the same probes": largest.drop(
                columns=["params_total", "images_seen"]
            ),
        }
        tables = [f"{k}, top-1 in per cent\n{text_table(frame_cells(rows))}" for k, rows in parts.items() if len(rows)]
        return "\n\n".join([fact_lines(self.facts()), *tables])


def compare(table: Table, *, columns: Mapping[str, str] | None = None) -> Comparison:
    """Put the runs of a results table beside the published models, and beside baselines of the table's folder.

    Args:
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Returns:
        Tables of tasks and baselines, with flags of what is not comparable.

    Example:
        >>> compare(read_table("results.parquet")).tasks
    """
    runs = Runs(table, columns)
    probes = probe_frame(runs.complete()).frame
    shared, others = _shared(probes)
    text = "Losses: the paper's are on IN-1k at 224 px, these on the table's own images."
    rows = [Flag(kind="rows_left_out", subject=str(each), text=f"{each}.") for each in usable_rows(runs).exclusions]
    return Comparison(
        tasks=_task_rows(shared),
        baselines=beside_runs(_last_budgets(probes[probes["kind"] != ADAPTED]), read_baselines(runs)),
        left_out=(*rows, *others, Flag(kind="loss_levels", text=text)),
    )


def read_baselines(runs: Runs) -> pd.DataFrame:
    """Read probes of the baselines that lie beside the files of runs (`read_tables`); empty where there are none."""
    folders = sorted(set(runs[FOLDER].dropna())) if FOLDER in runs else []
    tables = [read_table(file) for each in folders for file in files_of(Path(each), BASELINES_FILE)]
    return probe_frame(joined(tables) if tables else pd.DataFrame({"probes": []})).frame


def beside_runs(probes: pd.DataFrame, baselines: pd.DataFrame) -> pd.DataFrame:
    """Put each probe of the runs beside every baseline of the same task, kind and test images.

    The interval is Newcombe's for two independent proportions (Statistics in Medicine 17:873, 1998, method 10), a
    cautious one, as both were measured on the same images. It does not cover seeds.

    Returns:
        Columns of the run; baseline, baseline_top1; gap (ours minus the baseline's) with gap_lo95 and gap_hi95;
        detectable (the gap that would be seen with probability 0.8); verdict: above, below, or no significant
        difference.
    """
    columns = ["task", "kind", "size", "params_total", "images_seen", "n", "top1", "baseline", "baseline_top1", "gap"]
    columns += ["gap_lo95", "gap_hi95", "detectable", "verdict"]
    theirs = baselines.drop_duplicates(["size", "task", "kind", "n", "top1"])
    if theirs.empty or probes.empty:
        return pd.DataFrame(columns=columns)
    names = {"size": "baseline", "top1": "baseline_top1", "top1_lo95": "baseline_lo95", "top1_hi95": "baseline_hi95"}
    theirs = theirs.rename(columns=names)[["task", "kind", "n", *names.values()]]
    both = probes.merge(theirs, on=["task", "kind", "n"])
    gap = both["top1"] - both["baseline_top1"]
    below = np.hypot(both["top1"] - both["top1_lo95"], both["baseline_hi95"] - both["baseline_top1"])
    above = np.hypot(both["top1_hi95"] - both["top1"], both["baseline_top1"] - both["baseline_lo95"])
    detectable = (1 + normal_quantile(POWER) / normal_quantile(0.975)) / 2 * (below + above)
    both = both.assign(gap=gap, gap_lo95=gap - below, gap_hi95=gap + above, detectable=detectable)
    verdict = np.select([both["gap_lo95"] > 0, both["gap_hi95"] < 0], ["above", "below"], "no significant difference")
    return both.assign(verdict=verdict).reindex(columns=columns)


def _shared(probes: pd.DataFrame) -> tuple[pd.DataFrame, list[Flag]]:
    """Choose attentive results on the paper's tasks, and flag what else there is."""
    is_known, is_attentive = probes["task"].isin(TASKS), probes["kind"] == PROTOCOL
    kept = probes[is_known & is_attentive].dropna(subset=["top1"])
    sides = kept.get("image_size", pd.Series(dtype=float)).dropna().astype(int).sort_values()
    other_probes = probes.loc[is_known & ~is_attentive, "kind"]
    other_sides = f"Resolution: these runs see {{}} px, AIM {PAPER_SIDE} px, which is part of every gap."
    cautions = (
        ("other_tasks", "Tasks that the paper does not have: {}.", probes.loc[~is_known, "task"]),
        ("other_probes", "Probes of another kind than Table 6's attentive one: {}.", other_probes),
        ("other_sides", other_sides, sides[sides != PAPER_SIDE]),
    )
    named = [(kind, text, ", ".join(map(str, values.unique()))) for kind, text, values in cautions if len(values)]
    return kept, [Flag(kind=k, subject=names, number=PAPER_SIDE, text=text.format(names)) for k, text, names in named]


def _last_budgets(rows: pd.DataFrame) -> pd.DataFrame:
    """Choose the rows of each run's largest budget."""
    key = [name for name in ("run_id", "size") if name in rows][:1]
    if not key or "images_seen" not in rows or rows["images_seen"].isna().all():
        return rows
    return rows[rows["images_seen"] == rows.groupby(key)["images_seen"].transform("max")]


def _task_rows(shared: pd.DataFrame) -> pd.DataFrame:
    """Make a row per probe and choice of blocks; `top1` and its interval are those of the choice named in `blocks`."""
    rows, names = _last_budgets(shared), ("top1", "top1_lo95", "top1_hi95")
    says = rows["last_top1"].notna()
    last = rows[says].assign(blocks=LAST, **{name: rows.loc[says, f"last_{name}"] for name in names})
    keep = [name for name in ("size", "params_total", "images_seen") if name in rows]
    out = pd.concat([last, rows.assign(blocks=np.where(says, CHOSEN, UNSAID))]).sort_index(kind="stable")
    out = out[[*keep, "task", "blocks", *names]].reset_index(drop=True)
    best, references = out["task"].map(best_frozen), out["blocks"].map(REFERENCE)
    aim, top = ([table6().loc[*cell] for cell in zip(keys, out["task"], strict=True)] for keys in (references, best))
    out = out.assign(aim_7b=aim, gap_to_aim_7b=out["top1"] - aim)
    return out.assign(best_frozen=best, best_frozen_top1=top, gap_to_best_frozen=out["top1"] - top)
