"""Arguments that the analysis verbs share, how they read their tables and how they print a result."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aimscale import analysis
from aimscale.analysis.errors import AnalysisError

if TYPE_CHECKING:
    from aimscale.analysis.display import Result
    from aimscale.analysis.table.runs import Runs

NAMES: dict[Path, str] = {}
"""A sweep's table -> the name or file that was typed for it."""
PANEL = "Table"
"""Help panel of the options that say what a table holds and which of its rows count."""
Tables = Annotated[
    list[Path],
    typer.Argument(
        help="Tables (CSV, Excel, Parquet, JSON lines), sweeps (file or folder), or folders of logs (TensorBoard, "
        "MLflow, Lightning, Hugging Face, text); several are read as one."
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        help="Your columns as ours=theirs, N=num_params, or as a formula, C=6*N*D. Accuracies: TASK:KIND=theirs, with "
        "TASK:chance=0.25 and TASK:ideal=0 (the loss at which the accuracy is 1) if known. May be repeated.",
        rich_help_panel=PANEL,
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        help="Keep only rows that meet a condition, such as prefix=paired, 'D>=8000' or size!=rung-24. Shortcuts: main "
        "(the experiment with most sizes and budgets), fresh (a data pool that is hardly repeated), envelope (rows "
        "that no cheaper row beats). May be repeated.",
        rich_help_panel=PANEL,
    ),
]
Groups = Annotated[
    list[str] | None,
    typer.Option(
        help="What rows of one size, or of one budget, agree in: sizes=COLUMN, or budgets=0.03 for values within 3 %. "
        "Default: the grid's own spacing shows it. May be repeated.",
        rich_help_panel=PANEL,
    ),
]
LossColumn = Annotated[str, typer.Option(help="Loss column.", rich_help_panel=PANEL)]
Minimised = Annotated[
    str, typer.Option(help="Loss column; or a probe, TASK:KIND, for its error rate (1 - top1).", rich_help_panel=PANEL)
]
FigurePath = Annotated[Path | None, typer.Option(help="Also draw FIGURE.svg, .pdf and .png.")]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", help='Name in the figure of an axis, column or level, N="Parameters". May be repeated.'),
]


def _use_level(context: typer.Context, level: float) -> float:
    """Give all intervals of a verb the level."""
    from aimscale.analysis.fitting.covariance import at_level

    context.with_resource(at_level(level))
    return level


Level = Annotated[float, typer.Option(help="Level of all intervals, such as 0.9.", callback=_use_level)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


SHARED: dict[str, tuple[Any, Any]] = {
    "y": (LossColumn, "val_loss"), "columns": (Columns, None), "where": (Where, None), "groups": (Groups, None),
    "figure": (FigurePath, None), "label": (Labels, None), "level": (Level, 0.95), "json": (AsJson, False),
}  # fmt: skip
"""Option that verbs share -> its type and default."""


@dataclass(frozen=True)
class TableArguments:
    """What was typed for a verb: tables, how they are read, and how its result is shown."""

    tables: Sequence[Path]
    columns: list[str] | None = None
    where: list[str] | None = None
    y: str = "val_loss"
    """Loss column, as it was typed."""
    groups: list[str] | None = None
    figure: Path | None = None
    label: list[str] | None = None
    json: bool = False

    def read(self) -> Runs:
        """Read them as one table, and say on the error stream what they hold that nobody named."""
        from aimscale.analysis.table.columns import parse_columns, parse_groups, unnamed

        columns, groups = parse_columns(self.columns or []), parse_groups(self.groups or [])
        runs = analysis.read_tables(self.tables, columns, where=self.where or [], groups=groups)
        for flag in unnamed(runs.frame):
            typer.echo(f"Note: {flag}", err=True)
        return runs

    def read_to_minimise(self) -> tuple[Runs, str, str]:
        """Read them for laws of `y`: a loss, corrected to the best learning rates where these are known, or the error
        rate of a probe.

        Returns:
            The table, the column of `y`, and how well the largest size is tuned; nothing of an accuracy.
        """
        from aimscale.analysis.table.columns import named_like_accuracy
        from aimscale.analysis.table.measures import to_minimise
        from aimscale.analysis.tuning.rates import tuned_where_known

        read = self.read()
        runs, y = to_minimise(read, self.y)
        is_loss = y in read and not named_like_accuracy(y)
        corrected, words, _ = tuned_where_known(runs, y) if is_loss else (runs, "", None)
        return corrected, y, words

    def then(self, *verbs: str) -> str:
        """Write what to run next on the same tables: verbs, each with further options behind it."""
        words = [NAMES.get(each, str(each)) for each in self.tables]
        for option, texts in (("--columns", self.columns), ("--where", self.where), ("--groups", self.groups)):
            words += [word for text in texts or [] for word in (option, text)]
        from aimscale.analysis.fitting.covariance import CONFIDENCE, current_level

        options = [f"--y {shlex.quote(self.y)}"] * (self.y != "val_loss")
        options += [f"--level {current_level():g}"] * (current_level() != CONFIDENCE)
        typed, parts = shlex.join(words), [verb.partition(" ") for verb in verbs]
        lines = [("aimscale", verb, typed, *([] if verb == "report" else options), rest) for verb, _, rest in parts]
        return "; ".join(" ".join(filter(None, line)) for line in lines)

    def show(self, result: Result, then: Sequence[str] = (), **words: Any) -> None:
        """Draw and print a result (see `show`), and what to run next on the same tables."""
        show(result, self.json, self.figure, labels=self.label, following=self.then(*then), **words)


def verb(*names: str, y: Any = LossColumn) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command tables and these options of `SHARED`, behind its own ones, as one `TableArguments`; `y` is the
    type of its loss column."""

    def with_options(run: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(run)
        def command(**typed: Any) -> None:
            shared = {name: typed.pop(name) for name in ("tables", *names)}
            shared.pop("level", None)  # its callback has set it
            _check_labels(shared.get("label"), shared.get("figure"))
            run(TableArguments(**shared), **typed)

        _, *parameters = inspect.signature(run, eval_str=True).parameters.values()
        kind, types = inspect.Parameter.POSITIONAL_OR_KEYWORD, {**SHARED, "y": (y, "val_loss")}
        more = [inspect.Parameter(name, kind, annotation=types[name][0], default=types[name][1]) for name in names]
        tables = inspect.Parameter("tables", kind, annotation=Tables)
        vars(command)["__signature__"] = inspect.Signature([tables, *parameters, *more])
        return command

    return with_options


def _check_labels(labels: Sequence[str] | None, figure: Path | None) -> None:
    """Raise AnalysisError for labels that no figure can show, before anything is computed."""
    if labels and figure is None:
        raise AnalysisError("--label names what a figure shows; add --figure FIGURE.")
    if wrong := [text for text in labels or [] if "=" not in text]:
        raise AnalysisError(f"--label takes a name and its words, such as N=Parameters, not {wrong[0]!r}.")


def parameter_values(text: str) -> tuple[str, list[float]]:
    """Read `name=value` or `name=low:high`."""
    name, _, written = text.partition("=")
    try:
        values = [float(value) for value in written.split(":")]
    except ValueError:
        values = []
    if not 1 <= len(values) <= 2:
        raise AnalysisError(f"--fix takes numbers such as E=0 or alpha=0.1:1, not {text!r}.")
    return name.strip(), values


def can_report(runs: Runs) -> bool:
    """Return whether a table holds what `report` needs."""
    return bool({"val_loss", "probes"} & {*runs})


def of_law(law: str, default: str) -> str:
    """Write the option of a law that is not the default, for the verb to run next."""
    return "" if law == default else f" --law {shlex.quote(law)}"


def say_next(commands: str) -> None:
    """Print the last line of a verb."""
    typer.echo(f"next: {commands}")


def show(
    result: Result,
    json: bool,
    figure: Path | None = None,
    *,
    labels: Sequence[str] | None = None,
    words: str = "",
    after: Sequence[str] = (),
    also: Mapping[str, Any] | None = None,
    drawn: Mapping[str, Any] | None = None,
    following: str = "",
) -> None:
    """Print a result, and draw it where a figure is asked for, with `labels` such as N=Parameters.

    It is printed in `words` (by default its summary) with how well the largest size is tuned (of `also`), the lines of
    `after` and what to run next, or as JSON with what there is `also`.
    """
    tuning = [f"tuning: {told}"] if (told := (also or {}).get("tuning")) else []
    typer.echo(result.to_json(**(also or {})) if json else "\n".join([words or result.summary(), *tuning, *after]))
    if figure is not None:
        _draw(result, figure, labels or [], **(drawn or {}))
    if following and not json:
        say_next(following)


def _draw(result: Result, figure: Path, labels: Sequence[str], **drawn: Any) -> None:
    """Draw a result and write the figure; every label must stand in it."""
    from matplotlib.text import Text

    pairs = [text.partition("=") for text in labels]
    picture = result.plot(labels={name.strip(): words.strip() for name, _, words in pairs}, **drawn)
    shown = "\n".join(text.get_text() for text in picture.findobj(Text))
    if lost := [name for name, _, words in pairs if words.strip()[:20].replace("$", r"\$") not in shown]:
        raise AnalysisError(f"--label {lost[0]}: no axis, column or level of this figure has that name.")
    analysis.save(picture, figure)
