"""A program of the user on a real Slurm: requeued, killed and cancelled, it goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
from programs import TRAIN

from aimscale.sweeps.collection import collect
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.planned_sweep import PlannedSweep


def test_a_program_is_requeued_killed_and_finishes_each_run_once(fault: Any, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    trainer = {
        "command": "python train.py {run_dir} {width} {budget} {hold}",
        "sizes": {f"w{width}": {"width": width} for width in (8, 16, 32)},
        "params": "100*width",
        "unit": "tokens",
        "runtime": {"hold": 1.5},
        "stop": {"seconds": 5},
        "evaluate": {"exam": f"python {tmp_path}/exam.py {{result}}"},
    }
    (tmp_path / "exam.py").write_text(
        "import sys; open(sys.argv[1], 'w').write('{\"accuracy\": {\"exam:top-1\": 0.5}}')"
    )
    sizes, budgets = ["w8", "w16", "w32"], [800, 1600, 3200]
    case = fault(trainer=trainer, sizes=sizes, budgets=budgets, base={}, slurm={"setup": [], "max_jobs": 3})
    assert sum(part.num_jobs for part in case.launch()) == 3
    records = {record.path.name: record for record in case.records}

    def begun() -> list[str]:
        return [name for name, each in records.items() if each.is_held() and (each.path / "checkpoint").exists()]

    first = case.wait(begun, "a first checkpoint")[0]
    slurm.command("scontrol", "requeue", str(records[first].claimant().facts["job_id"]))
    second = case.wait(lambda: [name for name in begun() if name != first], "another checkpoint")[0]
    supervisors = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[-1:] == [str(records[second].path)]
    ]
    os.kill(supervisors[0], signal.SIGKILL)
    case.wait_state("finished")
    case.wait_empty_queue()
    found = collect(PlannedSweep(case.sweep))
    assert (found.num_rows, found.num_complete) == (9, 9)
    assert [row["evaluated"] for record in case.records for row in record.read_rows()] == [["exam"]] * 9
    for record in case.records:
        lines = (record.path / "metrics.jsonl").read_text().splitlines()
        assert 8 <= len(lines) <= 10, "no step is trained twice, but the one that was cut short"
    trained = [len((record.path / "trained-by").read_text().splitlines()) for record in case.records]
    assert 9 < sum(trained) <= 12
