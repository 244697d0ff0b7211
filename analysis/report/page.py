"""`aimscale report`: tables in, one self-contained HTML page out.

The page makes no request: style, script, figures and downloads are inside it. Every text that comes from
a table is escaped by the template.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import markupsafe
import matplotlib as mpl

from aimscale.analysis.display import option
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.plots.style import KINDS, save
from aimscale.analysis.report.blocks import sort_key
from aimscale.analysis.report.sections import sections
from aimscale.analysis.report.study import Study, read_study
from aimscale.analysis.report.summary import findings, verdict
from aimscale.analysis.table.files import files_of
from aimscale.analysis.table.schema import written_aside

SIGNS = {"green": "✓", "amber": "!", "red": "✗"}
"""Trust -> the sign before its words, for those who do not see its colour."""
GREEK = {"alpha": "α", "beta": "β", "gamma": "γ"}


def write_report(
    tables: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    groups: Mapping[str, str | float] | None = None,
    figures: str | Path | None = None,
) -> Path:
    """Analyse tables and write the page.

    Args:
        tables: CSV or Parquet tables, or folders of sweeps or of other tools' runs; `collect.json` beside them
            describes the sweep.
        out: the page; None writes `report.html` beside the first table.
        columns: our name -> the file's, for foreign tables.
        where: conditions that rows must meet, see `table.select.select`.
        groups: what rows of one size or budget agree in, see `read_tables`.
        figures: folder for the page's figures as SVG, PDF and PNG of a paper's width.

    Returns:
        Path of the page.

    Raises:
        AnalysisError: the table cannot be read, or holds neither losses nor probes; or the page cannot be written.

    Example:
        >>> write_report("results.parquet", "report.html")
    """
    given = [Path(each) for each in ([tables] if isinstance(tables, str | Path) else tables)]
    paths = [path / "results.parquet" if (path / "results.parquet").is_file() else path for path in given]
    return write_page(read_study(paths, columns, where, groups), out, figures)


def write_page(
    study: Study,
    out: str | Path | None = None,
    figures: str | Path | None = None,
    kinds: Sequence[str] = KINDS,
    made_at: str | None = None,
) -> Path:
    """Write the page of a study, as `write_report` does; `out` may be a folder, `kinds` are those of its figures, and
    `made_at` is the date on it, by default now.

    Raises:
        AnalysisError: the page cannot be written, or a `collect.json` beside its tables is damaged.
    """
    folders = [path if path.is_dir() else path.parent for path in study.paths]
    with mpl.rc_context():
        mpl.rcdefaults()  # pages look alike, whatever their caller has set
        leading, laid_out = findings(study), sections(study)
        sweeps = map(str, study.frame["sweep"].dropna().unique()) if "sweep" in study.frame else ()
        page = _template().render(
            title=", ".join(sweeps) or study.paths[0].stem,
            description=_description(folders),
            made_at=made_at or timestamp(),
            findings=leading,
            verdict=verdict(study),
            signs=SIGNS,
            missing=study.missing,
            sections=laid_out,
        )
        for drawn in (*leading, *(part for each in laid_out for part in each.parts["PageFigure"])) if figures else ():
            save(drawn.figure, Path(figures or "") / drawn.key, kinds)
    path = Path(out or folders[0])
    path = path / "report.html" if path.is_dir() else path
    try:
        with written_aside(path) as aside:
            aside.write_text(page, encoding="utf-8")
    except OSError as error:
        raise AnalysisError(f"cannot write {path}: {error.strerror}; give another path with {option('out')}") from error
    return path


def timestamp() -> str:
    """Write the present time as a page does."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _description(folders: Sequence[Path]) -> str:
    """Join what `collect.json` beside every table says of its sweep."""
    files = [file for folder in folders for file in files_of(folder, "collect.json")]
    try:
        return "; ".join(filter(None, (json.loads(file.read_text()).get("description") for file in files)))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        named = ", ".join(map(str, files))
        raise AnalysisError(f"cannot read {named} ({error}); collect the sweep again.") from error


def _template() -> jinja2.Template:
    """Load the page's template, which escapes every text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aimscale.analysis.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"maths": maths, "sort_key": sort_key}
    return environment.get_template("report.html")


def maths(value: str) -> markupsafe.Markup:
    """Write a sentence as HTML: escape it, then raise exponents, write Greek letters, minus signs, no lonely %."""
    safe = str(markupsafe.escape(value))
    safe = re.sub(r"\b(alpha|beta|gamma)\b", lambda match: GREEK[match[0]], safe)
    safe = re.sub(r"(?<![\w.)\]-])-(?=\d)", "−", _raised(safe))
    return markupsafe.Markup(safe.replace(" %", "\u00a0%"))


def _raised(text: str) -> str:
    """Raise exponents: x^-a, x^(1/f), and x^-exp(b y^c), whose own exponents are raised once more."""

    def power(match: re.Match[str]) -> str:
        bare = match[1][1:-1] if match[1].startswith("(") else match[1]
        return f"<sup>{_raised(bare).replace('-', '−')}</sup>"

    return re.sub(r"\^(-?exp\([^()]*\)|\([^()]*\)|-?[\w.]*\w)", power, text)
