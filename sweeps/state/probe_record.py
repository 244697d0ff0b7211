"""Where launchers find the probe and evaluation jobs of a run (neither torch nor data are imported here)."""

from __future__ import annotations

from pathlib import Path

from aimscale.harness.probe.job import FOLDER
from aimscale.harness.run.directory import RunDir
from aimscale.sweeps.plan.sweepfile import SWEEP_RECORD
from aimscale.sweeps.state.claims import RunRecord, evaluation_progress

EVALUATION_FOLDER = "evaluating"
WORK = {FOLDER: "probes", EVALUATION_FOLDER: "evaluation"}
"""Folder in a run -> what is done there."""


class ProbeRecord(RunRecord):
    """`RUN/probing/`: a probe job as launchers see it."""

    @classmethod
    def of(cls, run_dir: Path) -> ProbeRecord:
        """That of a run."""
        return cls(run_dir / FOLDER)

    @property
    def run(self) -> RunDir:
        """The run that is probed."""
        return RunDir(self.path.parent)

    @property
    def title(self) -> str:
        """What a person calls the work."""
        return f"the {WORK[self.path.name]} of {self.run.path.name}"

    @property
    def home(self) -> Path:
        """The sweep's folder, or the run's where it belongs to none."""
        return sweep_folder(self.path.parent) or self.path.parent

    def saved_progress(self) -> list[int]:
        """What evaluation of the run has finished, and when the last part of an unfinished one was saved."""
        return evaluation_progress(self.run.path)


class EvaluationRecord(ProbeRecord):
    """`RUN/evaluating/`: an evaluation job as launchers see it."""

    @classmethod
    def of(cls, run_dir: Path) -> EvaluationRecord:
        """That of a run."""
        return cls(run_dir / EVALUATION_FOLDER)


def jobs_beside(run_dir: Path) -> dict[str, ProbeRecord]:
    """The probe job and the evaluation job of a run, where it had one, by what they do."""
    both = (ProbeRecord.of(run_dir), EvaluationRecord.of(run_dir))
    return {WORK[job.path.name]: job for job in both if job.path.is_dir()}


def sweep_folder(run_dir: Path) -> Path | None:
    """The folder of the sweep that a run directory belongs to; None where it belongs to none."""
    folder = run_dir.resolve().parent.parent
    return folder if run_dir.resolve().parent.name == "runs" and (folder / SWEEP_RECORD).is_file() else None
