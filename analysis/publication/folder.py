"""A folder that others can cite and recompute: tables, the page and its numbers, figures, LaTeX, cards, checksums."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from aimscale.analysis.display import Result, plain_types
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.forecasts.forecast import REGISTER
from aimscale.analysis.plots.style import save
from aimscale.analysis.publication.card import About, croissant, folder_card, model_cards, sha256
from aimscale.analysis.published.comparison import BASELINES_FILE
from aimscale.analysis.report.page import write_page
from aimscale.analysis.report.study import Study, read_study
from aimscale.analysis.report.summary import findings

TOLERANCE = 1e-3
"""Relative difference up to which two numbers are the same: what three printed digits show. Between processors and
releases of scipy, optimisers stop within some 1e-6 of each other."""
NOT_PRINTED = ("forecaster",)
"""Results of a study that the page does not show by themselves."""
NOTHING = "nothing"
"""Printed for a place that one side lacks."""
NUMBERS, CHECKSUMS = "numbers.json", "SHA256SUMS"
BESIDE = (BASELINES_FILE, "curves.parquet", REGISTER)
"""Files beside a table that its page reads."""
VERSION = 1
"""Rises when `numbers.json` changes its form."""


class Source(NamedTuple):
    """Tables of a page and how they are read, as `aimscale report` takes them."""

    tables: tuple[str, ...]
    """Paths, relative to the folder."""
    columns: dict[str, str]
    where: tuple[str, ...]

    def study(self, folder: Path) -> Study:
        """Read the tables and compute everything that the page shows."""
        return read_study([folder / each for each in self.tables], self.columns or None, self.where)


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

    def facts(self) -> list[tuple[str, str]]:
        """List files and numbers compared."""
        files = f"{self.num_files} with the published checksums" if not self.damaged else ", ".join(self.damaged)
        equal = self.num_numbers - len(self.differences)
        numbers = f"{equal} of {self.num_numbers} recomputed within {100 * TOLERANCE:g} %"
        return [("files differ" if self.damaged else "files", files), ("numbers", numbers)]


def compare_numbers(published: Any, recomputed: Any) -> tuple[int, tuple[tuple[str, str, str], ...]]:
    """Count the leaves of both and list those that differ as place, published, recomputed."""
    before, after = dict(_leaves(published)), dict(_leaves(json.loads(json.dumps(recomputed))))
    places, found = list(dict.fromkeys([*before, *after])), []
    for place in places:
        old, new = before.get(place, NOTHING), after.get(place, NOTHING)
        are_numbers = {type(old), type(new)} <= {int, float}
        if not (math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=1e-12) if are_numbers else old == new):
            found.append((place, str(old), str(new)))
    return len(places), tuple(found)


def publish(
    tables: Sequence[Path],
    out: Path,
    about: About,
    *,
    columns: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the folder aside, then rename it: nobody sees half of it.

    Args:
        tables: tables of the page, as `write_report` takes them.
        out: folder to make.
        about: what stands on its card.
        columns: our name -> the file's, for foreign tables.
        where: conditions that rows must meet.
        add: writes further files into the folder, before its card is written and checksums are taken.

    Raises:
        AnalysisError: a table cannot be read, or `out` is there already or cannot be written.
    """
    if out.exists():
        raise AnalysisError(f"{out} exists already; name a folder that does not.")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".parts", dir=out.absolute().parent) as aside:
            folder = Path(aside) / out.name
            folder.mkdir()
            names = _copy_tables(tables, folder)
            source = Source(names, dict(columns or {}), tuple(where))
            _write_results(source, folder, about, add)
            _write_checksums(folder)
            os.replace(folder, out)
    except OSError as error:
        raise AnalysisError(f"cannot write {out}: {error.strerror}; choose a folder that is yours.") from error


def _copy_tables(tables: Sequence[Path], folder: Path) -> tuple[str, ...]:
    """Copy the tables and what the page reads beside them; return the tables' names in the folder."""
    names, copied = [], dict[str, Path]()
    (folder / "data").mkdir()
    for path in (each / "results.parquet" if each.is_dir() else each for each in tables):
        if not path.is_file():
            raise AnalysisError(f"{path} does not exist; publish a sweep, or tables that are files.")
        if path.name in copied:
            raise AnalysisError(f"two tables are named {path.name}; rename one.")
        names.append(f"data/{path.name}")
        for file in (path, *filter(Path.is_file, map(path.with_name, BESIDE))):
            if copied.setdefault(file.name, file) != file:
                raise AnalysisError(f"two folders hold a {file.name}; publish their tables apart.")
            shutil.copyfile(file, folder / "data" / file.name)
    return tuple(names)


def _write_results(source: Source, folder: Path, about: About, add: Callable[[Path], None]) -> None:
    """Write page, figures, numbers, LaTeX tables, cards, citation and the description for machines."""
    study = source.study(folder)
    write_page(study, folder, folder / "figures", kinds=("pdf",))
    for finding in findings(study):
        save(finding.figure, folder / "figures" / finding.key, kinds=("png",))
    record = {"version": VERSION, "source": source._asdict(), "numbers": page_numbers(study)}
    texts = {NUMBERS: json.dumps(record, allow_nan=False), "CITATION.cff": _citation(about)}
    found = [(name, subject, each) for name, by in study.results.items() for subject, each in by.items()]
    for name, subject, each in found:
        if isinstance(each, Result) and len(each.table):
            title = "".join(c if c.isalnum() else "-" for c in f"{name} {subject}".strip())
            texts[f"tables/{title}.tex"] = each.to_latex()
    for run_id, card in model_cards(study.frame, about).items():
        texts[f"models/{run_id}/README.md"] = card
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    add(folder)
    described = croissant(folder, about)
    (folder / "croissant.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(folder_card(study, source.tables, folder, about), encoding="utf-8")


def _citation(about: About) -> str:
    """Write CITATION.cff (https://citation-file-format.github.io, version 1.2.0)."""
    fields: dict[str, Any] = {
        "cff-version": "1.2.0",
        "message": "If you use these results, please cite them.",
        "title": about.title,
        "type": "dataset",
        "authors": [{"name": name} for name in about.authors or ("anonymous",)],
        "license": about.licence,
    }
    return yaml.safe_dump(fields | ({"url": about.url} if about.url else {}), sort_keys=False, allow_unicode=True)


def _write_checksums(folder: Path) -> None:
    """Write the checksums of all files, as `sha256sum -c` reads them."""
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    lines = [f"{sha256(each)}  {each.relative_to(folder)}\n" for each in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def verify(folder: Path) -> Verification:
    """Compare files with their checksums, and recompute every published number from the tables.

    Raises:
        AnalysisError: it is no published folder, its numbers are of a newer version, or its tables cannot be read.
    """
    try:
        sums = dict(line.split("  ", 1)[::-1] for line in (folder / CHECKSUMS).read_text("utf-8").splitlines())
        record = json.loads((folder / NUMBERS).read_text("utf-8"))
        version, numbers = record["version"], record["numbers"]
        source = Source(**{name: given for name, given in record["source"].items() if given or name in Source._fields})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AnalysisError(
            f"{folder} is not a folder that `aimscale publish` wrote, or not all of one ({error}); fetch it again."
        ) from error
    if version > VERSION:
        raise AnalysisError(f"{folder / NUMBERS} is of version {version}, newer than this aimscale; update aimscale.")
    damaged = [name for name, digest in sums.items() if not (path := folder / name).is_file() or sha256(path) != digest]
    num, differences = compare_numbers(numbers, page_numbers(source.study(folder)))
    return Verification(
        folder=str(folder), num_numbers=num, num_files=len(sums), damaged=tuple(damaged), differences=differences
    )
