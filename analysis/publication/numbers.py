"""All numbers of a report's page as plain types, and their recomputation from a published table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from aimscale.analysis.display import Result, plain_types
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.report.study import Study, read_study

TOLERANCE = 1e-3
"""Relative difference up to which two numbers are the same: what three printed digits show. Between processors and
releases of scipy, optimisers stop within some 1e-6 of each other."""
NOT_PRINTED = ("forecaster",)
"""Results of a study that the page does not show by themselves."""
NOTHING = "nothing"
"""Printed for a place that one side lacks."""


class Source(NamedTuple):
    """Tables of a page and how they are read, as `aimscale report` takes them."""

    tables: tuple[str, ...]
    """Paths, relative to the folder."""
    columns: dict[str, str]
    where: tuple[str, ...]
    best: tuple[str, ...]

    def study(self, folder: Path) -> Study:
        """Read the tables and compute everything that the page shows."""
        return read_study([folder / each for each in self.tables], self.columns or None, self.where, self.best)


def page_numbers(study: Study) -> dict[str, Any]:
    """Give every result of the page in plain types by name and subject; `missing` says why there is none."""
    return {
        name: {
            subject: {"missing": str(found)} if isinstance(found, AnalysisError) else plain_types(found)
            for subject, found in by_subject.items()
        }
        for name, by_subject in study.results.items()
        if name not in NOT_PRINTED
    }


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Walk plain types: each number or word with its place, such as `law.params.alpha`, but no sentence: these are
    made of the numbers, in the words of a release."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{place}.{key}" if place and key else f"{place}{key}")
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from _leaves(each, f"{place}[{i}]")
    elif not isinstance(value, str) or " " not in value:
        yield place, value


def _is_same(published: Any, recomputed: Any) -> bool:
    """Compare two leaves: numbers within `TOLERANCE`, all else as it is."""
    if isinstance(published, bool) or isinstance(recomputed, bool):
        return bool(published == recomputed)
    if isinstance(published, int | float) and isinstance(recomputed, int | float):
        return math.isclose(published, recomputed, rel_tol=TOLERANCE, abs_tol=1e-12)
    return bool(published == recomputed)


@dataclass(frozen=True, kw_only=True)
class Verification(Result):
    """Comparison of a published folder with what its table gives here."""

    folder: str
    num_numbers: int
    """Number of numbers and words that were compared."""
    num_files: int
    """Number of files whose checksums were compared."""
    damaged: tuple[str, ...]
    """Files that are missing, or that are not those whose checksums were published."""
    differences: tuple[tuple[str, str, str], ...]
    """Place, published and recomputed of what differs."""

    @property
    def is_verified(self) -> bool:
        """Whether nothing differs."""
        return not self.damaged and not self.differences

    @cached_property
    def table(self) -> pd.DataFrame:
        """Places that differ, with both values."""
        return pd.DataFrame(self.differences, columns=["place", "published", "recomputed"])

    def headline(self) -> str:
        """Say whether it is as published."""
        if self.is_verified:
            return f"{self.folder} is as published: {self.num_files} files, {self.num_numbers} numbers"
        return f"{self.folder} differs: files {len(self.damaged)}, numbers {len(self.differences)}"

    def facts(self) -> list[tuple[str, str]]:
        """List files and numbers compared."""
        files = f"{self.num_files} with the published checksums" if not self.damaged else ", ".join(self.damaged)
        equal = self.num_numbers - len(self.differences)
        numbers = f"{equal} of {self.num_numbers} recomputed within {100 * TOLERANCE:g} %"
        return [("files differ" if self.damaged else "files", files), ("numbers", numbers)]


def compare_numbers(published: Any, recomputed: Any) -> tuple[int, tuple[tuple[str, str, str], ...]]:
    """Count the leaves of both and list those that differ as place, published, recomputed."""
    before, after = dict(_leaves(published)), dict(_leaves(json.loads(json.dumps(recomputed))))
    places = list(dict.fromkeys([*before, *after]))
    found = []
    for place in places:
        old, new = before.get(place, NOTHING), after.get(place, NOTHING)
        if not _is_same(old, new):
            found.append((place, str(old), str(new)))
    return len(places), tuple(found)
