"""Where launchers find the evaluation job of a run (neither torch nor data are imported here)."""

from __future__ import annotations

from pathlib import Path

from aimscale.harness.run.directory import RunDir
from aimscale.sweeps.plan.sweepfile import SWEEP_RECORD
from aimscale.sweeps.state.claims import RunRecord, evaluation_progress

FOLDER = "evaluating"
"""Of the job within a run directory."""


class EvaluationRecord(RunRecord):
    """`RUN/evaluating/`: an evaluation job as launchers see it."""

    @classmethod
    def of(cls, run_dir: Path) -> EvaluationRecord:
        """That of a run."""
        return cls(run_dir / FOLDER)

    @property
    def run(self) -> RunDir:
        """The run that is evaluated."""
        return RunDir(self.path.parent)

    @property
    def title(self) -> str:
        """What a person calls the work."""
        return f"the evaluation of {self.run.path.name}"

    @property
    def home(self) -> Path:
        """The sweep's folder, or the run's where it belongs to none."""
        folder = self.run.path.resolve().parent
        return folder.parent if folder.name == "runs" and (folder.parent / SWEEP_RECORD).is_file() else self.run.path

    def saved_progress(self) -> list[int]:
        """What evaluation of the run has finished, and when probes were last finished."""
        return evaluation_progress(self.run.path)


def jobs_beside(run_dir: Path) -> dict[str, EvaluationRecord]:
    """The evaluation job of a run, where it had one, by what it does."""
    job = EvaluationRecord.of(run_dir)
    return {"evaluation": job} if job.path.is_dir() else {}
