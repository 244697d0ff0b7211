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
from typing import IO, Literal, NamedTuple, NoReturn, Self

import webdataset

from aimscale.harness.data import DataError
from aimscale.harness.data.store.dataset_info import open_local

MAX_IMAGE_BYTES = 1 << 30
"""Limit on an image file's bytes; the most pixels that are decoded (`decoding.MAX_IMAGE_PIXELS`) take less in any
format."""
MAX_SHARDS = 1_000_000
"""Limit on the names that a pattern may stand for."""
_MAX_HEADER_BYTES = 1 << 20  # of a long name or of extended attributes
_MAX_NESTED = 16  # braces within braces
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")

Members = dict[str, tuple[int, bytes]]
"""Extension, in lower case -> offset of the file in the tar, and its bytes."""


class Member(tarfile.TarInfo):
    """Tar header that refuses what tarfile would take for the end of the archive, read for ever, or read into any
    amount of memory."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """Read a header as tarfile does; ReadError for anything that is neither a header nor the end mark."""
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the stubs lack it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end-of-archive mark, or a damaged header ({error})") from error
        if member.size < 0:
            raise tarfile.ReadError(f"a header says {member.size} bytes")
        return member

    def _proc_member(self, tar: tarfile.TarFile) -> Self:
        if self.size < 0 or (self.size > _MAX_HEADER_BYTES and self.type in b"xgXLK"):
            raise tarfile.ReadError(f"a header says {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]  # the stubs lack it

    def _refuse(self, *args: object) -> NoReturn:
        """Refuse sparse members: one of 10 kB may stand for 1 TB, and its bytes are not contiguous."""
        raise tarfile.ReadError("a member is stored as a sparse file")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse


class Slice(NamedTuple):
    """File inside of an uncompressed tar, or a file by itself."""

    tar: Path
    name: str
    """Name within the tar; in a nested tar, `INNER/NAME`."""
    offset: int
    """Offset of the first byte."""
    size: int
    """Bytes."""


def list_slices(path: Path) -> Iterator[Slice]:
    """List the files of an uncompressed tar; a nested tar is replaced by its files.

    Raises:
        tarfile.TarError: it is damaged, cut off, or no tar file.
        OSError: it cannot be read.
    """
    with open_local(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
        for outer in filter(tarfile.TarInfo.isfile, tar):
            stem, _, extension = outer.name.rpartition(".")
            if extension != "tar":
                yield Slice(path, outer.name, outer.offset_data, outer.size)
                continue
            with tarfile.open(fileobj=tar.extractfile(outer), mode="r:", tarinfo=Member) as inner:
                for member in filter(tarfile.TarInfo.isfile, inner):
                    offset = outer.offset_data + member.offset_data
                    yield Slice(path, f"{stem}/{member.name}", offset, member.size)


def read_samples(
    file: IO[bytes], extensions: Collection[str], mode: Literal["r|", "r|*"] = "r|"
) -> Iterator[tuple[str, Members]]:
    """Yield (key, members) of every sample of a tar file, with the members that have one of these extensions.

    Args:
        mode: `r|*` unpacks compressed files, too.

    Raises:
        tarfile.TarError: it is damaged, cut off, or no tar file.
        OSError: it cannot be read.
    """
    current: str | None = None
    members: Members = {}
    try:
        with tarfile.open(fileobj=file, mode=mode, tarinfo=Member) as tar:
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
                    members[extension.lower()] = member.offset_data, _content(tar, member)
    except (OSError, tarfile.TarError):
        raise
    except Exception as error:  # from malformed headers, or a remote file system
        raise tarfile.ReadError(f"{type(error).__name__} {error}".strip()) from error
    if current is not None:
        yield current, members


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_IMAGE_BYTES:
        raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes; the limit is {MAX_IMAGE_BYTES:,}")
    content = tar.extractfile(member)
    assert content is not None
    return content.read()


def expand_braces(pattern: str) -> list[str]:
    """Expand a pattern of webdataset's into names: `NAME-{000..123}.tar`."""
    bound, open_ = 1, [0]  # upper bound on the number of names
    for character in pattern:
        if character == "{":
            open_.append(1)
        elif character == ",":
            open_[-1] += 1
        elif character == "}" and len(open_) > 1:
            bound *= open_.pop()
        if len(open_) > _MAX_NESTED:
            raise DataError(f"{pattern[:80]}: braces are nested three deep; list the shards by one range")
    ends = [(first, last) for first, last in _RANGE.findall(pattern)]
    is_long = any(len(end) > len(str(MAX_SHARDS)) + 10 for pair in ends for end in pair)
    if is_long or bound * math.prod(abs(int(last) - int(first)) + 1 for first, last in ends) > MAX_SHARDS:
        raise DataError(f"{pattern[:80]} names more than {MAX_SHARDS:,} shards; give a smaller range")
    try:
        return list(webdataset.shardlists.expand_urls(pattern))
    except (ValueError, KeyError) as error:
        raise DataError(f"{pattern[:80]} names no shards ({error}); write NAME-{{000..123}}.tar") from error
