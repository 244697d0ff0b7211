"""Evaluation of what a program has trained, by commands of the user.

`python -m aimscale.harness.program.evaluation RUN_DIR...` is an item of the queue of its own, beside the trainings of
other runs, with a lock, a status and results of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from aimscale.harness.program.attempt import Attempt, ProgramFailed, Stopped, make_attempts
from aimscale.harness.program.metrics import probe_entries
from aimscale.harness.run.directory import RunDir, probe_key
from aimscale.harness.run.failures import run_worker
from aimscale.harness.run.files import read_object


class Evaluation(Attempt):
    """One attempt at the evaluation of a run."""

    def work(self) -> None:
        """Measure what its rows lack."""
        for name, commands in self.program.evaluate.items():
            for budget, words in commands.items():
                self._measure(name, budget, words)

    def _measure(self, name: str, budget: int, words: Sequence[str]) -> None:
        """Measure what a command measures of a budget, and add it to its row."""
        row = next((each for each in self.run.read_rows() if each["images_seen"] == budget), None)
        if row is None or name in (evaluated := row.get("evaluated") or []):
            return
        if self.flag.is_raised:
            raise Stopped("stopped between two commands")
        self.write_beat(phase=f"{name} at {budget:,}")
        result = self.run.root / "evaluations" / str(budget) / f"{name}.json"
        result.parent.mkdir(parents=True, exist_ok=True)
        result.unlink(missing_ok=True)  # of an attempt that was killed
        if code := self.execute(words, lambda piece: None):
            raise self.failure(code, f"trainer.evaluate.{name}")
        if (evaluation := read_object(result)) is None:
            self.raise_if_asked_to_end()
            raise ProgramFailed(f"trainer.evaluate.{name} ended with exit code 0 and wrote no {result}", "config")
        entries = probe_entries(evaluation.get("accuracy") or {}, name)
        measured = {probe_key(entry) for entry in entries}
        kept = [entry for entry in row.get("probes") or () if probe_key(entry) not in measured]
        self.run.record_row({"images_seen": budget, "probes": [*kept, *entries], "evaluated": [*evaluated, name]})


if __name__ == "__main__":
    run_worker(
        lambda *paths: make_attempts(Evaluation, [RunDir(path).evaluation for path in paths]),
        "aimscale.harness.program.evaluation RUN_DIR...",
    )
