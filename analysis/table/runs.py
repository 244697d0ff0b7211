"""`Runs`: a table of runs, and all that is known of it beside its cells."""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd

from aimscale.analysis.display import option, told_apart
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.formulas import FormulaError, parse_formula
from aimscale.analysis.laws import Array
from aimscale.analysis.table.columns import looks_like_accuracy, named, to_numbers
from aimscale.analysis.table.groups import Groups, codes_of, groups_of
from aimscale.analysis.table.schema import (
    CANONICAL,
    DESIGN,
    FOLDER,
    KNOWN,
    LETTERS,
    PROVENANCE,
    SCALE,
    SCRATCH,
    SECTIONS,
    STEPS,
    TUNED,
    TUNED_BY_OTHERS,
    Exclusion,
    is_done,
    is_plain,
    missing_column,
    varies,
)

MOST_NAMES = 0.9
"""Words that take more values than this share of the rows name runs."""
MOST_RATES = 20
"""Rates, batches and decays that take more values beside a count of steps are those of steps, not of runs."""
KINDS = ("sizes", "budgets")
"""Kinds of groups that a user may name."""


class Runs:
    """A table of runs: a row per run and budget, what its columns mean, and which rows were left out.

    Made once, by `read_table` or from a data frame; every estimator takes either. Methods return new runs, which share
    what did not change; `frame` is a data frame for everything else.

    Args:
        frame: a row per run and budget, numbered anew where labels of its index repeat; or runs.
        columns: our name or a law's letter -> the name in the frame, or a formula, as `read_table` takes them; None
            leaves all columns as they are.
        groups: "sizes" or "budgets" -> the column in which rows of one agree, or a tolerance; see `with_groups`.
        source: the file that the frame was read from, for messages.

    Raises:
        AnalysisError: `columns` or `groups` name what is not there.

    Example:
        >>> runs = Runs(pd.read_csv("losses.csv"), columns={"N": "params", "D": "images", "L": "loss"})
        >>> runs.groups
    """

    names: dict[str, str]
    """Our column -> what the file calls it, where that differs."""
    exclusions: tuple[Exclusion, ...]
    """Rows that reading and choosing left out."""
    grouping: dict[str, str | float]
    """Kind of group (sizes, budgets) -> the column or the tolerance that a user named for it."""
    by_loss_of: int
    """Number of rows of which these were chosen by their loss; 0 if they were not."""
    _frame: pd.DataFrame

    def __init__(
        self,
        frame: pd.DataFrame | Runs,
        columns: Mapping[str, str] | None = None,
        *,
        groups: Mapping[str, str | float] | None = None,
        source: str | Path = "the table",
    ) -> None:
        if isinstance(frame, Runs):
            vars(self).update(vars(frame.with_rows(frame._frame)))
        else:
            # of tables that were concatenated, rows are told apart by their number
            is_joined = isinstance(frame, pd.DataFrame) and not frame.index.is_unique
            self._frame = frame.reset_index(drop=True) if is_joined else frame
            self.names, self.exclusions, self.grouping, self.by_loss_of = {}, (), {}, 0
            if {"init", "schema_version"} <= {*frame} and frame["init"].notna().any():  # else there is one start alone
                self._frame = self._frame.assign(init=self._frame["init"].fillna(SCRATCH))
        if columns is not None:
            self._frame, names, left_out = named(self._frame, columns, source)
            self.names, self.exclusions = {**self.names, **names}, (*self.exclusions, *left_out)
        if groups:
            vars(self).update(vars(self.with_groups(groups)))

    def with_rows(self, frame: pd.DataFrame) -> Runs:
        """Put other rows in the place of these, with the same names, exclusions and groups."""
        runs = object.__new__(Runs)
        vars(runs).update({k: v for k, v in vars(self).items() if k != "groups"}, _frame=frame)
        return runs

    @property
    def frame(self) -> pd.DataFrame:
        """The rows as a data frame."""
        return self._frame.copy(deep=False)

    @property
    def index(self) -> pd.Index:
        """Labels of the rows (n,)."""
        return self._frame.index

    def __len__(self) -> int:
        return len(self._frame)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the columns, as a data frame does."""
        return iter(map(str, self._frame.columns))

    def __contains__(self, name: object) -> bool:
        return name in self._frame.columns

    @overload
    def __getitem__(self, key: str) -> pd.Series: ...
    @overload
    def __getitem__(self, key: list[str]) -> pd.DataFrame: ...
    @overload
    def __getitem__(self, key: pd.Series | np.ndarray) -> Runs: ...
    def __getitem__(self, key: Any) -> Any:
        """Return a column, a frame of several, or the runs that a mask (n,) selects."""
        part = self._frame[key]
        return self.with_rows(part) if isinstance(key, pd.Series | np.ndarray) else part

    def take(self, labels: Any) -> Runs:
        """Select runs by the labels of their rows."""
        return self.with_rows(self._frame.loc[labels])

    def assign(self, **columns: Any) -> Runs:
        """Add columns, or put them in the place of others."""
        return self.with_rows(self._frame.assign(**columns))

    def numbered(self) -> Runs:
        """Return the same rows, numbered from 0."""
        return self.with_rows(self._frame.reset_index(drop=True))

    def complete(self) -> Runs:
        """Keep rows whose `status` says done, in the word of any tool (`is_done`), or `during` training, or that do not
        say; in a table of others' those, too, whose word is none of a tool's (`unknown_statuses`)."""
        if "status" not in self:
            return self
        return self[self["status"].isna() | self._is_done().isin((True,)) | self._is_unknown()]

    def unknown_statuses(self) -> pd.Series:
        """Count the rows of every `status` of a foreign table that no tool is known to write."""
        return self["status"][self._is_unknown()].value_counts() if "status" in self else pd.Series(dtype=int)

    def _is_done(self) -> pd.Series:
        return self["status"].map(lambda word: is_done(str(word)), na_action="ignore").astype(object)

    def _is_unknown(self) -> pd.Series:
        """Find the rows (n,) whose word for their status is none that is known; our tables hold none."""
        is_ours = self["schema_version"].notna() if "schema_version" in self else False
        return self["status"].notna() & self._is_done().isna() & ~pd.Series(is_ours, self.index)

    def described(
        self, names: Mapping[str, str] | None = None, left_out: Sequence[Exclusion] = (), *, by_loss_of: int = 0
    ) -> Runs:
        """Add names and exclusions to those that are known."""
        runs = self.with_rows(self._frame)
        runs.names = {**self.names, **(names or {})}
        runs.exclusions = (*self.exclusions, *(each for each in left_out if each.number))
        runs.by_loss_of = by_loss_of or self.by_loss_of
        return runs

    def with_groups(self, groups: Mapping[str, str | float] | None) -> Runs:
        """Say which rows are of one size and of one budget, for every analysis.

        Args:
            groups: "sizes" or "budgets" -> a column, or a tolerance: rows whose sorted N (D) differ by less than this
                fraction from the next one's share a size (a budget).

        Raises:
            AnalysisError: they are neither sizes nor budgets, there is no such column, or the tolerance is not between
                0 and 1.

        Example:
            >>> read_table("results.parquet").with_groups({"budgets": 0.03})
        """
        runs, rules = self.with_rows(self._frame), dict[str, str | float]()
        for kind, rule in (groups or {}).items():
            if kind not in KINDS or not (isinstance(rule, str) or 0 < rule < 1):
                wrong = f"not {kind} = {rule}"
                raise AnalysisError(f"{option('groups')} takes sizes or budgets = a column or 0.05, {wrong}.")
            rules[kind] = self.column(rule) if isinstance(rule, str) else rule
            if isinstance(rule, str) and rules[kind] not in self:
                raise self.no_column(rule, f" for {option('groups')}")
        runs.grouping = {**self.grouping, **rules}
        return runs

    def column(self, typed: str) -> str:
        """Find the column that a user means: by its name here, a law's letter, or the name that it has in the file."""
        ours = {theirs: ours for ours, theirs in self.names.items()}
        choices = (typed, CANONICAL.get(typed, typed), LETTERS.get(typed, typed), ours.get(typed, typed))
        return next((name for name in choices if name in self), typed)

    def called(self, column: str, words: str = "") -> str:
        """Return what the file calls a column, where that is not our name; else `words` for it, or our name."""
        return self.names.get(column, words or column)

    def no_column(self, name: str, purpose: str = "") -> AnalysisError:
        """Make the error about a column that is missing: what for, the option that names it, what there is."""
        return missing_column(name, map(self.called, self), purpose)

    def numbers(self, columns: Mapping[str, str]) -> pd.DataFrame:
        """Return columns (name -> column) as numbers under these names; what is none becomes NaN."""
        values = self._frame[list(columns.values())].apply(pd.to_numeric, errors="coerce").astype(float)
        return values.set_axis(list(columns), axis=1)

    def with_compute(self) -> Runs:
        """Add a column C = 6 N D to a table that counts no FLOPs of its own."""
        c, n, d = map(self.column, "CND")
        if c in self or n not in self or d not in self:
            return self
        numbers = self.numbers({"N": n, "D": d})  # products of integers overflow
        return self.assign(C=6 * numbers["N"] * numbers["D"])

    def with_size(self) -> Runs:
        """Name a `size` per number of parameters where there is none: foreign tables count, and do not name."""
        if "size" in self or "params_total" not in self:
            return self
        numbers = self["params_total"].dropna().unique()
        words = told_apart(numbers, lambda value, digits: f"{value:.{digits}g}", 4)
        sizes = self["params_total"].map(dict(zip(numbers, words, strict=True)))
        return self.assign(size=sizes).described({"size": self.called("params_total")})

    @property
    def _labels(self) -> set[str]:
        """Columns that name groups of rows, and so are no settings."""
        return {rule for rule in self.grouping.values() if isinstance(rule, str)}

    def varying(self, names: Iterable[str]) -> list[str]:
        """List those of the columns that these runs have and that take several values."""
        return [name for name in names if name in self and varies(self[name])]

    def setup_columns(self) -> list[str]:
        """List the columns that `read_tables` made of fields of the set-up, such as `optimiser.weight_decay`."""
        return [name for name in self if "." in name and name.split(".")[0] in SECTIONS]

    def design_columns(self) -> list[str]:
        """List the columns of the design, those of the set-up included, that take several values."""
        return self.varying((*DESIGN, *self.setup_columns()))

    def settings(self, measured: Collection[str] = ()) -> list[str]:
        """List the columns of a foreign table that are settings, words and numbers that repeat, but for measured ones.

        Whole numbers in two rows or more each, others in three. What else there is are measurements, accuracies always.
        A word that stands for one size and one seed is the name of a run.
        """
        reserved, frame = {*KNOWN, FOLDER, *CANONICAL, *self._labels, *measured}, self._frame
        reserved |= self.sources
        plain = self.varying([name for name in self if name not in reserved and is_plain(self[name])])
        scale, settings = self.varying(("params_total", "seed")), []
        for name in [name for name in plain if not looks_like_accuracy(frame, name)]:
            num_values = frame[name].nunique()
            numbers = to_numbers(frame[name])
            if numbers.notna().equals(frame[name].notna()):  # 44M and 26.2 %, too
                whole = (numbers.dropna() % 1 == 0).all()  # batches and depths; measurements seldom are
                is_setting = (2 if whole else 3) * num_values <= len(frame)
                is_setting &= not self._is_scheduled(name)
            else:
                is_name = num_values > MOST_NAMES * len(frame) >= 5 or (
                    len(scale) == 2 and len(frame[[name, *scale]].drop_duplicates()) == num_values
                )
                is_setting = num_values < len(frame) and not is_name
            settings += [name] if is_setting else []
        return settings

    def follows_scale(self, name: str) -> bool:
        """Tell whether a column names sizes, budgets or runs (each of its values has one size or one budget), or is a
        number that follows from them, such as a width."""
        frame, scale = self._frame, self.varying(("size", "params_total", "images_seen", "unique_images", *CANONICAL))
        if not scale or (frame.groupby(name)[scale].nunique().max() <= 1).any():
            return bool(scale)
        is_number = pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name])
        return is_number and bool(frame.groupby(scale, dropna=False)[name].nunique().max() <= 1)

    def tuned_columns(self, used: Collection[str] = ()) -> list[str]:
        """List the learning rates, batches and weight decays that take several values, but for columns in use."""
        names = [str(name) for name in self._frame.select_dtypes("number") if TUNED_BY_OTHERS.match(str(name))]
        foreign = [name for name in names if name not in {*KNOWN, *self.setup_columns()}]
        names = self.varying((*TUNED, *foreign))
        return [name for name in names if name not in used and not self._is_scheduled(name)]

    def _is_scheduled(self, name: str) -> bool:
        """Tell whether a number changes within runs, as a rate that is logged beside a step does."""
        values = self._frame[name]
        if "run_id" in self and self["run_id"].duplicated().any():
            return bool(values.groupby(self["run_id"]).nunique().gt(1).any())
        has_steps = any(varies(self._frame[step]) for step in STEPS if step in self)
        return has_steps and values.nunique() > MOST_RATES

    @property
    def sources(self) -> set[str]:
        """Columns of the file that formulas of others were counted from."""
        names = set[str]()
        for text in self.names.values():
            if text not in self:  # a plain name is gone, renamed
                with contextlib.suppress(FormulaError):
                    names |= {name for name in parse_formula(text).names if name in self}
        return names

    def experiment_columns(self) -> list[str]:
        """List the columns that may tell experiments apart and vary: those of the design and the set-up, settings of a
        foreign table, the sweep and the folder of rows. Of columns that part the rows alike, the first."""
        design, tuned = self.design_columns(), self.tuned_columns()
        names = [name for name in self.settings() if name not in tuned and not self.follows_scale(name)]
        names += self.varying(PROVENANCE)
        first = {tuple(pd.factorize(self[name])[0]): name for name in reversed([*design, *names])}
        return [*design, *(name for name in names if name in first.values())]

    def held_equal(self, free: Collection[str] = ()) -> list[str]:
        """List columns in which rows agree that are alike in everything but `free` (compared, tuned or measured ones):
        scale, design, set-up, and settings of a foreign table. Where none names sizes, parameters stand for them."""
        sizes = [*([] if "size" in self else ["params_total"]), "N", "D", "U"]
        names = dict.fromkeys([*sizes, *SCALE, *DESIGN, *self.setup_columns(), *self.settings(free)])
        return [name for name in names if name in self and name not in free]

    @property
    def loss_unit(self) -> str:
        """Unit of losses by their target; empty for a foreign table, or an objective that is not ours."""
        setups = " ".join(self["setup"].dropna().astype(str)) if "setup" in self else ""
        if set(re.findall(r'"objective\.(\w+)"', setups)) - {"target", "prefix", "masked"}:
            return ""
        targets = set(self["target"].dropna()) if "target" in self else set()
        return {"normalised": "normalised MSE", "raw": "MSE"}.get(targets.pop(), "") if len(targets) == 1 else ""

    def shared_groups(self, x: Mapping[str, Array]) -> Groups:
        """Find the sizes, budgets and runs that the rows share, as points (n,) of a law of these variables."""
        return groups_of(self._frame, x, self.grouping)

    @cached_property
    def groups(self) -> pd.DataFrame:
        """Numbers of each row's size, budget and run, of those that show; `with_groups` corrects them."""
        numbers = self.numbers({v: name for v in ("N", "D", "C") if (name := self.column(v)) in self})
        x = {str(v): values.to_numpy() for v, values in numbers.items() if (values > 0).all()}
        codes = codes_of(self._frame, x, self.grouping)
        return pd.DataFrame({kind.removesuffix("s"): each for kind, each in codes.items()}, index=self.index)

    def summary(self) -> str:
        """Count rows, sizes, budgets, runs and experiments, and say what was left out."""
        counts = {"row": len(self), **({str(kind): codes.nunique() for kind, codes in self.groups.items()})}
        columns = self.design_columns()
        counts["experiment"] = self._frame.groupby(columns, dropna=False).ngroups if columns else 1
        words = ", ".join(f"{num} {noun}{'s' * (num != 1)}" for noun, num in counts.items())
        return f"{words}; left out: {', '.join(map(str, self.exclusions)) or 'nothing'}"

    def __repr__(self) -> str:
        return f"{self.summary()}\n{self._frame}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.summary())}</p>{self._frame.to_html(max_rows=10)}"


Table = Runs | pd.DataFrame
"""What estimators take: runs, or a data frame, which they wrap."""


def joined(tables: Sequence[Runs]) -> Runs:
    """Join different tables, rows numbered anew."""
    runs = Runs(pd.concat([part.frame for part in tables], ignore_index=True))
    for part in tables:
        runs = runs.described(part.names, part.exclusions)
    return runs
