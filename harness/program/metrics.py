"""What a program tells: JSON lines in `metrics.jsonl`, or lines of its output that a regular expression finds.

A line is an object with `D`, the samples seen, and any of `val_loss`, `val_loss_se`, `loss`, `N`, `C`, `budget`, `time`
and `accuracy`, {"task:kind": share}. Lines without D > 0 and half lines count for nothing; other keys are kept.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.analysis.formulas import FormulaError, parse_formula
from aimscale.harness.run.program import ProgramSection

Line = dict[str, Any]
BUDGET_TOLERANCE = 0.01
"""Share of a budget by which the D of its row may differ from it."""
POINT_DISTANCE = 0.005
"""Share of D that a point of the curve lies above the one before, at least: a program may measure at every step."""
READ_BYTES, MAX_LINE_BYTES = 1 << 22, 1 << 20
"""Bytes that are read at once; a longer line is no line."""
KNOWN_KEYS = {"D", "N", "C", "val_loss", "val_loss_se", "loss", "budget", "time", "accuracy"}


class ProgramError(UserError):
    """Program that does not do what its run needs; the sentence says what to change."""


class LineReader:
    """Whole lines of bytes that come in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def split(self, piece: bytes) -> list[bytes]:
        """Return the lines that a piece completes; a carriage return ends one, too, as in progress bars."""
        *lines, rest = re.split(rb"[\r\n]", piece)  # of the new bytes alone: a line may have no end
        if lines:
            lines[0], self._rest = self._rest + lines[0], b""
        self._rest += rest[: MAX_LINE_BYTES - len(self._rest)]
        return lines


class FileReader:
    """Reader of a file that grows; one that was written anew is read from its start."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._lines = path, 0, LineReader()

    def read(self) -> list[bytes]:
        """Return the whole lines that were added, or some of them if they are many."""
        try:
            if self._path.stat().st_size < self._offset:
                self._offset, self._lines = 0, LineReader()
            with self._path.open("rb") as file:
                file.seek(self._offset)
                piece = file.read(READ_BYTES)
        except FileNotFoundError:
            return []
        self._offset += len(piece)
        return self._lines.split(piece)


@dataclass(kw_only=True)
class Measurements:
    """All that a program has measured so far."""

    program: ProgramSection
    num_params: int | None = None
    """N; it may not change."""
    furthest: int = 0
    """Largest D."""
    last: int = 0
    """D of the last line."""
    loss: float | None = None
    """Last training loss."""
    measured: Line | None = None
    """Last line with a finite validation loss."""
    rows: dict[int, Line] = field(default_factory=dict)
    """Budget -> line that says that it is of this budget."""
    accuracies: dict[str, Any] = field(default_factory=dict)
    """Accuracies of the last line that has any."""
    num_skipped: int = 0
    """Lines without a D above 0, or that are no JSON object."""
    not_finite_at: int | None = None
    """D of the last validation loss, if that is not finite."""

    def __post_init__(self) -> None:
        self.num_params = self.num_params or self.program.num_params
        self._formula = parse_formula(self.program.metrics.D)
        pattern = self.program.metrics.pattern
        self._pattern = None if pattern is None else re.compile(pattern)

    def read(self, lines: list[bytes]) -> Iterator[Line]:
        """Take lines, and yield those with a D.

        Raises:
            ProgramError: a line contradicts an earlier one.
        """
        for raw in lines:
            line = self._parse(raw)
            if line is None:
                continue
            position = self._position(line)
            if position is None:
                self.num_skipped += 1
                continue
            line["D"] = position
            self._note(line)
            for key in [key for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)]:
                line[key] = None  # which JSON cannot hold
            yield line

    def _parse(self, raw: bytes) -> Line | None:
        """Return the object of a line; None where the pattern finds nothing, or the line is blank."""
        text = raw.decode(errors="replace")
        if self._pattern is not None:
            match = self._pattern.search(text)
            return match and {key: _number(value) for key, value in match.groupdict().items() if value is not None}
        try:
            line = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            line = {}
        return line if isinstance(line, dict) or line is None else {}

    def _position(self, line: Line) -> int | None:
        numbers = {key: value for key, value in {**self.program.values, **line}.items() if is_number(value)}
        try:
            position = float(self._formula(numbers))
        except FormulaError:
            return None
        return round(position) if math.isfinite(position) and 0.5 <= position < 1e15 else None

    def _note(self, line: Line) -> None:
        if is_number(line.get("N")):
            num_params = round(line["N"])
            if self.num_params not in (None, num_params):
                raise ProgramError(
                    f"N is {num_params} at D = {line['D']} and was {self.num_params}; a run has one number of "
                    f"parameters, so correct what the program prints, or trainer.params"
                )
            self.num_params = num_params
        self.last, self.furthest = line["D"], max(self.furthest, line["D"])
        if is_number(line.get("loss")):
            self.loss = line["loss"]
        if isinstance(accuracies := line.get("accuracy"), dict):
            self.accuracies = accuracies
        if "val_loss" not in line:
            return
        if not is_number(line["val_loss"]):
            self.not_finite_at = line["D"]
            return
        self.measured, self.not_finite_at = line, None
        if is_number(line.get("budget")) and round(line["budget"]) in self.program.budgets:
            self.rows[round(line["budget"])] = line

    def row_at_end(self, budget: int) -> Line | None:
        """Return the line of a budget once the program has ended with exit code 0, if there is one."""
        last = self.measured
        if budget in self.rows or self.program.together or last is None:
            return self.rows.get(budget)
        return last if abs(last["D"] - budget) <= BUDGET_TOLERANCE * budget else None

    def missing_row_reason(self, budget: int) -> str:
        """Say why a program that ended with exit code 0 has no row at a budget."""
        unit, program = self.program.unit, self.program
        where = "metrics.pattern finds" if program.metrics.pattern else "metrics.jsonl has"
        if self.measured is None:
            skipped = f" (lines without a D above 0: {self.num_skipped})" if self.num_skipped else ""
            return f"it ended with exit code 0, and {where} no line with D and val_loss{skipped}; correct one of them"
        if program.together:
            return f'it ended with exit code 0 and no line has "budget": {budget}; write one at each of {{budgets}}'
        return (
            f"it ended with exit code 0 at {self.measured['D']:,} {unit}, and not within 1 % of its budget of "
            f"{budget:,}; let the command train up to {{budget}}, and measure there"
        )


def _number(text: str) -> float | str:
    """Return the number that a text is, or the text."""
    try:
        return float(text.replace(",", "").replace("_", ""))
    except ValueError:
        return text


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def probe_entries(accuracies: dict[str, Any], name: str = "") -> list[dict[str, Any]]:
    """Return entries of a row's `probes` from {"task:kind": share}, or {"task:kind": {"top1": share, "n": ...}}.

    Raises:
        ProgramError: a value is no share of 1.
    """
    entries = []
    for key, value in accuracies.items():
        task, _, kind = key.rpartition(":")
        fields = value if isinstance(value, dict) else {"top1": value}
        if not is_number(fields.get("top1")) or not 0 <= fields["top1"] <= 1:
            raise ProgramError(f"the accuracy '{key}' is {value!r:.80}; give a share between 0 and 1")
        entries.append({"task": task or name or kind, "kind": kind, **fields})
    return entries
