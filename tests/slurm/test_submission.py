"""What reaches Slurm: arrays and scripts, each run once, and refusals in one sentence."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from aimscale.sweeps.slurm.submit import launch_slurm
from aimscale.sweeps.state.claims import RunRecord
from typer.testing import CliRunner

from aimscale.aim.errors import UserError
from aimscale.sweeps.cli.main import verb
from aimscale.sweeps.slurm import commands as slurm

STAND_IN = str(Path(__file__).parents[1] / "sweeps" / "stand_in.py")

LAUNCHER = """
    from pathlib import Path
    from aimscale.sweeps.state.sweep_dir import prepare
    from aimscale.sweeps.plan.planner import plan
    from aimscale.sweeps.slurm.submit import launch_slurm
    from aimscale.sweeps.plan.sweepfile import load_sweep
    sweep = load_sweep({path!r}, Path({root!r}))
    prepare(sweep)
    launched = launch_slurm(sweep, plan(sweep), allow_dirty=True, worker=({worker!r},))
    print(sum(len(part.run_ids) for part in launched.submitted))
"""


def test_two_launches_at_once_submit_each_run_once_in_split_arrays(fault: Any, tmp_path: Path) -> None:
    case = fault(seeds=[0, 1, 2, 3, 4, 5])
    program = textwrap.dedent(LAUNCHER).format(path=str(case.sweep.source), root=str(case.sweep.root), worker=STAND_IN)
    launchers = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(int(launcher.communicate(timeout=400)[0]) for launcher in launchers) == [0, 6]
    assert len({str(record.read_claim().job_id).split("_")[0] for record in case.records}) == 2  # MaxArraySize is 4
    case.wait_state("finished")
    case.wait_empty_queue()
    assert [len((record.path / "starts").read_text().split()) for record in case.records] == [1] * 6

    again = case.launch((STAND_IN,))
    assert not again.submitted
    (case.records[0].path / "status.json").unlink()  # a run that was lost starts again, alone
    assert [part.run_ids for part in case.launch((STAND_IN,)).submitted] == [(case.runs[0].run_id,)]
    case.wait_empty_queue()


def test_one_job_at_a_time_over_arrays(fault: Any) -> None:
    """Two shapes, so two arrays: Slurm itself bounds one array only."""
    two_ranks = [{"when": {"seed": 1}, "set": {"devices": 2}}]
    case = fault(seeds=[0, 1], budgets=[32], slurm={"max_parallel": 1, "setup": []}, override=two_ranks)
    words = [str(case.sweep.source), "--root", str(case.sweep.root), "--on", "slurm", "--allow-dirty"]
    earlier = case.runs[0].config
    earlier = earlier.model_copy(update={"training": earlier.training.model_copy(update={"seed": 7})})
    RunRecord.create(case.sweep.run_dir(earlier.run_id), earlier)
    result = CliRunner().invoke(verb("launch"), words)
    assert result.exit_code == 0, result.output
    assert f"not in this plan and left as they are: 1 run directories, such as {earlier.run_id}" in result.output
    assert [line.split(" of ")[0] for line in result.output.splitlines() if line.startswith("submitted")] == [
        "submitted 1 runs", "submitted 1 runs",
    ]  # fmt: skip

    def over() -> bool:
        phases = [job.phase for job in slurm.jobs().values()]
        assert phases.count("running") <= 1
        return set(phases) <= {"ended"}

    case.wait(over, "the end of both jobs, one at a time")
    rows = [row for record in case.records for row in record.read_rows()]
    assert len(rows) == 2
    assert all(row["val_loss"] > 0 for row in rows)


def test_a_node_on_which_a_run_failed_is_left_out_and_named(fault: Any) -> None:
    case = fault(slurm={"setup": []})
    record, run = case.records[0], case.runs[0]
    RunRecord.create(record.path, run.config)
    record.write_status(state="failed", reason="node node1 failed", reason_class="node")
    ended = {"exit_code": None, "where": "slurm 1", "saved": record.saved_progress(), "reason_class": "node"}
    record.append_attempt(attempt=1, ended=1.0, device_hours=0.0, reason="", failed_nodes=["node1"], **ended)
    where = ["--root", str(case.sweep.root), "--on", "slurm", "--allow-dirty"]
    told = CliRunner().invoke(verb("launch"), [str(case.sweep.source), *where])
    assert "without node1, where some of these runs failed" in told.output
    case.wait_state("finished")
    case.wait_empty_queue()
    job = told.output.partition(" as job ")[2].split()[0]
    assert " NodeList=node2" in slurm.command("scontrol", "show", "job", job)


def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(fault: Any) -> None:
    case = fault(seeds=[0, 1], slurm={"extra": {"comment": "night shift", "mem": "1G"}, "partition": "main"})
    dry = launch_slurm(case.sweep, case.runs, allow_dirty=True, dry_run=True, worker=(STAND_IN,))
    assert not case.sweep.root.exists()
    for line in ("--array=0-1%2", "--requeue", "--signal=USR2@10", "--partition=main", "--comment='night shift'"):
        assert f"#SBATCH {line}" in dry.submitted[0].script
    case.launch((STAND_IN,))
    (submitted,) = (case.sweep.directory / "slurm").glob("*_submission.sh")
    assert submitted.read_text() == dry.submitted[0].script
    case.wait_empty_queue()


def test_a_job_whose_claim_is_gone_starts_nothing(fault: Any) -> None:
    case = fault(slurm={"extra": {"begin": "now+3"}})
    case.launch((STAND_IN,))
    job_id = case.records[0].read_claim().job_id
    case.records[0].drop_claim()
    case.wait(lambda: slurm.jobs()[job_id].state == "COMPLETED", "end of the job")
    assert not (case.records[0].path / "starts").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"partition": "mian"}, "'main'"),
        ({"extra": {"constraint": "gold"}}, "feature"),
        ({"extra": {"mem": "1000000G"}}, "[Mm]emory"),
    ],
)
def test_what_slurm_refuses_is_one_sentence(fault: Any, fields: dict[str, Any], words: str) -> None:
    case = fault(slurm=fields)
    with pytest.raises(UserError, match=words) as caught:
        case.launch((STAND_IN,))
    assert "\n" not in str(caught.value)
    assert not case.records[0].path.exists()
