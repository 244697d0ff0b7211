"""Runs of a report: how many, what they cost, the settings they had, and where their numbers come from."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator

import pandas as pd

from aimscale.analysis.report.study import Study
from aimscale.analysis.table.design import told_apart
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.schema import COLUMNS, described
from aimscale.analysis.words import human

SETTINGS = (*(column.name for column in COLUMNS if column.role == "design"), "lr_peak", "batch_size")
COUNTED = ("num_skipped_steps", "num_bad_samples", "num_loss_spikes")
PACKAGES = ("numpy", "scipy", "pandas", "seaborn", "matplotlib")
"""Packages whose versions may change a number or a figure."""


def _known(frame: pd.DataFrame, *names: str) -> bool:
    return all(name in frame and frame[name].notna().any() for name in names)


def _values(frame: pd.DataFrame, name: str) -> str:
    """Write the first few different values of a column; one with gaps has floats for integers."""
    values = frame[name].dropna().unique().tolist()
    shown = [f"{v:.0f}" if isinstance(v, float) and v.is_integer() else v for v in values[:8]]
    shown = [human(v, 4) if isinstance(v, float) else str(v) for v in shown]
    return ", ".join(shown) + (" and more" if len(values) > 8 else "")


def _counted(frame: pd.DataFrame, named: str, noun: str, name: str, what: str) -> str:
    """Say how many different values there are, and their range."""
    num, ends = frame[named].nunique(), (frame[name].min(), frame[name].max())
    return f"{num} {noun}{'s' * (num != 1)} ({' to '.join(told_apart(dict.fromkeys(ends), human, 3))} {what})"


def what_was_run(study: Study) -> Iterator[str]:
    """Say how many rows, sizes and budgets there are, what they cost, and which loss is the lowest."""
    frame = study.frame
    parts = [f"{len(frame)} row{'s' * (len(frame) != 1)}"]
    if _known(frame, "params_total"):
        named = "size" if _known(frame, "size") else "params_total"  # another head makes another N, not another size
        parts.append(_counted(frame, named, "model size", "params_total", "parameters"))
    if _known(frame, "images_seen"):
        parts.append(_counted(frame, "images_seen", "data budget", "images_seen", f"{study.samples} seen"))
    one = "The table holds" if len(study.paths) == 1 else f"The {len(study.paths)} tables hold"
    losses = f"{len(usable_rows(frame).rows)} of the rows have a validation loss."
    yield " ".join([f"{one} {', '.join(parts)};", losses, *_cost(frame)])
    if study.usable.empty:
        return
    main = usable_rows(study.main).rows
    best = main.iloc[int(main["val_loss"].argmin())]
    error = f" ± {1.96 * best['val_loss_se']:.4f}" if _known(main, "val_loss_se") and best["val_loss_se"] > 0 else ""
    place = f" by {best['size']}" if _known(main, "size") else ""
    place += f" after {human(best['images_seen'])} {study.samples}" if _known(main, "images_seen") else ""
    yield f"The lowest validation loss is {best['val_loss']:.4f}{error}{', reached' * bool(place)}{place}."


def _cost(frame: pd.DataFrame) -> Iterator[str]:
    """Count each run once, at its largest budget, which includes what its smaller ones trained."""
    if not _known(frame, "run_id", "images_seen"):
        return
    last = frame.dropna(subset="run_id").sort_values("images_seen").drop_duplicates("run_id", keep="last")
    if _known(last, "device_hours"):
        devices = _values(frame, "device") if _known(frame, "device") else "the devices named below"
        hours = human(last["device_hours"].sum())
        yield f"Training to the largest budget of each run took {hours} device-hours on {devices}."
    if _known(last, "flops_train"):
        yield f"The runs used {human(last['flops_train'].sum())} FLOP up to their largest budgets."


def settings(study: Study) -> Iterator[tuple[str, str]]:
    """Yield the settings that the runs had, what was counted over them, and which rows were left out."""
    frame = study.frame
    yield from ((described(name).heading, _values(frame, name)) for name in SETTINGS if _known(frame, name))
    counted = {name: int(frame[name].sum()) for name in COUNTED if _known(frame, name)}
    yield from ((described(name).heading, f"{number} over all rows") for name, number in counted.items() if number)
    fits = (study.get("law"), study.get("law of the envelope"))
    with_laws = {f"{each}." for fit in fits if fit for each in fit.exclusions}
    yield from (("left out", line) for line in study.exclusions or ["nothing"] if line not in with_laws)


def provenance(study: Study) -> Iterator[tuple[str, str]]:
    """Yield where the numbers come from."""
    frame = study.frame
    for path in study.paths:
        yield "table", path.name if len(study.paths) == 1 else f"{path.resolve().parent.name}/{path.name}"
        if path.is_file():
            yield "SHA-256 of the table", hashlib.sha256(path.read_bytes()).hexdigest()
    sources = [column.name for column in COLUMNS if column.role == "source"] + ["seed"]
    yield from ((described(name).heading, _values(frame, name)) for name in sources if _known(frame, name))
    if _known(frame, "finished_at"):
        stamps = frame["finished_at"].dropna().astype(str)
        yield "measured", f"{stamps.min()} to {stamps.max()}"
    yield from ((f"analysed with {name}", importlib.metadata.version(name)) for name in PACKAGES)
