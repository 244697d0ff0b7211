"""Runs of a report: how many, what they cost, the settings they had, where their numbers come from, and pictures."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.report.blocks import PictureRow, data_uri
from aimscale.analysis.report.study import Study
from aimscale.analysis.table.design import told_apart
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.schema import COLUMNS
from aimscale.analysis.words import human

SETTINGS = (*(column.name for column in COLUMNS if column.role == "design"), "lr_peak", "batch_size")
COUNTED = {"num_skipped_steps": "Skipped optimiser steps", "num_bad_samples": "Undecodable samples"}
PACKAGES = ("numpy", "scipy", "pandas", "seaborn", "matplotlib")
"""Packages whose versions may change a number or a figure."""
MAX_IMAGES = 6


def _has(frame: pd.DataFrame, *names: str) -> bool:
    return all(name in frame and frame[name].notna().any() for name in names)


def _values(frame: pd.DataFrame, name: str) -> str:
    """Write the first few different values of a column."""
    values = list(dict.fromkeys(f"{v:g}" if isinstance(v, float) else str(v) for v in frame[name].dropna()))
    return ", ".join(values[:8]) + (" and more" if len(values) > 8 else "")


def _counted(frame: pd.DataFrame, named: str, noun: str, name: str, what: str) -> Iterator[str]:
    """Say how many different values there are, and their range."""
    if _has(frame, name):
        num, ends = frame[named].nunique(), (frame[name].min(), frame[name].max())
        low_high = " to ".join(told_apart(dict.fromkeys(ends), human, 3))
        yield f"{num} {noun}{'s' * (num != 1)} ({low_high} {what})"


def what_was_run(study: Study) -> Iterator[str]:
    """Say how many rows, sizes and budgets there are, what they cost, and which loss is the lowest."""
    frame = study.frame
    named = "size" if _has(frame, "size") else "params_total"  # another head makes another N, not another size
    parts = [f"{len(frame)} row{'s' * (len(frame) != 1)}"]
    parts += _counted(frame, named, "model size", "params_total", "parameters")
    parts += _counted(frame, "images_seen", "data budget", "images_seen", f"{study.samples} seen")
    cost, last = "", frame[:0]
    if _has(frame, "run_id", "images_seen"):  # the row of a budget counts what the smaller ones trained, too
        last = frame.dropna(subset="run_id").sort_values("images_seen").drop_duplicates("run_id", keep="last")
    if _has(last, "device_hours"):
        devices = _values(frame, "device") if _has(frame, "device") else "the devices named below"
        hours = human(last["device_hours"].sum())
        cost = f" Training to the largest budget of each run took {hours} device-hours on {devices}."
    if _has(last, "flops_train"):
        cost += f" The runs used {human(last['flops_train'].sum())} FLOP up to their largest budgets."
    one = "The table holds" if len(study.paths) == 1 else f"The {len(study.paths)} tables hold"
    yield f"{one} {', '.join(parts)}; {len(usable_rows(frame).rows)} of the rows have a validation loss.{cost}"
    if study.usable.empty:
        return
    main = usable_rows(study.main).rows
    best = main.iloc[int(main["val_loss"].argmin())]
    error = f" ± {1.96 * best['val_loss_se']:.4f}" if _has(main, "val_loss_se") and best["val_loss_se"] > 0 else ""
    place = f" by {best['size']}" if _has(main, "size") else ""
    place += f" after {human(best['images_seen'])} {study.samples}" if _has(main, "images_seen") else ""
    yield f"The lowest validation loss is {best['val_loss']:.4f}{error}{', reached' * bool(place)}{place}."


def settings(study: Study) -> Iterator[tuple[str, str]]:
    """Yield the settings that the runs had, what was counted over them, and which rows were left out."""
    frame = study.frame
    yield from ((name.replace("_", " "), _values(frame, name)) for name in SETTINGS if _has(frame, name))
    counted = {words: int(frame[name].sum()) for name, words in COUNTED.items() if _has(frame, name)}
    yield from ((words, f"{number} over all rows") for words, number in counted.items() if number)
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
    yield from ((name.replace("_", " "), _values(frame, name)) for name in sources if _has(frame, name))
    if _has(frame, "finished_at"):
        stamps = frame["finished_at"].dropna().astype(str)
        yield "measured", f"{stamps.min()} to {stamps.max()}"
    for machine in study.collect.get("machines", []):
        if isinstance(machine, dict):
            yield from ((f"machine: {k}", str(v)) for k, v in machine.items() if isinstance(v, (str, int, float)))
    yield from ((f"analysed with {name}", importlib.metadata.version(name)) for name in PACKAGES)


def picture_rows(study: Study) -> list[PictureRow]:
    """Show truth, prefix, and predictions of the smallest, the middle and the largest model at their last budgets."""
    entries = pd.DataFrame(study.collect.get("completions", []))
    if entries.empty or not {"run_id", "params_total"} <= set(study.main):
        return []
    sizes = study.main.groupby("run_id")["params_total"].first()
    found = entries.assign(N=entries["run_id"].map(sizes)).dropna(subset="N").sort_values(["N", "images_seen"])
    found = found.drop_duplicates("N", keep="last")
    rows: list[PictureRow] = []
    for entry in found.iloc[sorted({0, len(found) // 2, len(found) - 1} & {*range(len(found))})].to_dict("records"):
        truth, prefix, prediction = _load(Path(entry["path"]))
        label = f"{entry['size']}, {entry['images_seen']:,} images seen"
        rows.append(PictureRow(label, f"Next-patch predictions of {label}", prediction))
    if rows:
        given = PictureRow("given patches", "Patches the model was given", prefix)
        rows = [PictureRow("truth", "Validation image", truth), given, *rows]
    return rows


def _load(path: Path) -> list[list[str]]:
    """Read truth, prefix and prediction, each a picture per image."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = [np.asarray(stored[key], np.uint8)[:MAX_IMAGES] for key in ("truth", "prefix", "prediction")]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        why = f"cannot read the pictures in {path} ({error}); delete the file or collect again"
        raise AnalysisError(why) from error
    return [[_png(image) for image in images] for images in arrays]


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image[..., :3]).save(buffer, format="png")
    return data_uri("image/png", buffer.getvalue())
