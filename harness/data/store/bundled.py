"""Data sets of the real photographs in `photographs.tar`: no network, the same everywhere.

Each photograph is cut by columns into three regions that share no pixel: the left 60 % for pre-training and for fitting
probes, the next 15 % for validation, the right 25 % for testing probes. Samples are square crops of one region, in any
of four orientations, side log-uniform in 32..128 px, resized to 32 px; the label says which photograph.
`photographs.md` states where they come from and under which licence.
"""

from __future__ import annotations

import functools
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from aimscale.harness.data.images import decode, kernel_threads
from aimscale.harness.data.random_access import make_key, permute, random_uniform
from aimscale.harness.data.store.pack import PackedImage, new_folder, write_dataset

PHOTOGRAPHS = Path(__file__).with_name("photographs.tar")
"""The photographs, as JPEG and PNG files."""
IMAGE_SIZE = 32
"""Side of every bundled image, pixels."""

_REGIONS = {"pretrain": (0.0, 0.6), "train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}
_CROPS = {"pretrain": 3000, "train": 300, "validation": 160, "test": 400}
_CROP_SIDE = (32, 128)
_CROP_TRIES = 8  # a crop of mere sky or a black corner is drawn again: splits share no flat picture
_MIN_CONTRAST = 24  # least difference of the brightest and the darkest value, of 255

FOLDERS = tuple(f"photographs-{split}" for split in _REGIONS)
"""Data sets that `write_bundled` writes."""


def write_bundled(out: Path) -> None:
    """Write every folder of `FOLDERS` under the new folder `out`; one thread, deterministic."""
    classes = tuple(photographs())
    with new_folder(out) as folder, kernel_threads(1):
        for split in _REGIONS:
            write_dataset(folder / f"photographs-{split}", photograph_crops(split), classes=classes)
    photographs.cache_clear()


def region(image: torch.Tensor, split: str) -> torch.Tensor:
    """Cut the columns of a photograph that belong to a split."""
    start, stop = (round(share * image.shape[-1]) for share in _REGIONS[split])
    return image[:, :, start:stop]


@functools.lru_cache(maxsize=1)
def photographs() -> dict[str, torch.Tensor]:
    """Load the photographs: name -> uint8 (3, H, W), sorted by name."""
    with tarfile.open(PHOTOGRAPHS) as tar:
        jpegs = {Path(member.name).stem: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return {name: decode(jpegs[name]) for name in sorted(jpegs)}


def photograph_crops(split: str) -> Iterator[PackedImage]:
    """Yield equally many crops of every photograph, in shuffled order."""
    pictures = list(photographs().values())
    number = _CROPS[split] * len(pictures)
    draws = random_uniform(make_key("bundled crop", split), np.arange(4 * _CROP_TRIES * number))
    draws = draws.reshape(number, _CROP_TRIES, 4)
    labels = permute(np.arange(number), number, make_key("bundled order", split)) % len(pictures)
    for i in range(number):
        picture = region(pictures[labels[i]], split)
        for draw in draws[i]:
            crop = _square(picture, *draw)
            if np.ptp(crop.numpy()) >= _MIN_CONTRAST:
                break
        yield _packed(i, crop, int(labels[i]))


def _square(picture: torch.Tensor, size: float, vertical: float, horizontal: float, turn: float) -> torch.Tensor:
    """Cut a square crop given by four uniform draws: side (log-uniform), top, left, and quarter turns."""
    height, width = picture.shape[-2:]
    low, high = _CROP_SIDE[0], min(_CROP_SIDE[1], height, width)
    side = round(low * (high / low) ** size)
    top, left = int(vertical * (height - side + 1)), int(horizontal * (width - side + 1))
    return picture[:, top : top + side, left : left + side].rot90(int(4 * turn), (1, 2))


def _packed(number: int, crop: torch.Tensor, label: int) -> PackedImage:
    if crop.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
        crop = F.interpolate(crop[None], size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)[0]
    pixels = crop.permute(1, 2, 0).contiguous().numpy().tobytes()
    # PPM decodes in less than half of PNG's time, which is a twentieth of what the demo takes
    data = b"P6 %d %d 255\n" % (IMAGE_SIZE, IMAGE_SIZE) + pixels
    return PackedImage(f"{number:09d}", "ppm", data, label, (IMAGE_SIZE, IMAGE_SIZE))
