"""Next-patch predictions as pictures: the same validation images, completed by a small and a large model."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from aimscale.analysis.report.figures import data_uri
from aimscale.analysis.report.study import Study

MAX_IMAGES = 6
KEYS = ("truth", "prefix", "prediction")


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """A row of equal-sized pictures."""

    label: str
    alt: str
    uris: tuple[str, ...]


def picture_rows(study: Study) -> list[PictureRow]:
    """Truth, prefix, and the predictions of the smallest, the middle and the largest model at their largest budget.

    Rows are empty where the sweep stored no completions; a damaged file is noted in `study.missing`.
    """
    chosen = _chosen(study)
    rows: list[PictureRow] = []
    shown: tuple[np.ndarray, np.ndarray] | None = None
    for entry in chosen:
        arrays = _load(study, study.paths[0].parent / str(entry.get("path", "")))
        if arrays is None:
            continue
        truth, prefix, prediction = arrays
        label = f"{entry.get('size', 'model')}, {int(entry.get('images_seen', 0)):,} images seen"
        if shown is None or not (np.array_equal(shown[0], truth) and np.array_equal(shown[1], prefix)):
            rows.append(_row("truth", "Validation image", truth))
            rows.append(_row("given patches", "Patches the model was given", prefix))
            shown = (truth, prefix)
        rows.append(_row(label, f"Next-patch predictions of {label}", prediction))
    return rows


def _chosen(study: Study) -> list[dict]:
    """Entries of the smallest, middle and largest size of the main experiment, each at its largest budget."""
    entries = [entry for entry in study.collect.get("completions", []) if isinstance(entry, dict)]
    if "run_id" in study.main:  # a raw target or another order has pictures of its own kind
        ours = set(study.main["run_id"])
        entries = [entry for entry in entries if entry.get("run_id") in ours] or entries
    if not entries:
        if study.is_ours:
            study.missing.append("The sweep stored no next-patch predictions, so no pictures are shown.")
        return []
    largest: dict[str, dict] = {}
    for entry in entries:
        size = str(entry.get("size"))
        if size not in largest or entry.get("images_seen", 0) >= largest[size].get("images_seen", 0):
            largest[size] = entry
    params = {}
    if {"size", "params_total"} <= set(study.frame.columns):
        params = study.frame.groupby("size")["params_total"].first().to_dict()
    sizes = sorted(largest, key=lambda size: params.get(size, 0))
    picks = sorted({0, len(sizes) // 2, len(sizes) - 1})
    return [largest[sizes[i]] for i in picks]


def _load(study: Study, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = [np.asarray(stored[key])[:MAX_IMAGES] for key in KEYS]
        if any(a.ndim != 4 or a.dtype != np.uint8 or a.shape != arrays[0].shape for a in arrays):
            raise ValueError("expected three uint8 arrays (n, H, W, C) of one shape")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        study.missing.append(f"Pictures in {path.name} of {path.parent.parent.name} cannot be shown: {error}.")
        return None
    return arrays[0], arrays[1], arrays[2]


def _row(label: str, alt: str, images: np.ndarray) -> PictureRow:
    return PictureRow(label=label, alt=alt, uris=tuple(_png_uri(image) for image in images))


def _png_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image[..., :3]
    Image.fromarray(pixels).save(buffer, format="png")
    return data_uri("image/png", buffer.getvalue())
