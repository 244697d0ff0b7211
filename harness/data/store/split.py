"""Random parts of a listing of images, alike in their classes, of which no two hold the same image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aimscale.harness.data import DataError
from aimscale.harness.data.store.dataset_info import image_checksum
from aimscale.harness.data.store.pack import Listing, shuffled_order


class Split(NamedTuple):
    """Parts into which a listing is cut."""

    parts: dict[str, npt.NDArray[np.int64]]
    """Part -> its images in packing order."""
    num_together: int
    """Images that equal another one byte for byte and follow it into its part."""
    absent: dict[str, list[str]]
    """Part -> classes without an image in it."""


def split_images(listing: Listing, shares: Mapping[str, int]) -> Split:
    """Cut a listing into random parts of so many per cent, each with its share of every class to within an image or
    two; equal images fall into one part."""
    order = shuffled_order(len(listing.images))
    labels = np.zeros(len(order), np.int64) if listing.labels is None else np.asarray(listing.labels, np.int64)
    equal: dict[int, list[int]] = {}
    contents = _contents(listing.images)
    for position in np.argsort(labels[order], kind="stable").tolist():
        equal.setdefault(int(contents[order[position]]), []).append(position)
    positions: dict[str, list[int]] = {name: [] for name in shares}
    lacking = dict.fromkeys(shares, 0.0)
    for members in equal.values():
        for name, share in shares.items():
            lacking[name] += share / 100 * len(members)
        chosen = max(shares, key=lambda name: lacking[name])
        lacking[chosen] -= len(members)
        positions[chosen] += members
    if empty := [name for name, members in positions.items() if not members]:
        raise DataError(f"{listing.source}: {len(order)} images leave none for {' and '.join(empty)}")
    parts = {name: order[sorted(members)] for name, members in positions.items()}
    held = {name: set(labels[part].tolist()) for name, part in parts.items()}
    classes = listing.classes or ()
    absent = {part: [each for label, each in enumerate(classes) if label not in held[part]] for part in parts}
    return Split(parts, len(order) - len(equal), absent)


def _contents(images: Sequence[str] | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return a number for each image (n,) that equal ones share; only files of equal size are read."""
    if isinstance(images, np.ndarray):
        return np.array([image_checksum(image.tobytes()) for image in images], np.uint64)
    sizes = [os.stat(path).st_size if os.path.exists(path) else -1 for path in images]
    count = Counter(sizes)
    keys = (
        image_checksum(Path(path).read_bytes() if size >= 0 and count[size] > 1 else os.fsencode(path))
        for path, size in zip(images, sizes, strict=True)
    )
    return np.fromiter(keys, np.uint64, len(images))
