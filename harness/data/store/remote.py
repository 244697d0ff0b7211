"""Byte ranges of shards in object stores and on web servers: many concurrent requests, ahead of their use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import fsspec.asyn

from aimscale.harness.data.store.shards import (
    MAX_REQUESTS,
    NUM_TRIES,
    ByteRange,
    filesystem_of,
    join,
    retry_delay_s,
    shard_error,
)

MAX_AHEAD_BYTES = 64 * 2**20
"""Bytes that a reader keeps, or waits for, before they are read."""
_STALLED_S = 60.0  # without an answer for so long, a read counts as stalled and is tried again


class IgnoredRangeError(OSError):
    """Server that answers a request for a byte range with the whole file."""


_FINAL_ERRORS = (FileNotFoundError, PermissionError, IgnoredRangeError)  # trying again cannot help


class RemoteReader:
    """Reader of byte ranges for any number of threads; a request that fails or stalls is repeated, alone.

    Requests run in the thread that fsspec keeps in each process.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self._lock, self._process = threading.Lock(), os.getpid()
        self._filesystem: Any = None
        self._is_async, self._room = False, asyncio.Semaphore(1)
        self._wanted: dict[ByteRange, None] = {}  # to request ahead, in the order of their use
        self._asked: dict[ByteRange, tuple[Future[bytes], int]] = {}  # requested ahead; and the bytes read before
        self._asked_bytes = self._read_bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteReader, (self._location,)

    def read_ahead(self, byte_ranges: Sequence[ByteRange], shards: Collection[str] = ()) -> None:
        """Request what `read_many` will next be called for, as far as memory allows; returns at once.

        Errors are raised where the bytes are read.
        """
        with self._locked():
            self._wanted.update(
                dict.fromkeys(byte_range for byte_range in byte_ranges if byte_range not in self._asked)
            )
            self._ask_ahead()

    def is_ahead(self, byte_range: ByteRange) -> bool:
        """Return whether a byte range was requested ahead and not yet read."""
        return byte_range in self._asked

    def read_many(self, byte_ranges: Sequence[ByteRange]) -> list[bytes]:
        """Read byte ranges, see `LocalReader.read_many`."""
        with self._locked():
            answers = [self._taken(byte_range) for byte_range in byte_ranges]
            self._ask_ahead()
        found: list[bytes] = []
        try:
            for answer in answers:
                found.append(answer.result())
        except Exception as error:  # each file system raises types of its own
            raise shard_error(error, byte_ranges[len(found)][0]) from error
        finally:
            for answer in answers[len(found) :]:
                answer.cancel()
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._process != os.getpid():  # forked: the parent's requests are not answered here
            RemoteReader.__init__(self, self._location)
        with self._lock:
            if self._filesystem is None:
                self._filesystem, _ = filesystem_of(self._location)
                if isinstance(self._filesystem, fsspec.asyn.AsyncFileSystem):
                    self._is_async, self._room = True, asyncio.Semaphore(MAX_REQUESTS)
            yield

    def _taken(self, byte_range: ByteRange) -> Future[bytes]:
        self._wanted.pop(byte_range, None)
        self._read_bytes += byte_range[2]
        if byte_range not in self._asked:
            return self._ask(byte_range)
        self._asked_bytes -= byte_range[2]
        return self._asked.pop(byte_range)[0]

    def _ask_ahead(self) -> None:
        """Request more wanted byte ranges; answers left unread for long are dropped to make room."""
        while self._wanted:
            byte_range = next(iter(self._wanted))
            if self._asked and self._asked_bytes + byte_range[2] > MAX_AHEAD_BYTES:
                oldest, (answer, read_before) = next(iter(self._asked.items()))
                if self._read_bytes - read_before <= 2 * MAX_AHEAD_BYTES:
                    return
                answer.cancel()
                del self._asked[oldest]
                self._asked_bytes -= oldest[2]
                continue
            del self._wanted[byte_range]
            self._asked[byte_range] = self._ask(byte_range), self._read_bytes
            self._asked_bytes += byte_range[2]

    def _ask(self, byte_range: ByteRange) -> Future[bytes]:
        return asyncio.run_coroutine_threadsafe(self._answer(*byte_range), fsspec.asyn.get_loop())

    async def _answer(self, name: str, start: int, size: int) -> bytes:
        """Fetch a byte range, in up to `NUM_TRIES` tries."""
        for attempt in range(NUM_TRIES):
            try:
                async with self._room, asyncio.timeout(_STALLED_S):
                    data = await self._cat(name, start, start + size)
                if len(data) > size:
                    raise IgnoredRangeError(
                        "the server ignores byte ranges; use one that supports them, or copy the shards"
                    )
                return data
            except _FINAL_ERRORS:
                raise
            except TimeoutError as error:
                problem: Exception = TimeoutError(f"stalled: {size} bytes did not come within {_STALLED_S:g} s")
                problem.__cause__ = error
            except Exception as error:  # each file system raises types of its own
                problem = error
            if attempt < NUM_TRIES - 1:
                await asyncio.sleep(retry_delay_s(attempt))
        raise problem

    async def _cat(self, name: str, start: int, end: int) -> bytes:
        filesystem = self._filesystem
        path = filesystem._strip_protocol(join(self._location, name))
        if self._is_async:
            data: bytes = await filesystem._cat_file(path, start=start, end=end)
        else:
            data = await asyncio.to_thread(filesystem.cat_file, path, start=start, end=end)
        return data
