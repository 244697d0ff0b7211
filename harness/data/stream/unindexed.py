"""The stream of webdataset shards without an index: `wds://` and a path or URL, with braces for many.

Shards are drawn with replacement and their images shuffled in a buffer, both by the library. Crops, flips and prefixes
depend on the position, as in an indexed stream; images come in the order of reading.
"""

from __future__ import annotations

import functools
import random
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import webdataset

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import I64, make_key
from aimscale.harness.data.store.decoding import IMAGE_EXTENSIONS, UndecodableImageError, decode_interleaved
from aimscale.harness.data.store.shards import is_url, open_file, with_retries
from aimscale.harness.data.store.tars import expand_braces, read_samples
from aimscale.harness.data.stream.augment import box_uniforms, crop_resize_into
from aimscale.harness.data.stream.base import MAX_REPLACEMENTS, Stream, content_digest
from aimscale.harness.data.stream.indexed import TrainStream
from aimscale.harness.run.config import UNINDEXED, RunConfig

MAX_FAILURES = 6
"""Number of unreadable shards in a row at which the stream gives up; fewer are reported and skipped."""


def open_stream(
    config: RunConfig, *, cache_dir: str | None = None, cache_gb: float = 100.0, machines: int = 1
) -> Stream:
    """Open the stream of a run, by its sources; raises as `TrainStream` and `UnindexedStream` do."""
    if any(source.path.startswith(UNINDEXED) for source in config.training.data.sources):
        return UnindexedStream(config)
    return TrainStream(config, cache_dir=cache_dir, cache_gb=cache_gb, machines=machines)


def shard_urls(path: str) -> list[str]:
    """Return the shards that a `wds://` path names."""
    urls = expand_braces(path.removeprefix(UNINDEXED))
    for url in urls:
        if not is_url(url) and not url.startswith("/"):
            raise DataError(f"{path}: give an absolute path or a URL after {UNINDEXED}, such as {UNINDEXED}/data/{url}")
    if not any(is_url(url) or Path(url).is_file() for url in urls):
        raise DataError(f"{path} names {len(urls)} shards, none of which is there, such as {urls[0]}")
    return urls


class UnindexedStream(Stream):
    """Stream of shards without an index, in the order of reading; every loading process draws its own shards."""

    unique_images = 0
    datasets = ()

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        (source,) = config.training.data.sources
        self._urls = shard_urls(source.path)
        self.fingerprint = content_digest(self._urls)
        self._reading: Iterator[tuple[str, bytes]] | None = None

    def _decode(self, images: torch.Tensor, where: range | I64) -> tuple[str, ...]:
        bad: list[str] = []
        uniforms = box_uniforms(make_key("crop", self._seed), np.asarray(where))
        for row, position in enumerate(where):
            pixels = self._next(int(position), bad)
            height, width = np.array(pixels.shape[:2], dtype=np.int32)[:, None]
            box = self._boxes(uniforms[row : row + 1], height, width)
            crop_resize_into(images[row : row + 1], pixels, tuple(values[0].item() for values in box))
        return tuple(bad)

    def _next(self, position: int, bad: list[str]) -> npt.NDArray[np.uint8]:
        """Read the next image that decodes, (H, W, C); names of skipped ones are appended to `bad`."""
        if self._reading is None:  # opened where it is used: in the trainer, or in each worker
            self._reading = self._pipeline(position)
        for _ in range(MAX_REPLACEMENTS):
            name, data = next(self._reading)
            try:
                return decode_interleaved(data, self._channels)
            except UndecodableImageError as error:
                bad.append(f"{name} ({error})")
        raise DataError(f"position {position}: {MAX_REPLACEMENTS} undecodable images in a row, last {bad[-1]}")

    def _pipeline(self, position: int) -> Iterator[tuple[str, bytes]]:
        """Yield names and bytes of images, endlessly; processes start at different positions, and so draw different
        shards."""
        seed = int(make_key("unindexed", self._seed, position))
        shards = webdataset.ResampledShards(self._urls, seed=seed, worker_seed=lambda: 0, deterministic=True)
        size = self._data.shuffle_buffer
        shuffle = webdataset.shuffle(size, initial=max(1, size // 2), rng=random.Random(seed))
        yield from shuffle(_samples(shard["url"] for shard in shards))


def _samples(urls: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield names and images of the samples of some shards; an unreadable shard is reported, and the next one is
    read."""
    num_failures = 0
    for url in urls:
        problem = "it holds no samples"
        try:
            with with_retries(functools.partial(open_file, url)) as file:
                for key, members in read_samples(file, IMAGE_EXTENSIONS, "r|*"):
                    num_failures, problem = 0, ""
                    yield f"{url}: {key}", next((members[each][1] for each in IMAGE_EXTENSIONS if each in members), b"")
        except (OSError, DataError, tarfile.TarError) as error:
            problem = str(error) or type(error).__name__
        if problem:
            num_failures += 1
            sentence = f"shard {url} cannot be read ({problem})"
            if num_failures >= MAX_FAILURES:
                raise DataError(f"{sentence}, nor could the {MAX_FAILURES - 1} before; see to them")
            print(f"{sentence}; another is read instead", file=sys.stderr, flush=True)
