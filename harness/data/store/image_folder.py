"""Pack a folder of image files: in parallel, each decoded once."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import torch

from aimscale.harness.data import DataError
from aimscale.harness.data.store.card import DatasetInfo
from aimscale.harness.data.store.decoding import IMAGE_EXTENSIONS, UndecodableImageError, decode, resize_shorter_side
from aimscale.harness.data.store.pack import MAX_SHARD_BYTES, PackedImage, encode, shuffled_order, write_dataset

_CHUNK = 64  # images that a process prepares at a time
_WORTH_PROCESSES = 5000  # images, which take longer than starting processes


def pack_folder(
    folder: Path,
    out: Path,
    *,
    resize: int | None = None,
    skip_bad: bool = False,
    part: tuple[int, int] | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    num_workers: int | None = None,
) -> tuple[DatasetInfo, list[Path]]:
    """Pack an image folder; sub-folders, sorted, become classes. Returns the data set and the files left out as bad.

    Images are written in a fixed shuffled order, so that the first n are a random subset. With `resize`, shorter sides
    above it are shrunk to it once, which spares every epoch the decoding of pixels that no crop keeps. With `part`,
    only positions start..stop-1 of the shuffled order: ranges that do not overlap are disjoint random subsets. The
    result is the same for any `num_workers` (processes; by default every core, where there are thousands of images).

    Raises:
        DataError: no images, images both in `folder` and in sub-folders, `out` exists, an undecodable image
            (unless `skip_bad`), or a part beyond the images that are there.
    """
    files, classes = list_images(folder)
    files = [files[number] for number in shuffled_order(len(files), part)]
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if len(files) >= _WORTH_PROCESSES else 1
    images = _ImageFolder(folder=folder, files=files, classes=classes, resize=resize)
    skipped: list[Path] = []

    def good_ones(prepared: Iterator[PackedImage | str]) -> Iterator[PackedImage]:
        for file, image in zip(files, prepared, strict=True):
            if isinstance(image, PackedImage):
                yield image
            elif skip_bad:
                skipped.append(file)
            else:
                raise DataError(f"image {file} cannot be decoded ({image}); repair or remove it, or pass --skip-bad")
        if len(skipped) == len(files):
            raise DataError(f"none of the {len(files)} images of {folder} can be decoded")

    with contextlib.closing(_prepared(images, num_workers)) as prepared:
        info = write_dataset(out, good_ones(prepared), classes=classes, max_shard_bytes=max_shard_bytes)
    return info, skipped


def list_images(folder: Path) -> tuple[list[Path], tuple[str, ...] | None]:
    """Image files, sorted, and class names: the sub-folders that hold images, or None when there are none.

    Raises:
        DataError: no folder, no images, or images both beside and inside of sub-folders.
    """
    if not folder.is_dir():
        raise DataError(f"image folder {folder} does not exist")
    files = sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file())
    if not files:
        for path in sorted(folder.glob("*images-idx3-ubyte*")):
            raise DataError(f"{folder} holds idx files, one data set each; name the images of one, as in {path}")
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_EXTENSIONS)})")
    classes = sorted({path.relative_to(folder).parts[0] for path in files if path.parent != folder})
    for name in classes:
        if name.encode(errors="surrogateescape") != name.encode(errors="replace"):  # Python shows bytes as surrogates
            raise DataError(f"the class folder {name!r} of {folder} has a name that is not UTF-8 text; rename it")
    loose = sum(path.parent == folder for path in files)
    if classes and loose:
        raise DataError(
            f"{folder} holds {loose} images beside its sub-folders, so their class is unknown; "
            "move them into a sub-folder, or pack a folder without any"
        )
    return files, tuple(classes) or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ImageFolder:
    """Files in the order in which they are packed."""

    folder: Path
    files: Sequence[Path]
    classes: tuple[str, ...] | None
    resize: int | None

    def prepare(self, number: int) -> PackedImage | str:
        """The image to write for a file, or why there is none."""
        path = self.files[number]
        try:
            data = path.read_bytes()
            image = decode(data)
        except (UndecodableImageError, OSError) as error:
            return str(error)
        extension = path.suffix[1:].lower()
        if self.resize is not None and min(image.shape[-2:]) > self.resize:
            image = resize_shorter_side(image, self.resize)
            extension, data = encode(image)
        label = self.classes.index(path.relative_to(self.folder).parts[0]) if self.classes else None
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)  # a dot would end the key
        height, width = image.shape[-2:]
        return PackedImage(f"{number:09d}-{stem}", extension, data, label, (height, width))


def _prepared(images: _ImageFolder, num_workers: int) -> Generator[PackedImage | str]:
    """`_ImageFolder.prepare` of each file, in order, a few chunks ahead."""
    numbers = range(len(images.files))
    if num_workers == 1:
        yield from map(images.prepare, numbers)
        return
    context = multiprocessing.get_context("forkserver")
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(
            concurrent.futures.ProcessPoolExecutor(num_workers, context, initializer=_begin, initargs=(images,))
        )
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        pending: collections.deque[concurrent.futures.Future[list[PackedImage | str]]] = collections.deque()
        for first in range(0, len(numbers), _CHUNK):
            pending.append(pool.submit(_prepare, numbers[first : first + _CHUNK]))
            if len(pending) > 2 * num_workers:
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


_images: _ImageFolder  # of a worker process


def _begin(images: _ImageFolder) -> None:
    global _images
    _images = images
    torch.set_num_threads(1)  # there is a process for every core


def _prepare(numbers: range) -> list[PackedImage | str]:
    return [_images.prepare(number) for number in numbers]
