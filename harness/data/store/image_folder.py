"""Pack a folder of image files: in parallel, each decoded once, going on where a killed process stopped.

Shards are written in `.OUT.partial/`, beside the output. What is known of every finished one lies in `.pack/` there, so
that the next start with the same files and settings takes it over; the folder is renamed when everything is written.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.resize import resize_shorter_side
from aimscale.harness.data.store.decoding import IMAGE_EXTENSIONS, UndecodableImageError, decode
from aimscale.harness.data.store.indexing import write_scans
from aimscale.harness.data.store.info import DatasetInfo
from aimscale.harness.data.store.pack import MAX_SHARD_BYTES, PackedImage, ShardWriter, encode, shuffled_order
from aimscale.harness.data.store.scan import SCAN_SCHEMA, ShardScan
from aimscale.harness.run.files import locked, written_aside

_CHUNK = 64  # images that a process prepares at a time
_WORTH_PROCESSES = 5000  # images, which take longer than starting processes
_STATE_FOLDER = ".pack"


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
    with _resumable_folder(out, images.identity(max_shard_bytes, skip_bad)) as aside:
        state = _State(aside, files)
        writer = ShardWriter(aside, max_shard_bytes, state.finish_shard, number=state.num_shards)
        with contextlib.closing(_prepared(images, range(state.num_files, len(files)), num_workers)) as prepared:
            for number, image in enumerate(prepared, start=state.num_files):
                if isinstance(image, PackedImage):
                    writer.add(image)
                elif skip_bad:
                    state.skipped.append(number)
                else:
                    raise DataError(
                        f"image {files[number]} cannot be decoded ({image}); repair or remove it, or pass --skip-bad"
                    )
                state.num_files = number + 1
        writer.close()
        if len(state.skipped) == len(files):
            raise DataError(f"none of the {len(files)} images of {folder} can be decoded")
        info = write_scans(aside, out.name, state.scans(), classes)
    return info, [files[number] for number in state.skipped]


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
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in name):  # how Python shows bytes that are no text
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

    def identity(self, *settings: object) -> str:
        """Hash of all that the shards depend on; of a file its name, size and time."""
        digest = hashlib.blake2b(repr((self.classes, self.resize, settings)).encode(), digest_size=16)
        for path in self.files:
            stat = path.stat()
            digest.update(f"{path!s}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


@contextlib.contextmanager
def _resumable_folder(out: Path, identity: str) -> Iterator[Path]:
    """A folder to fill, named `out` when the block ends well; kept for another start when the process is interrupted.

    Raises:
        DataError: `out` exists already, cannot be written, or is being written by another process.
    """
    if out.exists():
        raise DataError(f"{out} exists already; choose another folder or remove it")
    aside = out.with_name(f".{out.name}.partial")
    state = aside / _STATE_FOLDER
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {out.parent}: {error.strerror}") from error
    with locked(state / "lock", wait=False) as mine:
        if not mine:
            raise DataError(f"{out} is being written by another process; wait for it or choose another folder")
        stated = state / "identity"
        if not stated.exists() or stated.read_text() != identity:  # of other files or settings
            for left in [*aside.glob("*.tar"), *state.glob("*.parquet")]:
                left.unlink()
            stated.write_text(identity)
        try:
            yield aside
            shutil.rmtree(state)
            aside.rename(out)
        except BaseException as error:
            if isinstance(error, Exception) or not any(state.glob("*.parquet")):
                shutil.rmtree(aside, ignore_errors=True)
            raise


class _State:
    """How far a pack has come: the finished shards, each with the files up to its end and those left out."""

    def __init__(self, aside: Path, files: Sequence[Path]) -> None:
        self._folder = aside / _STATE_FOLDER
        self.num_files = 0
        self.skipped: list[int] = []
        self._parts = sorted(self._folder.glob("*.parquet"))
        if self._parts:
            metadata = pq.read_metadata(self._parts[-1]).metadata
            self.num_files, self.skipped = int(metadata[b"num_files"]), json.loads(metadata[b"skipped"])
        for shard in aside.glob("*.tar"):  # the one that was being written
            if not (self._folder / f"{shard.name}.parquet").exists():
                shard.unlink()

    @property
    def num_shards(self) -> int:
        return len(self._parts)

    def finish_shard(self, scan: ShardScan) -> None:
        """Keep what the index needs to know of a shard."""
        metadata = {"size": str(scan.size), "num_files": str(self.num_files), "skipped": json.dumps(self.skipped)}
        path = self._folder / f"{scan.name}.parquet"
        with written_aside(path, durable=False) as aside:
            pq.write_table(scan.rows.replace_schema_metadata(metadata), aside)
        self._parts.append(path)

    def scans(self) -> Iterator[ShardScan]:
        """Of every shard, one at a time."""
        for path in self._parts:
            table = pq.ParquetFile(path).read(use_threads=False)
            size = int(table.schema.metadata[b"size"])
            yield ShardScan(path.stem, size, table.replace_schema_metadata(None).cast(SCAN_SCHEMA))


def _prepared(images: _ImageFolder, numbers: range, num_workers: int) -> Generator[PackedImage | str]:
    """`_ImageFolder.prepare` of each number, in order, a few chunks ahead."""
    if num_workers == 1:
        yield from map(images.prepare, numbers)
        return
    context = multiprocessing.get_context("forkserver")
    chunks = [numbers[first : first + _CHUNK] for first in range(0, len(numbers), _CHUNK)]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(
            concurrent.futures.ProcessPoolExecutor(num_workers, context, initializer=_begin, initargs=(images,))
        )
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        pending: collections.deque[concurrent.futures.Future[list[PackedImage | str]]] = collections.deque()
        for chunk in chunks:
            pending.append(pool.submit(_prepare, chunk))
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
