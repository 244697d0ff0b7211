"""Notices: what is said of runs and calls for attention, by checks, plans, launches and status alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Sentence about some runs."""

    level: str
    """Word that opens its line: `fail` and `warn` of a plan, else a state of runs or `unstable`, `data-bound`."""
    text: str
    key: str = ""
    """Key of the sweep file to change, if it is about the file."""
    run_ids: tuple[str, ...] = ()

    def of(self, run_id: str) -> Notice:
        """Return the same notice about this run."""
        return replace(self, run_ids=(run_id,))


def problem(key: str, text: str) -> Notice:
    """Say why runs would fail, and which key of the sweep file to change."""
    return Notice(level="fail", key=key, text=text)


def caution(key: str, text: str) -> Notice:
    """Say what to read before runs start, and which key of the sweep file to change."""
    return Notice(level="warn", key=key, text=text)


def group_notices(notices: Iterable[Notice]) -> tuple[Notice, ...]:
    """Merge notices that say the same of several runs, in the order in which they come first."""
    run_ids: dict[Notice, dict[str, None]] = {}
    for notice in notices:
        run_ids.setdefault(replace(notice, run_ids=()), {}).update(dict.fromkeys(notice.run_ids))
    return tuple(replace(notice, run_ids=tuple(names)) for notice, names in run_ids.items())


def describe_runs(run_ids: Sequence[str], num_runs: int) -> str:
    """Describe which of `num_runs` runs are meant: one id, `all 6 runs`, or `2 of 6 runs, such as ...`."""
    if len(run_ids) == 1:
        return run_ids[0]
    if len(run_ids) == num_runs:
        return f"all {num_runs} runs"
    return f"{len(run_ids)} of {num_runs} runs, such as {run_ids[0]}"
