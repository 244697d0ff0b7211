"""Training on webdataset shards without an index: `wds://` and a path or URL, with braces for many.

The library's own pipeline reads: shards drawn with replacement, their images shuffled in a buffer. Crops, flips and
prefixes are those of the positions, as in an indexed stream; the images are those that come.
"""

from __future__ import annotations

import functools
import hashlib
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
import webdataset

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import I64, make_key
from aimscale.harness.data.store.decoding import IMAGE_EXTENSIONS, UndecodableImageError, decode_interleaved
from aimscale.harness.data.store.index import ShardDataset
from aimscale.harness.data.store.shards import is_url, open_remote, with_retries
from aimscale.harness.data.stream.augment import box_draws, crop_resize_into
from aimscale.harness.data.stream.draws import MAX_REPLACEMENTS, Stream
from aimscale.harness.data.stream.positions import TrainStream
from aimscale.harness.run.config import UNINDEXED, RunConfig

MAX_FAILURES = 6
"""Shards or images in a row that cannot be read, after which the stream gives up; before, it says so and goes on."""


def open_stream(config: RunConfig, *, cache_dir: str | None = None, cache_gb: float = 100.0) -> Stream:
    """The stream of a run, by its sources; raises as `TrainStream` and `UnindexedStream` do."""
    if any(source.path.startswith(UNINDEXED) for source in config.training.data.sources):
        return UnindexedStream(config)
    return TrainStream(config, cache_dir=cache_dir, cache_gb=cache_gb)


def shard_urls(path: str) -> list[str]:
    """The shards that a `wds://` path names.

    Raises:
        DataError: a relative path, or no shard.
    """
    urls: list[str] = webdataset.shardlists.expand_urls(path.removeprefix(UNINDEXED))
    for url in urls:
        if not is_url(url) and not url.startswith("/"):
            raise DataError(f"{path}: give an absolute path or a URL after {UNINDEXED}, such as {UNINDEXED}/data/{url}")
    if not any(is_url(url) or Path(url).is_file() for url in urls):
        raise DataError(f"{path} names {len(urls)} shards, none of which is there, such as {urls[0]}")
    return urls


class UnindexedStream(Stream):
    """Images of shards without an index, as they come; every process that loads draws shards of its own.

    Raises:
        DataError: a path that names no shards.
    """

    unique_images = 0
    datasets: tuple[ShardDataset, ...] = ()

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        (source,) = config.training.data.sources
        self._urls = shard_urls(source.path)
        self._reading: Iterator[tuple[str, bytes]] | None = None
        self._num_failures = 0

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the shards' names."""
        return hashlib.blake2b(" ".join(self._urls).encode(), digest_size=8).hexdigest()

    def _decode(self, images: torch.Tensor, where: range | I64) -> tuple[str, ...]:
        bad: list[str] = []
        uniforms = box_draws(make_key("crop", self._seed), np.asarray(where))
        for row, position in enumerate(where):
            pixels = self._next(int(position), bad)
            height, width = np.array(pixels.shape[:2], dtype=np.int32)[:, None]
            box = self._boxes(uniforms[row : row + 1], height, width)
            crop_resize_into(images[row : row + 1], pixels, tuple(values[0].item() for values in box))
        return tuple(bad)

    def _next(self, position: int, bad: list[str]) -> npt.NDArray[np.uint8]:
        """The next image that decodes, (H, W, C); names of those before it go to `bad`."""
        if self._reading is None:  # made where it is used: by the trainer, or in each worker
            self._reading = self._pipeline(position)
        for _ in range(MAX_REPLACEMENTS):
            name, data = next(self._reading)
            try:
                return decode_interleaved(data, self._channels)
            except UndecodableImageError:
                bad.append(name)
        raise DataError(f"position {position}: {MAX_REPLACEMENTS} undecodable images in a row, last {bad[-1]}")

    def _pipeline(self, position: int) -> Iterator[tuple[str, bytes]]:
        """Names and bytes of images, for ever; processes begin at different positions, and so draw different shards."""
        seed = make_key("unindexed", self._seed, position)
        shards = webdataset.ResampledShards(self._urls, seed=int(seed), worker_seed=lambda: 0, deterministic=True)
        files = webdataset.tariterators.tar_file_expander(self._opened(shards), handler=self._note)
        samples = map(self._found, webdataset.tariterators.group_by_keys(files, handler=self._note))
        size = self._data.shuffle_buffer
        shuffle = webdataset.shuffle(size, initial=max(1, size // 2), rng=random.Random(int(seed)))
        for sample in shuffle(samples):
            found = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
            yield f"{sample['__url__']}: {sample['__key__']}", found or b""

    def _opened(self, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            url = shard["url"]
            try:
                stream = with_retries(functools.partial(_open, url))
            except (OSError, DataError) as error:
                error.args = (f"cannot open shard {url}: {error}",)
                self._note(error)
                continue
            with stream:
                yield {**shard, "stream": stream}

    def _found(self, sample: dict[str, Any]) -> dict[str, Any]:
        self._num_failures = 0
        return sample

    def _note(self, error: Exception) -> bool:
        """Say what could not be read and go on; webdataset adds the shard's file and URL to the error.

        Raises:
            DataError: too often in a row.
        """
        self._num_failures += 1
        *told, _, url = (*error.args, None, None) if len(error.args) < 3 else error.args
        sentence = " ".join(map(str, told)) + (f" (shard {url})" if url else "")
        if self._num_failures >= MAX_FAILURES:
            raise DataError(f"{MAX_FAILURES} shards in a row cannot be read, last: {sentence}") from error
        print(f"{sentence}; another is read instead", file=sys.stderr, flush=True)
        return True


def _open(url: str) -> IO[bytes]:
    return open_remote(url) if is_url(url) else Path(url).open("rb")
