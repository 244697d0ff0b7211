"""Names of a table's columns (ours, a law's letters, those in the file) and the rows that were left out on the way.

A frame remembers both as plain data in `attrs`, which pandas carries from frame to frame and into Parquet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from aimscale.analysis.errors import AnalysisError, option
from aimscale.analysis.words import did_you_mean

CANONICAL = {"N": "params_total", "D": "images_seen", "U": "unique_images", "C": "flops_train", "L": "val_loss"}
"""Variable of a law -> its column in a results table, unless the table has a column of the variable's own name."""
LETTERS = {name: letter for letter, name in CANONICAL.items()}
FOLDER = "table_folder"
"""Column that `read_tables` adds: the folder a row's table lies in, where its run directories are looked for."""
_ORIGIN = "aimscale"


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """Rows that were left out, and why."""

    kind: str
    subject: str = ""
    """Column, as its file calls it, or the condition that was not met."""
    number: int
    text: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.number} row{'s' if self.number != 1 else ''} {self.text}"


def names_of(frame: pd.DataFrame) -> dict[str, str]:
    """Map our columns to what the file calls them, where that differs."""
    return dict(frame.attrs.get(_ORIGIN, {}).get("names", {}))


def left_out_of(frame: pd.DataFrame) -> tuple[Exclusion, ...]:
    """List what reading and choosing left out before the frame was made."""
    return tuple(Exclusion(**each) for each in frame.attrs.get(_ORIGIN, {}).get("left_out", ()))


def remember(
    frame: pd.DataFrame, names: Mapping[str, str] | None = None, left_out: Sequence[Exclusion] = ()
) -> pd.DataFrame:
    """Give the frame further names and exclusions beside those that it remembers."""
    rows = [vars(each) for each in (*left_out_of(frame), *left_out) if each.number]
    frame = frame.copy(deep=False)
    frame.attrs = {**frame.attrs, _ORIGIN: {"names": {**names_of(frame), **(names or {})}, "left_out": rows}}
    return frame


def joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join different tables, rows numbered anew, with what each of them remembers, which `pd.concat` forgets."""
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs = {}
    for each in frames:
        frame = remember(frame, names_of(each), left_out_of(each))
    return frame


def our_name(frame: pd.DataFrame, typed: str) -> str:
    """Find the column that a user means: by its name here, a law's letter, or the name that it has in their file."""
    ours = {theirs: ours for ours, theirs in names_of(frame).items()}
    choices = (typed, CANONICAL.get(typed, typed), ours.get(typed, typed))
    return next((name for name in choices if name in frame), typed)


def their_name(frame: pd.DataFrame, name: str, words: str = "") -> str:
    """Tell what a table's file calls a column, where that is not our name; else `words` for it, or our name."""
    return names_of(frame).get(name, words or name)


def column_words(frame: pd.DataFrame, like: str) -> str:
    """Name the columns of a table that may be meant, or some of them, as its file calls them."""
    return did_you_mean(like, (their_name(frame, str(n)) for n in frame.columns if n != FOLDER), "its columns are")


def no_column(frame: pd.DataFrame, name: str, why: str = "") -> AnalysisError:
    """Make the error about a column that a table lacks: what for, the option that names it, what there is."""
    letter = LETTERS.get(CANONICAL.get(name, name), name if len(name) == 1 else "")
    formula = {"C": "C=6*N*D", "D": "D=C/(6*N)"}.get(letter)
    count = f", or count it: {option('columns', formula)}" if formula else ""
    named = f"; name yours with {option('columns', f'{letter}=THEIRS')}{count}" if letter else ""
    return AnalysisError(f"The table has no column {name!r}{why}{named}; {column_words(frame, name)}")
