"""Contents of `dataset.json`, read without opening the data set: no torch, no index, no images."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aimscale.aim.errors import some
from aimscale.harness.data import DataError
from aimscale.harness.data.store.shards import read_bytes
from aimscale.harness.run.config import UNINDEXED, RunConfig
from aimscale.harness.run.files import read_file

FORMAT_VERSION = 2
INDEX_FILE = "index.parquet"
DATASET_FILE = "dataset.json"
NO_LABEL = -1
MAX_LABEL = 2**24 - 1
"""Largest class number; counting classes takes memory for all numbers up to it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Contents of `dataset.json`."""

    version: int = FORMAT_VERSION
    name: str
    num_samples: int
    """Rows of the index."""
    num_bad: int
    """Rows whose image did not decode."""
    num_shards: int
    total_bytes: int
    max_width: int
    max_height: int
    max_pixels: int
    one_size: bool
    """Whether all images that decode have the same width and height."""
    classes: tuple[str, ...] | None
    """Class names by label; null when labels have no names or there are none."""
    shards_at: str | None = None
    """Folder or URL of the shards when the index is kept elsewhere."""
    fingerprint: str
    """16 hex digits of the checksums and labels in order, whatever the shards' names and sizes."""

    @property
    def num_usable(self) -> int:
        """Images that decode."""
        return self.num_samples - self.num_bad

    @property
    def index_folder(self) -> str:
        """Name of the folder of the mapped columns, beside this file."""
        return f"index-{self.fingerprint}"

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> DatasetInfo:
        """Parse the file's text; `where` names the file in errors."""
        try:
            values: dict[str, Any] = dict(json.loads(text))
            if (version := values["version"]) != FORMAT_VERSION:
                raise ValueError(f"version {version}; this program reads {FORMAT_VERSION}")
            if not re.fullmatch("[0-9a-f]{16}", values["fingerprint"]):  # it names a folder
                raise ValueError(f"fingerprint {values['fingerprint']!r:.80}")
            if not isinstance(values.get("shards_at"), str | None):
                raise ValueError("shards_at is no text")
            names = values.pop("classes")
            return cls(**values, classes=None if names is None else tuple(names))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{where} cannot be used ({error}); run `aimscale data index` again") from error


DatasetLookup = Callable[[str], DatasetInfo | None]
"""Function from the path of a data set to its info; None if it is not here."""


def image_checksum(data: bytes) -> int:
    """Compute the 64-bit BLAKE2b hash of an image file."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def require_usable(path: str, info: DatasetInfo, max_bad_fraction: float) -> None:
    """Raise DataError if a data set has no usable images, or if its index counts too many undecodable ones."""
    if not info.num_usable or info.num_bad / info.num_samples > max_bad_fraction:
        raise DataError(
            f"{path}: {info.num_bad} of {info.num_samples} images cannot be decoded (`aimscale data info` names "
            f"some); repair them or raise data.max_bad_fraction ({max_bad_fraction:g})"
        )


def require_images(path: str, info: DatasetInfo, num_images: int | None, max_bad_fraction: float) -> None:
    """Raise DataError if a data set has fewer images that decode than are asked for, none, or too many that do not."""
    require_usable(path, info, max_bad_fraction)
    if num_images is not None and info.num_usable < num_images:
        raise DataError(f"{path} has {info.num_usable} usable images, {num_images} were asked for; lower num_images")


def read_info(path: str) -> DatasetInfo:
    """Read the info of a data set at a folder or URL."""
    where = f"{path.rstrip('/')}/{DATASET_FILE}"
    try:
        if "://" in path:
            return DatasetInfo.from_json(read_bytes(where), where)
        stat = os.stat(where)
        return _read_file(where, stat.st_ino, stat.st_mtime_ns, stat.st_size)
    except FileNotFoundError as error:
        if "://" not in path and not Path(path).is_dir():
            neighbours = [each.parent.name for each in Path(path).parent.glob(f"*/{DATASET_FILE}")]
            near = difflib.get_close_matches(Path(path).name, neighbours, 1)
            hint = f"; did you mean {Path(path).parent / near[0]}?" if near else ""
            raise DataError(f"data set folder {path} does not exist{hint}") from error
        if "://" not in path and (inside := sorted(str(each.parent) for each in Path(path).glob(f"*/{DATASET_FILE}"))):
            raise DataError(f"{path} holds data sets and is none; name one of them: {some(inside)}") from error
        raise DataError(f"{path} has no index; run `aimscale data index {path}` or `aimscale data pack`") from error
    except (OSError, ValueError) as error:  # the latter: a NUL in the path
        raise DataError(f"cannot read the index of {path!r}: {error}") from error


@functools.lru_cache(1024)
def _read_file(where: str, *stat: int) -> DatasetInfo:
    """Read the file `where`, once for each state of it: a look at a thousand runs asks for it thousands of times."""
    return DatasetInfo.from_json(read_file(Path(where)), where)


def find_info(path: str) -> DatasetInfo | None:
    """Read the info of a data set; None if it is not made yet, cannot be read, or has no index."""
    with contextlib.suppress(DataError):
        return None if path.startswith(UNINDEXED) else read_info(path)
    return None


def fingerprint(path: str) -> str | None:
    """Return 16 hex digits that identify a data set's content; None if it is not made yet or cannot be read."""
    info = find_info(path)
    return info.fingerprint if info else None


def with_fingerprints(config: RunConfig) -> RunConfig:
    """Fill in the fingerprints of a run's data sources that are not set."""
    data = config.training.data
    sources = tuple(
        source.model_copy(update={"fingerprint": source.fingerprint or fingerprint(source.path)})
        for source in data.sources
    )
    training = config.training.model_copy(update={"data": data.model_copy(update={"sources": sources})})
    return config.model_copy(update={"training": training})
