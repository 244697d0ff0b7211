"""Images in Parquet files as hubs ship them: a column of encoded images, and one of labels if there are any.

The files are read once from front to back. Their images wait in a file without a name beside the output, since they are
packed in a shuffled order: it takes as much disk as they do, and is gone with the process, however that ends.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from aimscale.harness.data import DataError
from aimscale.harness.data.images import IMAGE_EXTENSIONS
from aimscale.harness.data.store.indexing import Progress
from aimscale.harness.data.store.listing import walk_files

ENDING = ".parquet"
_BATCH = 64  # rows that are read at a time
_SPLIT = re.compile(r"(.+?)-\d+-of-\d+(-\w+)?\.parquet")
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


class EncodedImage(NamedTuple):
    """Image as it stands in a file."""

    name: str
    """File name, with the ending of its format."""
    data: bytes
    """Encoded image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImages:
    """Encoded images, one after the other in a file; pickled by the path of that file."""

    path: str
    """File of all of them."""
    bounds: npt.NDArray[np.int64]
    """Offset (n + 1) at which each begins, bytes."""
    names: Sequence[str]
    """File name of each, empty where the table has none."""
    file: Any = None
    """Open file, which exists as long as it is open; None in other processes."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> EncodedImage:
        """Read an image; its ending is that of its format where its name has none."""
        start, stop = self.bounds[number : number + 2].tolist()
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), stop - start, start)
        name = os.path.basename(self.names[number]) or str(number)
        if Path(name).suffix[1:].lower() not in IMAGE_EXTENSIONS:
            name = f"{name}.{_format_ending(data)}"
        return EncodedImage(name, data)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "file": None}


def _format_ending(data: bytes) -> str:
    """Return the ending of an image's format; that of a JPEG if it is none, and decoding tells why."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return _EXTENSIONS.get(picture.format or "", "jpg")
    except (UnidentifiedImageError, OSError, ValueError):
        return "jpg"


class Table(NamedTuple):
    """Images and labels of Parquet files."""

    images: EncodedImages
    """Images, in the order of the files and rows."""
    labels: list[int] | None
    """Class numbers, -1 for none; None if there is no column of labels."""
    classes: tuple[str, ...] | None
    """Class names by label."""


def find_parquet(source: Path) -> list[Path]:
    """Return the Parquet files that a source names, sorted: itself, or those in a folder that holds no image files.

    Raises:
        DataError: a folder holds several splits.
    """
    if source.suffix.lower() == ENDING:
        return [source]
    files: list[Path] = []
    for path in walk_files(source) if source.is_dir() else ():
        if path.suffix[1:].lower() in IMAGE_EXTENSIONS:  # the first ends the search: there may be millions
            return []
        if path.suffix.lower() == ENDING:
            files.append(path)
    splits = sorted({match[1] for file in files if (match := _SPLIT.fullmatch(file.name))})
    if len(splits) > 1:
        raise DataError(f"{source} holds the splits {', '.join(splits)}; pack one at a time: {splits[-1]}-*{ENDING}")
    return sorted(files)


def read_parquet(
    files: Sequence[Path], folder: Path, columns: Mapping[str, str], progress: Progress = lambda *_: None
) -> Table:
    """Read the images of Parquet files, which wait in `folder` until they are packed.

    `columns` names the columns of `image` and `label` where a file has several that could be.

    Raises:
        DataError: a file is damaged, has no column of images, or another one than the first.
    """
    image, label, classes = _choose_columns(files[0], columns)
    names: list[str] = []
    labels: list[Any] = []
    sizes: list[int] = []
    spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as the images are)
    for number, file in enumerate(files):
        progress("reading", number, len(files), "files")
        for batch in _batches(file, [image] + ([label] if label else [])):
            for name, data in _encoded(batch.column(image), file, image):
                names.append(name)
                sizes.append(spool.write(data))
            if label:
                labels += batch.column(label).to_pylist()
    spool.flush()
    if not names:
        raise DataError(f"{files[0]} holds no rows")
    bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    path = f"/proc/{os.getpid()}/fd/{spool.fileno()}"  # other processes open it by this name
    images = EncodedImages(path=path, bounds=bounds, names=names, file=spool)
    return Table(images, *(_class_numbers(labels, classes, files[0], label) if label else (None, None)))


def _choose_columns(file: Path, columns: Mapping[str, str]) -> tuple[str, str | None, tuple[str, ...] | None]:
    """Return the columns of images and labels of a file, and the class names that it tells."""
    schema = _open(file).schema_arrow
    if unknown := [name for name in columns.values() if name not in schema.names]:
        raise DataError(f"{file} has no column '{unknown[0]}'; its columns: {', '.join(schema.names)}")
    features = _features(schema)
    images = [field.name for field in schema if _holds_images(field.type)]
    labels = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    labels = labels or [name for name in ("label", "labels", "cls", "class") if name in schema.names]
    chosen: dict[str, str | None] = {}
    for role, names in (("image", images), ("label", labels)):
        if len(names) > 1 and role not in columns:
            several = " and ".join(names)
            raise DataError(f"{file} has {several}; say which by --columns {role}={names[0]}")
        chosen[role] = columns.get(role, names[0] if names else None)
    image, label = chosen["image"], chosen["label"]
    if image is None or image not in images:
        what = f"column '{image}' of {file} holds" if image else f"{file} has"
        raise DataError(f"{what} no encoded images, bytes or {{bytes, path}}; its columns: {', '.join(schema.names)}")
    classes = features.get(label or "", {}).get("names")
    return image, label, tuple(map(str, classes)) if classes else None


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return what Hugging Face's metadata tell of each column."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: each for name, each in features.items() if isinstance(each, dict)}


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind[i].name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} is no Parquet file, or damaged ({error}); copy it again") from error


def _batches(file: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    source = _open(file)
    if lacking := [name for name in columns if name not in source.schema_arrow.names]:
        raise DataError(f"{file} has no column '{lacking[0]}' as the first file has; pack them apart")
    try:
        yield from source.iter_batches(_BATCH, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} is damaged ({error}); copy it again") from error


def _encoded(column: pa.Array, file: Path, name: str) -> Iterator[EncodedImage]:
    """Yield the images of a column; a row without one is empty, and cannot be decoded."""
    for value in column.to_pylist():
        data = value.get("bytes") if isinstance(value, dict) else value
        path = value.get("path") if isinstance(value, dict) else None
        if data is None and path:
            raise DataError(f"{file}: column '{name}' names files ({path}) and does not hold them; pack their folder")
        yield EncodedImage(path or "", data or b"")


def _class_numbers(
    values: Sequence[Any], classes: tuple[str, ...] | None, file: Path, column: str
) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """Return class numbers and names from a column of numbers, -1 or null for none, or of words."""
    present = [value for value in values if value is not None and value != -1]
    if not present:
        return None, None
    if all(isinstance(value, str) for value in present):
        classes = tuple(sorted(set(present)))
        numbers = {name: number for number, name in enumerate(classes)}
        return [numbers.get(value, -1) for value in values], classes
    if not all(isinstance(value, int) and value >= 0 for value in present):
        raise DataError(
            f"{file}: column '{column}' holds neither class numbers nor names; choose one by --columns label="
        )
    classes = classes or tuple(str(number) for number in range(max(present) + 1))
    if max(present) >= len(classes):
        raise DataError(f"{file}: column '{column}' has class {max(present)}, and {len(classes)} names")
    return [-1 if value is None else int(value) for value in values], classes
