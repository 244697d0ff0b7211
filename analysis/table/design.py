"""Roles of columns: those that make another experiment, those that were tuned, those that two rows must share."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

import pandas as pd

from aimscale.analysis.table.accuracies import looks_like_accuracy, to_numbers
from aimscale.analysis.table.names import CANONICAL, FOLDER, remember, their_name
from aimscale.analysis.table.schema import COLUMNS, KNOWN

SCALE = tuple(column.name for column in COLUMNS if column.role == "scale")
"""Columns of scale and chance, in which runs of one experiment may differ."""
DESIGN = tuple(column.name for column in COLUMNS if column.role == "design")
"""Columns of the results table that make runs another experiment, not another scale of the same."""
MEASURED_ON = ("data_fingerprint", "val_num_images")
"""Other training data or another validation set: losses that cannot share a law."""
HEAD = ("head_rule", "head_depth", "head_width", "model.head_depth", "model.head_width")
FOLLOWS = {
    **dict.fromkeys(HEAD, HEAD),
    "schedule": ("schedule.decay_fraction", "schedule.lr_end"),
    "image_size": ("patch_size", *MEASURED_ON),
    "patch_size": ("image_size",),
    "size": ("head_depth", "head_width", "lr_peak", "lr_multiplier", "batch_size"),
    "lr_multiplier": ("lr_peak",),
    "lr_peak": ("lr_multiplier",),
    "objective.masked": ("prefix",),
}
"""Column in question -> columns that change with it and so cannot be held equal."""
TUNED = ("lr_multiplier", "lr_peak", "batch_size", "optimiser.weight_decay")
"""Tuned columns of a results table."""
_TUNED_BY_OTHERS = re.compile(
    r"(?!.*(min|end|final|start|warm|schedule|lr[ _-]?decay|index))"
    r".*(?<![a-z])(lr|learning[ _-]?rate|batch([ _-]?size)?|bsz?|weight[ _-]?decay|wd)(?![a-z])",
    re.IGNORECASE,
)
"""Names of a learning rate, a batch or a weight decay in tables of others; not of the schedule's, nor counts."""
SECTIONS = ("model", "data", "objective", "optimiser", "schedule")
"""Parts of a run's configuration whose fields `read_tables` makes into columns."""
DEFAULT = "default"
"""Value of a column of the set-up where a run left the field at its default."""
PROVENANCE = ("sweep", FOLDER)
"""Columns that say where a row comes from: one experiment may stand in several sweeps and folders."""


def varies(values: pd.Series) -> bool:
    """Tell whether a column takes several values, missing ones aside."""
    return len(pd.unique(values.dropna())) > 1


def is_plain(values: pd.Series) -> bool:
    """Tell whether a column holds what can be compared: no lists, no dictionaries."""
    return bool(values.map(pd.api.types.is_hashable).all())


def _varying(frame: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """List those of the columns that the frame has and that take several values."""
    return [name for name in names if name in frame and varies(frame[name])]


def setup_columns(frame: pd.DataFrame) -> list[str]:
    """List the columns that `read_tables` made of fields of the set-up, such as `optimiser.weight_decay`."""
    return [name for name in map(str, frame.columns) if "." in name and name.split(".")[0] in SECTIONS]


def design_columns(frame: pd.DataFrame) -> list[str]:
    """List the columns of the design, those of the set-up included, that take several values."""
    return _varying(frame, (*DESIGN, *setup_columns(frame)))


def foreign_settings(frame: pd.DataFrame, measured: Collection[str] = ()) -> list[str]:
    """List the columns of a foreign table that are settings: words and numbers that repeat.

    Whole numbers in two rows or more each, others in three. What else there is are measurements, accuracies always. A
    word that stands for one size and one seed is the name of a run.
    """
    plain = [name for name in map(str, frame.columns) if name not in {*KNOWN, FOLDER, *CANONICAL, *measured}]
    plain = _varying(frame, [name for name in plain if is_plain(frame[name])])
    scale, found = _varying(frame, ("params_total", "seed")), []
    for name in [name for name in plain if not looks_like_accuracy(frame, name)]:
        num_values = frame[name].nunique()
        numbers = to_numbers(frame[name])
        if numbers.notna().equals(frame[name].notna()):  # 44M and 26.2 %, too
            whole = (numbers.dropna() % 1 == 0).all()  # batches and depths; measurements seldom are
            is_setting = (2 if whole else 3) * num_values <= len(frame)
        else:
            is_name = len(scale) == 2 and len(frame[[name, *scale]].drop_duplicates()) == num_values
            is_setting = num_values < len(frame) and not is_name
        found += [name] if is_setting else []
    return found


def follows_scale(frame: pd.DataFrame, name: str) -> bool:
    """Tell whether a column names sizes, budgets or runs (each of its values has one size or one budget), or is a
    number that follows from them, such as a width."""
    scale = _varying(frame, ("size", "params_total", "images_seen", "unique_images", *CANONICAL))
    if not scale or (frame.groupby(name)[scale].nunique().max() <= 1).any():
        return bool(scale)
    is_number = pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name])
    return is_number and bool(frame.groupby(scale, dropna=False)[name].nunique().max() <= 1)


def tuned_columns(frame: pd.DataFrame, used: Collection[str] = ()) -> list[str]:
    """List the learning rates, batches and weight decays that take several values, but for columns in use."""
    names = [str(name) for name in frame.select_dtypes("number") if _TUNED_BY_OTHERS.match(str(name))]
    foreign = [name for name in names if name not in {*KNOWN, *setup_columns(frame)}]
    return [name for name in _varying(frame, (*TUNED, *foreign)) if name not in used]


def experiment_columns(frame: pd.DataFrame) -> list[str]:
    """List the columns that may tell experiments apart and vary: those of the design and the set-up, settings of a
    foreign table, the sweep and the folder of rows. Of columns that part the rows alike, the first."""
    design, tuned = design_columns(frame), tuned_columns(frame)
    names = [name for name in foreign_settings(frame) if name not in tuned and not follows_scale(frame, name)]
    names += _varying(frame, PROVENANCE)
    first = {tuple(pd.factorize(frame[name])[0]): name for name in reversed([*design, *names])}
    return [*design, *(name for name in names if name in first.values())]


def held_equal(frame: pd.DataFrame, free: Collection[str] = ()) -> list[str]:
    """List columns in which rows agree that are alike in everything but `free` (compared, tuned or measured ones):
    scale, design, set-up, and settings of a foreign table. Where no column names sizes, parameters stand for them."""
    sizes = [*([] if "size" in frame else ["params_total"]), "N", "D", "U"]
    names = dict.fromkeys([*sizes, *SCALE, *DESIGN, *setup_columns(frame), *foreign_settings(frame, free)])
    return [name for name in names if name in frame and name not in free]


def with_size(frame: pd.DataFrame) -> pd.DataFrame:
    """Name a `size` per number of parameters where the frame has none: foreign tables count, and do not name."""
    if "size" in frame or "params_total" not in frame:
        return frame
    numbers = frame["params_total"].dropna().unique()
    words = told_apart(numbers, lambda value, digits: f"{value:.{digits}g}", 4)
    out = frame.assign(size=frame["params_total"].map(dict(zip(numbers, words, strict=True))))
    return remember(out, names={"size": their_name(frame, "params_total")})


def told_apart(values: Iterable[float], write: Callable[[float, int], str], digits: int) -> list[str]:
    """Write different numbers with as few digits as tell them apart, and so many at least."""
    numbers = list(values)
    tries = ([write(value, num) for value in numbers] for num in range(digits, 18))  # 17 tell any two floats apart
    return next((words for words in tries if len(set(words)) == len(numbers)), [str(value) for value in numbers])
