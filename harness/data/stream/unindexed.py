"""The stream of webdataset shards without an index: `wds://` and a path or URL, with braces for many.

Shards are drawn with replacement and their images shuffled in a buffer, both by the library. Crops, flips and prefixes
depend on the position, as in an indexed stream; images come in the order of reading.
"""

from __future__ import annotations

import itertools
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import I64, make_key
from aimscale.harness.data.store.decoding import IMAGE_EXTENSIONS, UndecodableImageError, decode_interleaved
from aimscale.harness.data.store.remote import is_url, open_file
from aimscale.harness.data.store.tars import expand_braces, read_samples
from aimscale.harness.data.stream.augment import crop_resize_into
from aimscale.harness.data.stream.base import MAX_REPLACEMENTS, Stream, content_digest
from aimscale.harness.run.config import UNINDEXED, RunConfig


def shard_urls(path: str) -> list[str]:
    """Return the shards that a `wds://` path names; DataError if one is a relative path, or there is none."""
    urls = expand_braces(path.removeprefix(UNINDEXED))
    for url in urls:
        if not is_url(url) and not (url.startswith("/") and Path(url).is_file()):
            raise DataError(f"{path}: there is no shard {url}; give an absolute path or a URL after {UNINDEXED}")
    return urls


class UnindexedStream(Stream):
    """Stream of shards without an index, in the order of reading; every loading process draws its own shards."""

    unique_images, datasets = 0, ()

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._urls = shard_urls(config.training.data.sources[0].path)
        self.fingerprint = content_digest(self._urls)
        self._reading: Iterator[tuple[str, bytes]] | None = None

    def _decode(self, images: torch.Tensor, positions: I64) -> tuple[str, ...]:
        if not len(positions):
            return ()
        if self._reading is None:  # opened where it is used: in the trainer, or in each worker
            self._reading = self._read(seed=make_key("unindexed", self._seed, int(positions[0])))
        bad: list[str] = []
        for row in range(len(positions)):
            for name, data in itertools.islice(self._reading, MAX_REPLACEMENTS):
                try:
                    pixels = decode_interleaved(data, self._channels)
                    break
                except UndecodableImageError as error:
                    bad.append(f"{name} ({error})")
            else:
                raise DataError(f"{MAX_REPLACEMENTS} images in a row cannot be decoded, last {bad[-1]}")
            height, width = np.array(pixels.shape[:2], dtype=np.int32)[:, None]
            (box,) = self._boxes(positions[row : row + 1], height, width).tolist()
            crop_resize_into(images[row : row + 1], pixels, box)
        return tuple(bad)

    def _read(self, seed: int) -> Iterator[tuple[str, bytes]]:
        """Yield names and bytes of images, endlessly; processes have different seeds, and so draw different shards."""
        shards = webdataset.ResampledShards(self._urls, seed=seed, worker_seed=lambda: 0, deterministic=True)
        samples = (sample for shard in shards for sample in _samples(shard["url"]))
        size = self._data.shuffle_buffer
        yield from webdataset.shuffle(size, initial=max(1, size // 2), rng=random.Random(seed))(samples)


def _samples(url: str) -> Iterator[tuple[str, bytes]]:
    """Yield names and images of the samples of a shard."""
    key = None
    try:
        with open_file(url) as file:
            for key, members in read_samples(file, IMAGE_EXTENSIONS):
                yield f"{url}: {key}", next((members[each][1] for each in IMAGE_EXTENSIONS if each in members), b"")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"shard {url} cannot be read ({error}); restore it, or leave it out of the braces") from error
    if key is None:
        raise DataError(f"shard {url} holds no samples; leave it out of the braces")
