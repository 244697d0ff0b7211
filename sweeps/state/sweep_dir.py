"""Sweep directory: its record, and the runs in it."""

from __future__ import annotations

from collections.abc import Sequence

from aimscale.harness.run.failures import disk_sentence
from aimscale.harness.run.files import write_json, write_text
from aimscale.harness.run.provenance import is_imported
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import SWEEP_FILE, SWEEP_RECORD, Sweep, SweepError, read_record
from aimscale.sweeps.state.record import RunRecord


def prepare_directory(sweep: Sweep, runs: Sequence[Run] = ()) -> None:
    """Create the sweep's directory and record its base directory and the fingerprints of its data.

    A sweep that was moved, or whose file was moved, continues: run ids depend only on what is trained.

    Raises:
        SweepError: the directory cannot be written.
    """
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
        sentence = disk_sentence(error) or f"cannot write into {directory} ({error.strerror}); choose another --root"
        raise SweepError(sentence) from error


def imported_runs(sweep: Sweep, runs: Sequence[Run]) -> list[RunRecord]:
    """Return the finished runs outside the plan whose weights were imported (`aimscale weights import`)."""
    return [record for record in _unplanned_records(sweep, runs) if is_imported(record)]


def unplanned_runs(sweep: Sweep, runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the ids of run directories outside the plan, except imported ones: they trained something else."""
    return tuple(record.path.name for record in _unplanned_records(sweep, runs) if not is_imported(record))


def _unplanned_records(sweep: Sweep, runs: Sequence[Run]) -> list[RunRecord]:
    planned = {run.run_id for run in runs}
    there = sorted(sweep.runs_dir.iterdir()) if sweep.runs_dir.is_dir() else []
    return [RunRecord(path) for path in there if path.is_dir() and path.name not in planned]
