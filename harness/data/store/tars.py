"""Samples of webdataset's tar files, read from front to back in bounded memory, and the names of many such files.

A sample is a run of members with one key (the path up to the first dot of the file name). It has one image (jpg, png,
webp, ...) and, for its label, `cls` or `json`; other members, a caption in `txt` for one, are left alone.
"""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Self

from aimscale.harness.data import DataError
from aimscale.harness.data.images import IMAGE_EXTENSIONS
from aimscale.harness.data.store.shards import is_url, open_file
from aimscale.harness.run.config import UNINDEXED

Members = dict[str, tuple[int, bytes]]
"""Extension, in lower case -> offset of the file in the tar, and its bytes."""


class _Member(tarfile.TarInfo):
    """Tar header that refuses what tarfile would take for the end of the archive, so that no sample is lost."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """Read a header as tarfile does; ReadError for anything that is neither a header nor the end mark."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the stubs lack it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end-of-archive mark, or a damaged header ({error})") from error


def read_samples(file: IO[bytes], extensions: Collection[str]) -> Iterator[tuple[str, Members]]:
    """Yield (key, members) of every sample of a tar file, with the members that have one of these extensions.

    Raises:
        tarfile.TarError: it is damaged, cut off, or no tar file.
        OSError: it cannot be read.
    """
    current: str | None = None
    members: Members = {}
    try:
        with tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if not member.isfile():
                    continue
                folder, _, file_name = member.name.rpartition("/")
                stem, _, extension = file_name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                key = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                if key != current:
                    if current is not None:
                        yield current, members
                    current, members = key, {}
                if extension.lower() in extensions:
                    content = tar.extractfile(member)
                    assert content is not None, "the member is a file"
                    members[extension.lower()] = member.offset_data, content.read()
    except (OSError, tarfile.TarError):
        raise
    except Exception as error:  # from malformed headers, or a remote file system
        raise tarfile.ReadError(f"{type(error).__name__} {error}".strip()) from error
    if current is not None:
        yield current, members


MAX_SHARDS = 10**7
"""Largest number of shards that a pattern may name: more names take gigabytes of memory."""


def expand_braces(pattern: str) -> list[str]:
    """Expand a pattern of webdataset's into names: `NAME-{000..123}.tar`."""
    ranges = re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MAX_SHARDS:
        raise DataError(f"{pattern[:80]} names more than {MAX_SHARDS:,} shards; give the numbers that there are")
    import webdataset  # slow to import

    try:
        return list(webdataset.shardlists.expand_urls(pattern))
    except (ValueError, KeyError) as error:
        raise DataError(f"{pattern[:80]} names no shards ({error}); write NAME-{{000..123}}.tar") from error


def shard_urls(path: str) -> list[str]:
    """Return the shards that a `wds://` path names; DataError if one is a relative path, or there is none."""
    urls = expand_braces(path.removeprefix(UNINDEXED))
    for url in urls:
        if not is_url(url) and not (url.startswith("/") and Path(url).is_file()):
            raise DataError(f"{path}: there is no shard {url}; give an absolute path or a URL after {UNINDEXED}")
    return urls


def read_images(url: str) -> Iterator[tuple[str, bytes]]:
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
