"""A folder that others can cite and recompute: tables, the page and its numbers, figures, LaTeX, cards, checksums."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.ft2font
import yaml

from aimscale.analysis.display import Result, in_command, plain_types
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.forecasts.forecast import REGISTER
from aimscale.analysis.plots.style import save
from aimscale.analysis.publication.card import About, folder_card, model_cards, sha256
from aimscale.analysis.published import BASELINES_FILE
from aimscale.analysis.report.page import timestamp, write_page
from aimscale.analysis.report.study import Study, read_study
from aimscale.analysis.report.summary import findings
from aimscale.analysis.table.logs import run_logs

NOT_PRINTED = ("forecaster",)
"""Results of a study that the page does not show by themselves."""
NUMBERS, CHECKSUMS = "numbers.json", "SHA256SUMS"
BESIDE = (BASELINES_FILE, "curves.parquet", REGISTER)
"""Files beside a table that its page reads."""
VERSION = 3
"""Rises when `numbers.json` changes its form."""
PACKAGES = ("aimscale", "numpy", "scipy", "pandas", "seaborn", "matplotlib", "pillow", "jinja2", "pyyaml")
"""Packages whose versions words and pictures depend on."""


class Source(NamedTuple):
    """Tables of a page and how they are read, as `aimscale report` takes them."""

    tables: tuple[str, ...]
    """Paths, relative to the folder."""
    columns: dict[str, str]
    where: tuple[str, ...]

    def study(self, folder: Path) -> Study:
        """Read the tables and compute everything that the page shows."""
        return read_study([folder / each for each in self.tables], self.columns or None, self.where)


class Made(NamedTuple):
    """When and by what a folder was made."""

    at: str
    versions: dict[str, str]
    """Package -> version, and those of Python, of zlib and of the library that draws letters."""

    @classmethod
    def now(cls) -> Made:
        """Tell the present time and versions."""
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        others = {"python": platform.python_version(), "zlib": zlib.ZLIB_RUNTIME_VERSION}
        return cls(timestamp(), versions | others | {"freetype": mpl.ft2font.__freetype_version__})


class Record(NamedTuple):
    """Contents of `numbers.json`: everything that the folder is made from but its tables, and the numbers."""

    version: int
    source: Source
    about: About
    made: Made
    numbers: dict[str, dict[str, Any]]
    """Name of a result, then its subject -> the result in plain types."""


def page_numbers(study: Study) -> dict[str, Any]:
    """Give every result of the page in plain types by name and subject; `missing` says why there is none."""
    return {
        name: {
            subject: {"missing": str(result)} if isinstance(result, AnalysisError) else plain_types(result)
            for subject, result in by_subject.items()
        }
        for name, by_subject in study.results.items()
        if name not in NOT_PRINTED
    }


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
            write_results(Source(names, dict(columns or {}), tuple(where)), folder, about, Made.now(), add)
            _write_checksums(folder)
            os.replace(folder, out)
    except OSError as error:
        raise AnalysisError(f"cannot write {out}: {error.strerror}; choose a folder that is yours.") from error


def _copy_tables(tables: Sequence[Path], folder: Path) -> tuple[str, ...]:
    """Copy the tables and what the page reads beside them; return the tables' names in the folder."""
    names, copied = [], dict[str, Path]()
    (folder / "data").mkdir()
    for path in (table if (table := each / "results.parquet").is_file() else each for each in tables):
        if path.is_dir():  # runs of TensorBoard, MLflow or Lightning
            names.append(f"data/{path.name}.csv")
            run_logs(path).to_csv(folder / names[-1], index=False)
            continue
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


@in_command()  # whoever publishes or verifies: sentences name options, and are compared
def write_results(source: Source, folder: Path, about: About, made: Made, add: Callable[[Path], None]) -> None:
    """Write all that follows from the tables: page, figures, numbers, LaTeX, cards, citation."""
    study = source.study(folder)
    write_page(study, folder, folder / "figures", kinds=("pdf",), made_at=made.at)
    for finding in findings(study):
        save(finding.figure, folder / "figures" / finding.key, kinds=("png",))
    parts = {"source": source._asdict(), "about": about._asdict(), "made": made._asdict()}
    record = {"version": VERSION, **parts, "numbers": page_numbers(study)}
    texts = {NUMBERS: json.dumps(record, allow_nan=False), "CITATION.cff": _citation(about)}
    results = [(name, subject, result) for name, by in study.results.items() for subject, result in by.items()]
    for name, subject, result in results:
        if isinstance(result, Result) and len(result.table):
            title = "".join(c if c.isalnum() else "-" for c in f"{name} {subject}".strip())
            texts[f"tables/{title}.tex"] = result.to_latex()
    for run_id, card in model_cards(study.frame, about).items():
        texts[f"models/{run_id}/README.md"] = card
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    add(folder)
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
