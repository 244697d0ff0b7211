"""Next-patch predictions as pictures: the same validation images, completed by a small and a large model."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.report.blocks import data_uri
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

    Raises:
        AnalysisError: a damaged file.
    """
    rows: list[PictureRow] = []
    for entry in _chosen(study):
        truth, prefix, prediction = _load(Path(entry["path"]))
        if not rows:
            rows.append(_row("truth", "Validation image", truth))
            rows.append(_row("given patches", "Patches the model was given", prefix))
        label = f"{entry['size']}, {entry['images_seen']:,} images seen"
        rows.append(_row(label, f"Next-patch predictions of {label}", prediction))
    return rows


def _chosen(study: Study) -> list[dict[Hashable, Any]]:
    """Entries of the smallest, middle and largest size of the main experiment, each at its largest budget."""
    entries = pd.DataFrame(study.collect.get("completions", []))
    if entries.empty or not {"run_id", "params_total"} <= set(study.main):
        return []
    sizes = study.main.groupby("run_id")["params_total"].first()
    found = entries.assign(N=entries["run_id"].map(sizes)).dropna(subset="N").sort_values(["N", "images_seen"])
    found = found.drop_duplicates("N", keep="last")
    picks = sorted({0, len(found) // 2, len(found) - 1}) if len(found) else []
    return found.iloc[picks].to_dict("records")


def _load(path: Path) -> list[np.ndarray]:
    """Three arrays (n, H, W, C) of uint8."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return [np.asarray(stored[key], np.uint8)[:MAX_IMAGES] for key in KEYS]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise AnalysisError(
            f"cannot read the pictures in {path} ({error}); delete the file or collect again"
        ) from error


def _row(label: str, alt: str, images: np.ndarray) -> PictureRow:
    uris = []
    for image in images:
        buffer = io.BytesIO()
        pixels = image[..., 0] if image.shape[-1] == 1 else image[..., :3]
        Image.fromarray(pixels).save(buffer, format="png")
        uris.append(data_uri("image/png", buffer.getvalue()))
    return PictureRow(label=label, alt=alt, uris=tuple(uris))
