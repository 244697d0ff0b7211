"""Next-patch predictions as pictures: the same validation images, completed by a small and a large model."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.report.blocks import data_uri
from aimscale.analysis.report.study import Study

MAX_IMAGES = 6


class PictureRow(NamedTuple):
    """A row of equal-sized pictures."""

    label: str
    alt: str
    uris: list[str]


def picture_rows(study: Study) -> list[PictureRow]:
    """Show truth, prefix, and the predictions of the smallest, the middle and the largest model at their last budget.

    Raises:
        AnalysisError: a damaged file.
    """
    entries = pd.DataFrame(study.collect.get("completions", []))
    if entries.empty or not {"run_id", "params_total"} <= set(study.main):
        return []
    sizes = study.main.groupby("run_id")["params_total"].first()
    found = entries.assign(N=entries["run_id"].map(sizes)).dropna(subset="N").sort_values(["N", "images_seen"])
    found = found.drop_duplicates("N", keep="last")
    rows: list[PictureRow] = []
    for place in sorted({0, len(found) // 2, len(found) - 1}) if len(found) else ():
        entry = found.iloc[place]
        truth, prefix, prediction = _load(Path(entry["path"]))
        if not rows:
            rows.append(PictureRow("truth", "Validation image", truth))
            rows.append(PictureRow("given patches", "Patches the model was given", prefix))
        label = f"{entry['size']}, {entry['images_seen']:,} images seen"
        rows.append(PictureRow(label, f"Next-patch predictions of {label}", prediction))
    return rows


def _load(path: Path) -> list[list[str]]:
    """Read truth, prefix and prediction, each a picture per image."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = [np.asarray(stored[key], np.uint8)[:MAX_IMAGES] for key in ("truth", "prefix", "prediction")]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise AnalysisError(
            f"cannot read the pictures in {path} ({error}); delete the file or collect again"
        ) from error
    return [[_png(image) for image in images] for images in arrays]


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image[..., :3]).save(buffer, format="png")
    return data_uri("image/png", buffer.getvalue())
