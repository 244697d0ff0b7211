"""The report's words: what was run, what may be compared with the paper, methods, provenance."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections.abc import Iterator

import pandas as pd

from aimscale.analysis.accuracy.result import Correlation
from aimscale.analysis.report.study import Study
from aimscale.analysis.table.design import told_apart
from aimscale.analysis.words import accuracy_of, human


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return " to ".join(told_apart(dict.fromkeys((low, high)), human, 3))


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}{'' if num == 1 else 's'}"


def _has(frame: pd.DataFrame, *names: str) -> bool:
    return all(name in frame and frame[name].notna().any() for name in names)


def _values(frame: pd.DataFrame, name: str) -> str:
    """The first few different values of a column."""
    values = list(dict.fromkeys(f"{v:g}" if isinstance(v, float) else str(v) for v in frame[name].dropna()))
    return ", ".join(values[:8]) + (" and more" if len(values) > 8 else "")


def what_was_run(study: Study) -> str:
    """The table's rows, sizes and budgets, and what they cost."""
    frame = study.frame
    parts = [_count(len(frame), "row")]
    if _has(frame, "params_total"):
        named = "size" if _has(frame, "size") else "params_total"  # another head makes another N, not another size
        num_sizes = frame[named].nunique()
        parts.append(f"{_count(num_sizes, 'model size')} ({_range(frame['params_total'])} parameters)")
    if _has(frame, "images_seen"):
        num_budgets = frame["images_seen"].nunique()
        parts.append(f"{_count(num_budgets, 'data budget')} ({_range(frame['images_seen'])} {study.samples} seen)")
    cost = ""
    last = frame[:0]
    if _has(frame, "run_id", "images_seen"):
        last = frame.dropna(subset="run_id").sort_values("images_seen").drop_duplicates("run_id", keep="last")
    if _has(last, "device_hours"):  # the row of a budget counts what the smaller ones trained, too
        devices = _values(frame, "device") if _has(frame, "device") else "the devices named below"
        hours = human(last["device_hours"].sum())
        cost = f" Training to the largest budget of each run took {hours} device-hours on {devices}."
    if _has(last, "flops_train"):
        cost += f" The runs used {human(last['flops_train'].sum())} FLOP up to their largest budgets."
    one = "The table holds" if len(study.paths) == 1 else f"The {len(study.paths)} tables hold"
    return f"{one} {', '.join(parts)}; {study.num_usable} of the rows have a validation loss.{cost}"


def what_came_out(study: Study) -> Iterator[str]:
    """The lowest loss, where there is any."""
    usable = study.usable
    if usable.empty:
        return
    main = study.with_loss
    best = main.iloc[int(main["val_loss"].argmin())]
    error = f" ± {1.96 * best['val_loss_se']:.4f}" if _has(main, "val_loss_se") and best["val_loss_se"] > 0 else ""
    name = f" by {best['size']}" if _has(main, "size") else ""
    seen = f" after {human(best['images_seen'])} {study.samples}" if _has(main, "images_seen") else ""
    reached = ", reached" if name or seen else ""
    yield f"The lowest validation loss is {best['val_loss']:.4f}{error}{reached}{name}{seen}."


def best_split(study: Study) -> list[str]:
    """Say what the approaches found, how far they disagree, and how the best size for features compares."""
    found = study.approaches
    if found is None:
        return []
    frontiers = (f"{each.headline()}." for each in found.frontiers)
    return [*frontiers, *found.sentences(), *(gap.sentence() for gap in study.features.values())]


def accuracy_in_words(study: Study) -> Iterator[str]:
    """Whether loss goes with accuracy: a sentence per task of the first kind of probe; figures show the others."""
    first = next(iter(study.correlations), (None,))[0]
    for (kind, task), found in study.correlations.items():
        if kind == first:
            yield correlation_words(f"{accuracy_of(kind)} on {task}", found)


def correlation_words(what: str, found: tuple[Correlation, ...]) -> str:
    """Say how loss and one task's accuracy go together: at equal compute, over all rows and within a size."""
    first = found[0]
    place = "At equal compute" if first.partial_on else "Over all rows"
    if math.isnan(first.value):
        verdict = f"{place} nothing is left to correlate validation loss with {what}"
    elif not first.is_significant:
        verdict = f"{place} no significant correlation of validation loss with {what}"
    else:
        verdict = f"{place} lower validation loss goes with {'higher' if first.value < 0 else 'LOWER'} {what}"
    told: dict[str, list[str]] = {}
    for c in found:
        follow = ", where both follow compute" if first.partial_on else ""
        name = "at equal compute" if c.partial_on else "within a size" if c.within else f"over all rows{follow}"
        told.setdefault(name, []).append(f"{c.method.capitalize()} {c.value:.2f} [{c.low:.2f}, {c.high:.2f}]")
    parts = "; ".join(f"{name} {', '.join(each)}" for name, each in told.items())
    cautions = dict.fromkeys(f" {each[0].upper()}{each[1:]}." for c in found for each in c.cautions())
    return f"{verdict} ({first.num_points} points): {parts}.{''.join(cautions)}"


SETTINGS = (
    *("schedule", "precision", "target", "prefix", "patch_order", "head_rule", "lr_peak", "batch_size"),
    *("image_size", "patch_size", "val_num_images"),
)
SOURCES = ("sweep", "git_commit", "data_fingerprint", "device", "world_size", "zero_stage", "seed", "schema_version")
COUNTED = {"num_skipped_steps": "skipped optimiser steps", "num_bad_samples": "undecodable samples"}


def _label(column: str) -> str:
    return column.replace("_", " ").capitalize()


def settings(study: Study) -> Iterator[tuple[str, str]]:
    """Yield the settings that the runs had, what was counted over them, and which rows were left out."""
    frame = study.frame
    yield from ((_label(name), _values(frame, name)) for name in SETTINGS if _has(frame, name))
    counted = {words: int(frame[name].sum()) for name, words in COUNTED.items() if _has(frame, name)}
    yield from ((words.capitalize(), f"{number} over all rows") for words, number in counted.items() if number)
    with_laws = {f"{each}." for fit in study.fits.values() for each in fit.exclusions}
    yield from (("Left out", line) for line in study.exclusions or ["nothing"] if line not in with_laws)


def provenance(study: Study) -> Iterator[tuple[str, str]]:
    """Where the numbers come from: label and value."""
    frame = study.frame
    for path in study.paths:
        yield "Table", path.name if len(study.paths) == 1 else f"{path.resolve().parent.name}/{path.name}"
        yield "SHA-256 of the table", hashlib.sha256(path.read_bytes()).hexdigest()
    yield from ((_label(name), _values(frame, name)) for name in SOURCES if _has(frame, name))
    if _has(frame, "finished_at"):
        stamps = frame["finished_at"].dropna().astype(str)
        yield "Measured", f"{stamps.min()} to {stamps.max()}"
    for machine in study.collect.get("machines", []):
        if isinstance(machine, dict):
            yield from ((f"Machine: {k}", str(v)) for k, v in machine.items() if isinstance(v, (str, int, float)))
    for name in ("numpy", "scipy", "pandas", "seaborn", "matplotlib"):
        yield f"Analysed with {name}", importlib.metadata.version(name)
