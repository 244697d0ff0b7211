"""Sweep directory: its record, and the runs in it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence

from aimscale.harness.run.failures import disk_sentence
from aimscale.harness.run.files import write_json, write_text
from aimscale.harness.run.lock import Lock, read_holder
from aimscale.harness.run.provenance import is_imported
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import SWEEP_FILE, SWEEP_RECORD, Sweep, SweepError, read_record
from aimscale.sweeps.state.record import RunRecord

_log = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 600.0
"""Time to wait for another launch of the sweep, s."""


@contextlib.contextmanager
def hold_submissions(sweep: Sweep) -> Iterator[None]:
    """Hold the lock of the sweep's Slurm submissions for the block.

    Raises:
        SweepError: another launch holds it for too long, or the directory cannot be written.
    """
    path = sweep.directory / "slurm" / "lock"
    lock, deadline, told = Lock(path), time.monotonic() + LOCK_TIMEOUT_S, ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(sweep, error) from error
    while not lock.take():
        other = read_holder(path)
        who = f"process {other.pid} on {other.host}" if other else "another process"
        if not told:
            _log.warning(told := f"waiting for {who}, which submits jobs of this sweep")
        if time.monotonic() > deadline:
            raise SweepError(
                f"{who} submits jobs of this sweep, for more than {LOCK_TIMEOUT_S:.0f} s; end it, then launch again"
            )
    try:
        yield
    finally:
        lock.release()


def _write_error(sweep: Sweep, error: OSError) -> SweepError:
    where = f"cannot write into {sweep.directory} ({error.strerror}); choose another --root"
    return SweepError(disk_sentence(error) or where)


def prepare_directory(sweep: Sweep, runs: Sequence[Run] = ()) -> None:
    """Create the sweep's directory and record its base directory and the fingerprints of its data; a sweep that was
    moved goes on."""
    directory = sweep.directory
    try:
        sweep.runs_dir.mkdir(parents=True, exist_ok=True)
        record = read_record(directory)
        write_text(directory / SWEEP_FILE, sweep.text)
        sources = [source for run in runs for source in run.config.training.data.sources]
        data = {sweep.relative_path(source.path): source.fingerprint for source in sources if source.fingerprint}
        values = {"version": 1, "name": sweep.name, "directory": str(directory), "base_dir": str(sweep.base_dir)}
        values |= {"data": {**(record or {}).get("data", {}), **data}}
        if record != values:
            write_json(directory / SWEEP_RECORD, values)
    except OSError as error:
        raise _write_error(sweep, error) from error


def imported_runs(sweep: Sweep, runs: Sequence[Run]) -> list[RunRecord]:
    """Return the finished runs outside the plan whose weights were imported (`aimscale weights import`)."""
    return [record for record in _unplanned_records(sweep, runs) if is_imported(record)]


def unplanned_runs(sweep: Sweep, runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the ids of run directories outside the plan, except imported ones: they trained something else."""
    return tuple(record.path.name for record in _unplanned_records(sweep, runs) if not is_imported(record))


def _unplanned_records(sweep: Sweep, runs: Sequence[Run]) -> list[RunRecord]:
    planned = {run.run_id for run in runs}
    return [RunRecord(path) for path in sorted(sweep.runs_dir.glob("*/")) if path.name not in planned]
