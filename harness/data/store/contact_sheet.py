"""One PNG that shows a data set at a glance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.random_access import make_key, permute
from aimscale.harness.data.resize import crop_centre
from aimscale.harness.data.store.decoding import UndecodableImageError
from aimscale.harness.data.store.index import ShardDataset

_CAPTION_PX = 14
_MARGIN_PX = 4
_TILE_PX = 96
_SIDE = 8  # tiles


def write_contact_sheet(dataset: ShardDataset, path: Path) -> int:
    """Write a grid of random images, centre-cropped, each with its class below; returns how many are shown.

    Raises:
        DataError: no image decodes, or the file cannot be written.
    """
    number = dataset.num_usable
    order = (permute(np.array([i]), number, make_key("contact sheet")) for i in range(number))
    cell = (_TILE_PX + _MARGIN_PX, _TILE_PX + _MARGIN_PX + (_CAPTION_PX if dataset.labels is not None else 0))
    sheet = Image.new("RGB", (_SIDE * cell[0] + _MARGIN_PX, _SIDE * cell[1] + _MARGIN_PX), "white")
    draw = ImageDraw.Draw(sheet)
    shown = 0
    for drawn in order:
        if shown == _SIDE**2:
            break
        sample = int(dataset.usable(drawn)[0])
        try:
            tile = crop_centre(dataset.decode(sample), _TILE_PX)
        except UndecodableImageError:
            continue
        left, top = _MARGIN_PX + shown % _SIDE * cell[0], _MARGIN_PX + shown // _SIDE * cell[1]
        sheet.paste(Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()), (left, top))
        draw.text((left, top + _TILE_PX), _caption(dataset, sample, _TILE_PX), fill="black")
        shown += 1
    if not shown:
        raise DataError(f"{dataset.path} has no image that decodes, so there is nothing to show")
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot write the contact sheet {path} ({error}); name a .png in a folder that exists"
        ) from error
    return shown


def _caption(dataset: ShardDataset, sample: int, width_px: int) -> str:
    if dataset.labels is None or dataset.labels[sample] < 0:
        return ""
    label = int(dataset.labels[sample])
    text = dataset.classes[label] if dataset.classes else str(label)
    return text[: width_px // 6]
