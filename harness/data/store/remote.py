"""Files that fsspec opens, on web servers and in object stores, with retries and bounded waits."""

from __future__ import annotations

import logging
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from aimscale.harness.data import DataError
from aimscale.harness.run.files import MAX_BYTES
from aimscale.harness.run.timeouts import STALLED_S

T = TypeVar("T")
NUM_TRIES = 6  # of a remote read: pauses of about 6 s in all
FIRST_PAUSE_S = 0.2  # before the second try; doubles
PROTOCOLS = ("file", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "hf", "memory")
"""Protocols of fsspec that read bytes and no more: others build a path of code, archives or further URLs."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # optional dependencies of this package, by protocol
_CHUNK_BYTES = 4 * 2**20  # of a download


def is_url(path: str) -> bool:
    """Return whether fsspec, and not the local file system, opens this path."""
    return re.match(r"^[a-z][a-z0-9+.-]+://", path) is not None


def join(folder: str, name: str) -> str:
    """Join the path or URL of a folder and a file's name."""
    return f"{folder.rstrip('/')}/{name}"


def read_bytes(url: str) -> bytes:
    """Read all bytes of a URL; OSError if it cannot be read."""

    def read() -> bytes:
        with open_file(url) as file:
            if len(data := file.read(MAX_BYTES + 1)) > MAX_BYTES:
                raise DataError(f"{url} has more than {MAX_BYTES:.0e} bytes; give another file")
            return data

    return with_retries(read)


def open_file(path: str) -> IO[bytes]:
    """Open a local file or a URL for sequential reading; OSError if it cannot be opened."""
    if not is_url(path):
        return open(path, "rb")
    filesystem, inner = filesystem_of(path)
    try:
        opened: IO[bytes] = filesystem.open(inner, "rb")
    except OSError:
        raise
    except Exception as error:  # each file system raises types of its own
        raise OSError(f"{type(error).__name__} {error}".strip()) from error
    return opened


def download(url: str, to: Path) -> int:
    """Copy a remote file to the front of a local one, with retries and in bounded memory; returns its bytes.

    Raises:
        OSError: it cannot be read, or written.
    """

    def fetch() -> int:
        with open_file(url) as source, to.open("r+b" if to.exists() else "wb") as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)
            return target.tell()

    return with_retries(fetch)


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, one per process, and the path within it."""
    protocol, options = url.partition("://")[0], dict[str, Any]()
    if protocol not in PROTOCOLS or "::" in url:
        raise DataError(f"{url:.200} is no address that is read; give one of {', '.join(PROTOCOLS)}, without '::'")
    if protocol in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=STALLED_S, sock_read=STALLED_S)}
    try:
        import fsspec.core  # not installed where sweeps are only planned

        filesystem, inner = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'aimscale[{extra}]'" if extra else f"install the package that fsspec names: {error}"
        raise DataError(f"{url} needs a package that is not installed; {how}") from error
    except Exception as error:  # each protocol's class raises types of its own for unusable URLs
        raise DataError(f"{url} cannot be opened ({error}); give a folder or a URL that fsspec knows") from error
    return filesystem, inner


def with_retries(action: Callable[[], T]) -> T:
    """Try a remote action up to six times with growing pauses; a missing file and a URL that is none are final at once.

    Raises:
        OSError: the last failure, whatever type the file system gave it.
    """
    for attempt in range(NUM_TRIES):
        try:
            return action()
        except (FileNotFoundError, DataError):
            raise
        except Exception as error:  # each file system raises types of its own, such as botocore's
            if attempt == NUM_TRIES - 1 or isinstance(error, ValueError):
                raise OSError(f"{type(error).__name__} {error}".strip()) from error
            if attempt == NUM_TRIES // 2:
                logging.getLogger(__name__).warning("a server gives no data (%r); trying again", error)
            time.sleep(FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")
