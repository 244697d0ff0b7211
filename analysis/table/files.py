"""Files of other people: which are read at all, and how much of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from aimscale.analysis.errors import AnalysisError

MAX_BYTES = 10**9
"""Limit on the bytes of a file that is read, and on those that its values take in memory."""


def files_of(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield the files of a folder that a pattern or a name finds, sorted; folders are passed over.

    Raises:
        AnalysisError: one is a pipe or a device, is too large, or lies elsewhere, behind a link.
    """
    for path in sorted(folder.glob(pattern)):
        if not path.is_dir():
            check_file(path)
            if not path.resolve().is_relative_to(folder.resolve()):
                raise AnalysisError(f"{path} links to a file outside of {folder}; put a copy of that file in its place")
            yield path


def check_file(path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Raise AnalysisError for what would be waited for, or read without end."""
    if not path.is_file():
        raise AnalysisError(f"{path} is a pipe or a device; save what it gives to a file first")
    if path.stat().st_size > max_bytes:
        raise AnalysisError(f"{path} has more than {max_bytes:.0e} bytes; give a smaller one")
