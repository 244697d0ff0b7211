"""Verification of a published folder, which may be a stranger's: its files, and all that follows from its tables.

Nothing of the folder is executed, no link is followed, and no more is read than `MAX_FOLDER_BYTES` to hash, the
`MAX_BYTES` of a table, and `MAX_TEXT_BYTES` of another file that is compared.
"""

from __future__ import annotations

import filecmp
import functools
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from aimscale.analysis.display import Result, some
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.publication.card import sha256
from aimscale.analysis.publication.folder import BESIDE, CHECKSUMS, NUMBERS, VERSION, Made, Record, write_results
from aimscale.analysis.table.files import check_file

TOLERANCE = 1e-4
"""Relative difference up to which two numbers are the same. Between processors and releases of scipy, optimisers stop
within some 1e-6 of each other."""
MAX_FOLDER_BYTES, MAX_TEXT_BYTES = 10**12, 10**8
ADDED = ("sweep.yaml", "environment.txt")
"""Files of a sweep that no table gives."""
OF_A_MODEL = ("config.yaml", "weights")
"""Such files and folders of a model."""
IGNORED = (".git", ".gitattributes", ".cache")
"""What git and hubs keep in a folder."""
NOTHING = "nothing"
"""Printed for a place that one side lacks."""
MAX_POWER = 300
"""Power of ten beyond which something is part of a checksum, and no number."""
_NUMBER = re.compile(r"(\d+)(?:\.(\d+))?(?:e([+-]?\d{1,3}))?")
_DOWNLOAD = re.compile(r";base64,[\w+/=]*")


@dataclass(frozen=True, kw_only=True)
class Verification(Result):
    """Comparison of a published folder with what its tables give here."""

    folder: str
    num_numbers: int
    """Number of numbers, words and sentences of `numbers.json` that were compared."""
    num_files: int
    """Number of files whose checksums were compared."""
    damaged: tuple[str, ...]
    """Files that are missing, or that are not those whose checksums were published."""
    unlisted: tuple[str, ...]
    """Files without a checksum, or that no publication has."""
    num_remade: int
    """Number of files that were made again here and compared: page, cards, LaTeX and, where they can be, figures."""
    altered: tuple[str, ...]
    """Those that differ, or that are missing."""
    not_compared: str
    """What of them was not compared, and why."""
    differences: tuple[tuple[str, str, str], ...]
    """Place, published and recomputed of what differs in `numbers.json`."""

    @property
    def is_verified(self) -> bool:
        """Whether nothing differs."""
        return not (self.damaged or self.unlisted or self.altered or self.differences)

    @cached_property
    def table(self) -> pd.DataFrame:
        """Places that differ, with both values."""
        return pd.DataFrame(self.differences, columns=["place", "published", "recomputed"])

    def facts(self) -> list[tuple[str, str]]:
        """List what was compared and what differs."""
        equal, remade = self.num_numbers - len(self.differences), self.num_remade - len(self.altered)
        told = [
            ("files differ", some(self.damaged)),
            ("files not known", some(self.unlisted)),
            ("files", "" if self.damaged else f"{self.num_files} with the published checksums"),
            ("numbers", f"{equal} of {self.num_numbers} recomputed within {100 * TOLERANCE:g} %"),
            ("altered", some(self.altered)),
            ("made again", f"{remade} of {self.num_remade} files are the same" * bool(self.num_remade)),
            ("not compared", self.not_compared),
        ]
        return [(name, value) for name, value in told if value]


def verify(folder: Path) -> Verification:
    """Compare files with their checksums, and all that follows from the tables with what they give here.

    Raises:
        AnalysisError: it is no published folder, it holds links, it is of another version, or its tables cannot be
            read.
    """
    files = _plain_files(folder)
    try:
        lines = _text(folder / CHECKSUMS).splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        record = TypeAdapter(Record).validate_json(_text(folder / NUMBERS))
    except (OSError, ValueError, RecursionError) as error:
        raise AnalysisError(
            f"{folder} is not a folder that `aimscale publish` wrote, or not all of one "
            f"({' '.join(str(error).split())[:200]}); fetch it again."
        ) from error
    if record.version != VERSION:
        do = "update aimscale" if record.version > VERSION else "publish its tables again"
        raise AnalysisError(f"{folder / NUMBERS} is of version {record.version}, this aimscale reads {VERSION}; {do}.")
    if not sums:
        raise AnalysisError(f"{folder / CHECKSUMS} lists no file; fetch it again.")
    if outside := [name for name in record.source.tables if name not in files or name != f"data/{Path(name).name}"]:
        raise AnalysisError(f"{folder / NUMBERS} names {outside[0]!r}, which is no table of its data; fetch it again.")
    with tempfile.TemporaryDirectory() as aside:
        remade = Path(aside)
        (remade / "data").mkdir()
        for name in {*record.source.tables, *(f"data/{each}" for each in BESIDE)} & {*files}:
            check_file(files[name])
            shutil.copyfile(files[name], remade / name)
        try:
            write_results(record.source, remade, record.about, record.made, lambda made: _touch(made, files))
        except Exception as error:  # whatever a stranger's table and options make pandas, scipy and matplotlib raise
            message = str(error) if isinstance(error, AnalysisError) else f"{type(error).__name__} {error}"
            raise AnalysisError(f"{folder} cannot be recomputed: {message}") from error
        return _compared(folder, files, sums, record, remade)


def _plain_files(folder: Path) -> dict[str, Path]:
    """Map the names of all files in a folder to their paths; AnalysisError for links, pipes, or too many bytes."""
    files, num_bytes = dict[str, Path](), 0
    for root, folders, names in os.walk(folder):
        if Path(root) == folder:
            folders[:], names = ([each for each in kind if each not in IGNORED] for kind in (folders, names))
        for path in (Path(root, name) for name in (*folders, *names)):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                raise AnalysisError(f"{path} is a link, a pipe or a device; a published folder holds plain files.")
            num_bytes += status.st_size
            if path.name in names:
                files[path.relative_to(folder).as_posix()] = path
    if num_bytes > MAX_FOLDER_BYTES:
        raise AnalysisError(f"{folder} has more than {MAX_FOLDER_BYTES:.0e} bytes; verify it without its weights.")
    return files


def _text(path: Path) -> str:
    """Read a file of a limited size."""
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_TEXT_BYTES:.0e} bytes")
    return path.read_text("utf-8")


def _touch(remade: Path, files: Mapping[str, Path]) -> None:
    """Make what a sweep has beside its tables, empty: the card lists it."""
    for name in ADDED:
        if name in files:
            (remade / name).touch()


def _compared(
    folder: Path, files: Mapping[str, Path], sums: Mapping[str, str], record: Record, remade: Path
) -> Verification:
    """Compare a folder with its checksums and with what was made again from its tables."""
    new = {path.relative_to(remade).as_posix(): path for path in remade.rglob("*") if path.is_file()}
    names = {*record.source.tables, *(f"data/{name}" for name in BESIDE), *ADDED, *new}
    published, recomputed = (json.loads(_text(each / NUMBERS)) for each in (folder, remade))
    versions = Made.now().versions
    others = [f"{name} {version}" for name, version in record.made.versions.items() if versions.get(name) != version]
    num, differences = compare_numbers(published["numbers"], recomputed["numbers"], sentences=not others)
    is_exact, not_compared = not others and published == recomputed, ""
    if others:
        new, not_compared = {}, f"page, cards, LaTeX and figures, which were made with {some(others, len(others))}"
    elif not is_exact:
        new = {name: path for name, path in new.items() if not name.startswith("figures/")}
        not_compared = "figures: numbers differ in digits that are not printed, as they do between processors"
    new = {name: path for name, path in new.items() if not name.startswith("data/") and name not in (NUMBERS, *ADDED)}
    same = functools.partial(filecmp.cmp, shallow=False) if is_exact else _is_same_text
    return Verification(
        folder=str(folder),
        num_numbers=num,
        num_files=len(sums),
        damaged=tuple(name for name in sums if name not in files or sha256(files[name]) != sums[name]),
        unlisted=tuple(each for each in files if each != CHECKSUMS and not (each in sums and _is_known(each, names))),
        num_remade=len(new),
        altered=tuple(name for name, path in new.items() if name not in files or not same(files[name], path)),
        not_compared=not_compared,
        differences=differences,
    )


def _is_known(name: str, names: Collection[str]) -> bool:
    """Tell whether a publication has such a file: known ones, and those that are added to the card of a model."""
    folder, _, rest = name.removeprefix("models/").partition("/")
    return name in names or (f"models/{folder}/README.md" in names and rest.partition("/")[0] in OF_A_MODEL)


def _is_same_text(one: Path, other: Path) -> bool:
    """Compare texts without the pictures and downloads inside of a page."""
    if one.stat().st_size > 2 * other.stat().st_size + 1000:
        return False
    texts = [_DOWNLOAD.sub("", path.read_text("utf-8", errors="replace")) for path in (one, other)]
    return _is_same(*("".join(part.partition("</svg>")[2] for part in f"</svg>{text}".split("<svg")) for text in texts))


def _is_same(one: str, other: str) -> bool:
    """Compare words exactly, and numbers in the digits that are written."""
    first, second = ([*_NUMBER.finditer(text)] for text in (one, other))
    return _NUMBER.sub("0", one) == _NUMBER.sub("0", other) and all(map(_is_near, first, second))


def _is_near(one: re.Match[str], other: re.Match[str]) -> bool:
    """Tell whether two written numbers differ by no more than one in the last digit."""
    if one[0] == other[0]:
        return True
    power = int(other[3] or 0) - len(other[2] or "")
    if abs(power) > MAX_POWER:
        return False
    return math.isclose(float(one[0]), float(other[0]), rel_tol=TOLERANCE, abs_tol=1.01 * 10.0**power)


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Walk plain types: each number or text with its place, such as `law.params.alpha`."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{place}.{key}" if place and key else f"{place}{key}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{place}[{i}]")
    else:
        yield place, value


def compare_numbers(
    published: Any, recomputed: Any, *, sentences: bool = False
) -> tuple[int, tuple[tuple[str, str, str], ...]]:
    """Count the leaves of both and list those that differ as place, published, recomputed.

    Args:
        sentences: also compare texts with spaces, which another release may word otherwise.
    """
    before, after = dict(_leaves(published)), dict(_leaves(recomputed))
    num, differences = 0, []
    for place in dict.fromkeys([*before, *after]):
        old, new = before.get(place, NOTHING), after.get(place, NOTHING)
        if is_sentence := isinstance(old, str) and isinstance(new, str) and " " in f"{old}{new}":
            is_same = not sentences or _is_same(old, new)
        elif {type(old), type(new)} <= {int, float}:
            is_same = math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=1e-12)
        else:
            is_same = old == new
        num += sentences or not is_sentence
        differences += [] if is_same else [(place, str(old), str(new))]
    return num, tuple(differences)
