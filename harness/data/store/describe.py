"""What `aimscale data info` says of a data set, from its index alone, and one PNG that shows it at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.utils import make_grid, save_image

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import make_key, permute
from aimscale.harness.data.store.decoding import crop_centre
from aimscale.harness.data.store.index import ShardDataset

_LISTED_CLASSES = 12
_LISTED_BAD = 5
_QUARTILES = ("min", "lower_quartile", "median", "upper_quartile", "max")
_TILE_PX = 96
_SIDE = 8  # tiles


def describe_dataset(dataset: ShardDataset) -> dict[str, Any]:
    """Counts, classes, resolutions (pixels) and sizes (bytes), ready for JSON."""
    index, info = dataset.index, dataset.info
    rows = index.samples.values
    good = rows[rows["width"] > 0]
    counts = np.zeros(dataset.num_classes, dtype=np.int64)
    for _, block in index.label.blocks() if index.label is not None else ():
        counts += np.bincount(block[block >= 0], minlength=len(counts))
    names = dataset.classes or [str(label) for label in range(len(counts))]
    return {
        "name": info.name,
        "path": dataset.path,
        "shards_at": info.shards_at,
        "fingerprint": dataset.fingerprint,
        "num_shards": info.num_shards,
        "num_samples": len(dataset),
        "num_unique": np.unique(dataset.checksum).size,
        "num_bad": info.num_bad,
        "bad": [dataset.describe(int(i)) for i in index.bad[:_LISTED_BAD]],
        "num_unlabelled": len(dataset) - int(counts.sum()),
        "num_classes": len(names),
        "class_counts": dict(zip(names, counts.tolist(), strict=True)),
        "shorter_side_px": _quartiles(np.minimum(good["width"], good["height"])),
        "longer_side_px": _quartiles(np.maximum(good["width"], good["height"])),
        "image_bytes": _quartiles(rows["size"]),
        "total_bytes": info.total_bytes,
    }


def _quartiles(values: npt.NDArray[np.integer]) -> dict[str, int]:
    """Cut to whole numbers."""
    if not len(values):
        return {}
    return dict(zip(_QUARTILES, map(int, np.quantile(values, (0, 0.25, 0.5, 0.75, 1))), strict=True))


def format_description(facts: dict[str, Any]) -> str:
    """The same for people."""
    where = f", shards at {facts['shards_at']}" if facts["shards_at"] else ""
    images = f"{facts['num_samples']:,} ({facts['num_unique']:,} different files), {facts['num_bad']:,} undecodable"
    lines = [("images", images), ("shards", f"{facts['num_shards']:,}, {facts['total_bytes'] / 1e6:,.1f} MB{where}")]
    for name, key, unit in (
        ("shorter side", "shorter_side_px", "px"),
        ("longer side", "longer_side_px", "px"),
        ("file size", "image_bytes", "bytes"),
    ):
        if facts[key]:
            low, lower, middle, upper, high = facts[key].values()
            spread = f"half within {lower:,}..{upper:,}, all within {low:,}..{high:,}"
            lines.append((name, f"median {middle:,} {unit}, {spread}"))
    if counts := facts["class_counts"]:
        fewest, most = min(counts.values()), max(counts.values())
        lines.append(("classes", f"{len(counts):,}, with {fewest:,} to {most:,} images each"))
        lines += [("", f"{count:>9,}  {name}") for name, count in list(counts.items())[:_LISTED_CLASSES]]
        if len(counts) > _LISTED_CLASSES:
            lines.append(("", f"      ...  and {len(counts) - _LISTED_CLASSES:,} more (--json lists all)"))
        lines.append(("unlabelled", f"{facts['num_unlabelled']:,}"))
    else:
        lines.append(("classes", "no labels"))
    lines += [("undecodable", text) for text in facts["bad"]]
    lines.append(("fingerprint", facts["fingerprint"]))
    return "\n".join([f"{facts['name']}  ({facts['path']})", *(f"  {name:<14} {text}" for name, text in lines)])


def write_contact_sheet(dataset: ShardDataset, path: Path) -> int:
    """Write a grid of random images, centre-cropped; returns how many are shown.

    Raises:
        DataError: no image decodes, or the file cannot be written.
    """
    number = dataset.num_usable
    if not number:
        raise DataError(f"{dataset.path} has no image that decodes, so there is nothing to show")
    chosen = dataset.usable(permute(np.arange(min(number, _SIDE**2)), number, make_key("contact sheet")))
    tiles = torch.stack([crop_centre(dataset.decode(int(sample)), _TILE_PX) for sample in chosen])
    try:
        save_image(make_grid(tiles.float() / 255, nrow=_SIDE, padding=4, pad_value=1.0), path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot write the contact sheet {path} ({error}); name a .png in a folder that exists"
        ) from error
    return len(tiles)
