"""Submission without a Slurm: refusals, and how the code is pinned. With a real Slurm: tests/slurm."""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aimscale.aim.errors import UserError
from aimscale.harness.run.lock import hold_lock
from aimscale.harness.run.provenance import find_snapshot, make_snapshot
from aimscale.sweeps.cli.layout import format_duration
from aimscale.sweeps.cli.plan_view import print_plan
from aimscale.sweeps.engine.slurm_worker import launch_slurm
from aimscale.sweeps.planning.aim_run import SAVE_BYTES_PER_S
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import Sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.jobs import JobShape, live_jobs
from aimscale.sweeps.slurm.submit import Submission, job_shape, submit
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord, prepare_directory
from aimscale.sweeps.sweep_status import sweep_status


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *words], check=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Make a committed source tree."""
    folder = tmp_path / "source"
    (folder / "harness").mkdir(parents=True)
    (folder / "harness" / "train.py").write_text("committed")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_queued_code_is_pinned(source: Path, tmp_path: Path) -> None:
    snapshot = find_snapshot(tmp_path, allow_dirty=False, source=source)
    assert not (tmp_path / "code").exists()
    make_snapshot(snapshot, source)
    (source / "harness" / "train.py").write_text("edited later")
    assert snapshot.path is not None
    assert (snapshot.path / "aimscale" / "harness" / "train.py").read_text() == "committed"


def test_a_dirty_tree_is_refused_or_recorded(source: Path, tmp_path: Path) -> None:
    clean = find_snapshot(tmp_path, allow_dirty=False, source=source)
    (source / "harness" / "new.py").write_text("not committed")
    with pytest.raises(UserError, match="--allow-dirty"):
        find_snapshot(tmp_path, allow_dirty=False, source=source)
    dirty = find_snapshot(tmp_path, allow_dirty=True, source=source)
    make_snapshot(dirty, source)
    assert dirty.path is not None
    assert dirty.path != clean.path
    assert (dirty.path / "aimscale" / "harness" / "new.py").exists()
    assert (dirty.commit, dirty.dirty) == (clean.commit, True)


@pytest.fixture
def submitted(program: Any, tmp_path: Path) -> Any:
    """Fake a Slurm that accepts every job; return a function from an sbatch option to its values, one per job."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    program("squeue", f"cat {tmp_path}/queue 2> /dev/null || true")
    program("sinfo", "echo main")
    program("srun", "exit 1")
    program("scontrol", "echo MaxArraySize = $(cat " + f"{tmp_path}/longest)")
    program("sbatch", f'n=$(ls {jobs} | wc -l); cat > {jobs}/$n; echo "$((n + 1));main"')
    (tmp_path / "longest").write_text("1001")

    def options(name: str) -> list[str | None]:
        texts = [(jobs / str(i)).read_text() for i in range(len(list(jobs.iterdir())))]
        return [found[1] if (found := re.search(rf"^#SBATCH --{name}=(.*)$", text, re.M)) else None for text in texts]

    return options


def submit_for(sweep: Sweep, **changes: Any) -> list[Submission]:
    prepare_directory(sweep)
    return submit(PlannedSweep(sweep), allow_dirty=True, **changes)


def test_jobs_that_begin_while_the_next_part_is_submitted_are_no_broken_script(
    write_sweep: Any, submitted: Any, program: Any, tmp_path: Path
) -> None:
    """Their logs were there, and empty still: the second part of a split array was refused."""
    sweep, jobs = write_sweep(seeds=[0, 1]), tmp_path / "jobs"
    logs = sweep.directory / "slurm"
    begin = f"mkdir -p {logs}; touch {logs}/$((n + 1))_0.out {logs}/$((n + 1))_1.out"
    program("sbatch", f'n=$(ls {jobs} | wc -l); cat > {jobs}/$n; {begin}; echo "$((n + 1));main"')
    (tmp_path / "longest").write_text("2")
    parts = submit_for(sweep)
    assert len(parts) > 1
    assert sum(part.num_jobs for part in parts) == 4


@pytest.mark.parametrize("stage", ["", "evaluation"])
def test_a_launch_submits_what_is_lacking_and_no_more(
    write_sweep: Any, submitted: Any, tmp_path: Path, stage: str
) -> None:
    """Of four runs one has a pending job; a job that executes another run, and one that ended, are not counted."""
    sweep = write_sweep(seeds=[0, 1])
    (first,) = submit_for(sweep)
    assert (first.num_jobs, submitted("array")) == (4, ["0-3%4"])
    queue = ["1_0|PENDING|", "1_1|RUNNING|node1", "1_2|CANCELLED|", "9|RUNNING|node2"]
    (tmp_path / "queue").write_text("\n".join(queue))
    (sweep.run_dir("other") / stage).mkdir(parents=True)
    with hold_lock(sweep.run_dir("other") / stage / "claim", job_id="1_1"):
        assert [(each.info.job_id, each.is_busy) for each in live_jobs(sweep, slurm.jobs())] == [
            ("1_0", False),
            ("1_1", True),
        ]
        assert [part.num_jobs for part in submit_for(sweep)] == [3]
    limited = sweep.with_fields(slurm={"max_jobs": 2})
    assert not submit_for(limited)


def test_a_run_that_lacks_only_its_evaluation_asks_for_one_node_and_is_checked_as_it_trains(
    write_sweep: Any, submitted: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"task": "mine", "train": "data/train", "test": "data/test"}
    sweep = write_sweep(sizes=["rung-32"], devices=16, slurm={"gpus": False}, base={"probes": [task]})
    checked: list[int] = []
    monkeypatch.setattr(
        "aimscale.sweeps.engine.launch.raise_on_problems", lambda _, runs: checked.extend(run.devices for run in runs)
    )
    (part,) = launch_slurm(PlannedSweep(sweep), allow_dirty=True)
    assert part.shape == JobShape(nodes=2, devices=8)
    launch(sweep, devices=1, command=stand_in())
    (run,) = plan(sweep)
    for budget in run.budgets:
        file = RunRecord(sweep.run_dir(run.run_id)).model_file(budget)
        file.parent.mkdir(parents=True)
        file.write_bytes(b"weights")
    checked.clear()
    (part,) = launch_slurm(PlannedSweep(sweep), allow_dirty=True)
    assert part.shape == JobShape(nodes=1, devices=8)
    assert checked == [16]


def test_a_changed_request_reaches_pending_jobs(write_sweep: Any, submitted: Any, program: Any, tmp_path: Path) -> None:
    program("scancel", f'echo "$@" >> {tmp_path}/cancelled')
    submit_for(write_sweep(slurm={"time_limit_min": 40}))
    (tmp_path / "queue").write_text("1_0|PENDING|\n1_1|RUNNING|node1\n2_0|PENDING|\n2_1|PENDING|")
    assert not submit_for(write_sweep(slurm={"time_limit_min": 40, "max_jobs": 9}))
    assert not (tmp_path / "cancelled").exists()
    for i, section in enumerate(({"time_limit_min": 30}, {"time_limit_min": 30, "extra": {"mem": "9G"}})):
        (part,) = submit_for(write_sweep(slurm=section))
        assert (part.num_jobs, submitted("time")[-1]) == (1 + i, "30"), "the job that runs takes one"
        if i == 0:
            (tmp_path / "queue").write_text("2|PENDING|")
    assert (tmp_path / "cancelled").read_text() == "--quiet --state=PENDING 1_0\n--quiet --state=PENDING 2\n"


def test_jobs_ask_for_the_time_that_their_runs_need(write_sweep: Any, submitted: Any) -> None:
    def minutes(name: str, peak_tflops: float, **slurm: Any) -> tuple[int, float]:
        cost = {"peak_tflops": peak_tflops}
        sweep = write_sweep(name=name, slurm={"gpus": False, **slurm}, sizes=["rung-32"], seeds=[0, 1, 2], cost=cost)
        (part,) = submit_for(sweep, dry_run=True)
        (limit,) = re.findall(r"^#SBATCH --time=(.*)$", part.script, re.M)
        return int(limit), cost_cards(sweep, plan(sweep))[0].wall_s / 60

    assert minutes("short", 1.0)[0] == 60
    limit, wall = minutes("each", 1e-5)
    assert 60 < limit < 1440
    assert limit == math.ceil(2 * wall + 2), "and two minutes to save"
    assert minutes("one", 1e-5, max_jobs=1)[0] == math.ceil(3 * 2 * wall + 2)
    assert minutes("long", 1e-5, time_limit_min=61)[0] == 61
    (first, *_) = plan(write_sweep(name="each", sizes=["rung-32"]))
    record = RunRecord(write_sweep(name="each").run_dir(first.run_id))
    RunRecord.create(record.path, first.config)
    record.append_attempt(attempt=1, ended=1.0, device_hours=0.0, saved=[0], reason_class="timeout")
    assert minutes("each", 1e-5)[0] == 1440, "it has taken longer than the plan says"


def test_jobs_are_shared_out_over_shapes_and_what_gets_none_is_said(
    write_sweep: Any, submitted: Any, tmp_path: Path, caplog: Any
) -> None:
    wide = [{"when": {"size": "rung-48"}, "set": {"devices": 8}}]
    widest = [{"when": {"size": "rung-64"}, "set": {"devices": 16}}]
    fields = {"sizes": ["rung-32", "rung-48", "rung-64"], "seeds": [0, 1], "override": [*wide, *widest]}
    submit_for(write_sweep(slurm={"max_jobs": 4}, **fields))
    assert submitted("array") == ["0-1%2", None, None]
    assert [submitted("nodes"), submitted("ntasks-per-node")] == [["2", "1", "1"], ["8", "8", "1"]]
    submit_for(write_sweep(slurm={"max_jobs": 2}, name="narrow", **fields))
    assert submitted("nodes")[3:] == ["2", "1"], "the longest runs first"
    assert "no job for 2 runs of 1 x 1: slurm.max_jobs is reached" in caplog.text
    (tmp_path / "longest").write_text("0")
    submit_for(write_sweep(name="single", **fields))
    assert submitted("array")[5:] == [None] * 6


def test_a_dry_run_prints_the_script_that_is_submitted(write_sweep: Any, submitted: Any, tmp_path: Path) -> None:
    section = {"gpus": "a100", "cpus_per_task": 6, "extra": {"comment": "night shift"}}
    sweep = write_sweep(seeds=list(range(9)), slurm=section)
    (dry,) = submit_for(sweep, dry_run=True)
    (part,) = submit_for(sweep)
    assert (tmp_path / "jobs" / "0").read_text() == dry.script == part.script
    assert [submitted(name) for name in ("signal", "comment")] == [["B:USR2@120"], ["'night shift'"]]
    assert (part.num_jobs, part.shape) == (18, JobShape(nodes=1, devices=1))
    assert [submitted(name) for name in ("gpus-per-node", "cpus-per-task")] == [["a100:1"], ["6"]]


def test_without_slurm_a_dry_run_prints_its_script_and_a_launch_one_sentence(
    write_sweep: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "git").symlink_to(shutil.which("git") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    sweep = write_sweep()
    (part,) = submit(PlannedSweep(sweep), allow_dirty=True, dry_run=True)
    assert "#SBATCH --array=0-1%2" in part.script
    assert not sweep.directory.exists()
    with pytest.raises(UserError, match="--on local"):
        submit_for(sweep)
    assert slurm.try_list_jobs() is None
    with pytest.raises(UserError, match="--root"):
        submit_for(replace(sweep, root=tmp_path / "100%j"))


def test_devices_fill_whole_nodes(write_sweep: Any) -> None:
    sweep = write_sweep(devices=16)
    run = plan(sweep)[0]
    assert job_shape(run, sweep.file.slurm) == JobShape(nodes=2, devices=8)
    with pytest.raises(UserError, match="devices_per_node"):
        job_shape(run, sweep.file.slurm.model_copy(update={"devices_per_node": 6}))


@pytest.mark.parametrize(
    "section",
    [
        {"partition": "main\ntouch pwned"},
        {"extra": {"account": ""}},
        {"partition": "a\rb"},
        {"extra": {"comment\ntouch": "x"}},
        {"extra": {"comment": "x\ntouch pwned"}},
        {"extra": {"Mail Type": "END"}},
        {"extra": {"comment": ["a"]}},
        {"python": "python\ntouch pwned"},
        {"python": "python 'unfinished"},
        {"extra": {"time": "99:99"}},
        {"extra": {"nice": math.nan}},
        {"extra": {"no-requeue": True}},
        {"extra": {"partition": "gpu"}},
        {"extra": {"cpus_per_task": 4}},
        {"extra": {"gres": "gpu:a100:8"}},
        {"extra": {"gpus-per-node": 8}},
        {"gpus": "a100\n8"},
    ],
)
def test_what_would_become_a_line_of_the_script_is_refused(write_sweep: Any, section: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="slurm"):
        write_sweep(slurm=section)


def test_no_name_or_folder_becomes_a_command(write_sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is executed by a shell, with an interpreter that only prints its arguments."""
    root = tmp_path / "a $(touch pwned) `touch pwned` 'b\" ;touch pwned"
    section = {"partition": "$(touch pwned)", "python": "tell $(touch pwned)", "extra": {"comment": "';touch pwned"}}
    sweep = replace(write_sweep(slurm=section), root=root)
    (part,) = submit(PlannedSweep(sweep), allow_dirty=True, dry_run=True)
    (tmp_path / "tell").write_text('#!/bin/sh\npwd; echo "$PYTHONPATH"; for word; do echo "$word"; done\n')
    (tmp_path / "tell").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def execute() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash"], input=part.script, capture_output=True, text=True, check=False, cwd=tmp_path)

    gone = execute()
    assert (gone.returncode, gone.stdout) == (1, "job begins on node \n")
    code = find_snapshot(sweep.directory, allow_dirty=True).path
    assert code is not None
    code.mkdir(parents=True)
    _, *words = execute().stdout.splitlines()
    assert words[:4] == [str(code), str(code), "$(touch", "pwned)"]
    assert words[4:] == ["-u", "-m", "aimscale.sweeps.engine.slurm_worker", str(root / "tiny"), "1", "1"]
    assert not list(tmp_path.rglob("pwned"))


def test_a_save_gets_its_time_everywhere(write_sweep: Any) -> None:
    """The signal, the worker and the plan use the same number."""
    small = write_sweep(sizes=["rung-32"], budgets=[640])
    (run,) = plan(small)
    assert run.grace_s == cost_cards(small, [run])[0].stop_s == 120
    large = write_sweep(sizes=["aim-7B"], budgets=[640], devices=8)
    (run,) = plan(large)
    (card,) = cost_cards(large, [run])
    assert card.stop_s == run.grace_s == math.ceil(2 * 12 * card.params_total / SAVE_BYTES_PER_S) + 30
    console = Console(width=200, file=io.StringIO())
    print_plan(PlannedSweep(large), console)
    assert f"up to {format_duration(card.stop_s)} for a last save" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_line_of_the_setup_that_fails_ends_the_job_and_status_says_which(
    write_sweep: Any, submitted: Any, tmp_path: Path
) -> None:
    """As `set -e` would, but for lines inside a file that is sourced, of which many fail in any profile."""
    (tmp_path / "profile").write_text("false\nmodule() { return 0; }\n")
    begins = f"{tmp_path}/begins"
    Path(begins).write_text("#!/bin/sh\necho worker begins: job 1\n")
    Path(begins).chmod(0o755)
    setups = (["false || true", f"source {tmp_path}/profile", "module load cuda"], ["module load cuda", "true"])
    for setup, code in zip(setups, (0, 127), strict=True):
        sweep = write_sweep(sizes=["rung-32"], slurm={"setup": setup, "python": begins})
        (part,) = submit_for(sweep, retry=True)
        (tmp_path / "slurm_script").write_text(part.script)
        done = subprocess.run(["bash", tmp_path / "slurm_script"], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert ("worker begins" in done.stdout) == (code == 0), done
    submissions = slurm.submissions_file(sweep)
    submissions.with_name(f"{part.job_id}.out").write_text(done.stderr + done.stdout)
    (said,) = sweep_status(PlannedSweep(sweep), {}).failed_jobs
    assert said.startswith("slurm.setup failed with exit code 127: module load cuda (1 jobs; see ")


def test_jobs_that_die_before_they_take_a_run_are_shown_and_not_submitted_again(
    write_sweep: Any, submitted: Any
) -> None:
    """The most common first failure on a cluster: a line of `slurm.setup` that does not work there."""
    sweep = write_sweep(slurm={"setup": ["module load cuda || exit 1"]})
    submit_for(sweep)
    assert not sweep_status(PlannedSweep(sweep), {}).failed_jobs, "no log yet"
    for i in (0, 1):
        (sweep.directory / "slurm" / f"1_{i}.out").write_text("hello\nmodule: command not found\n")
    (said,) = sweep_status(PlannedSweep(sweep), slurm.jobs()).failed_jobs
    assert "module: command not found (2 jobs; see " in said
    with pytest.raises(UserError, match=r"all 2 jobs .* before their workers began: module: command not found"):
        submit_for(sweep)
    assert len(submitted("time")) == 1
    submit_for(sweep, retry=True)
    submit_for(write_sweep(slurm={"setup": ["true"]}))
    assert len(submitted("time")) == 3


def test_nodes_where_jobs_or_runs_failed_add_to_those_that_the_file_excludes(
    write_sweep: Any, submitted: Any, program: Any
) -> None:
    """Node1 cannot start the interpreter, node2 failed a run, and a person excludes node3."""
    program("sinfo", "echo node1; echo node2; echo node3; echo node4")
    sweep = write_sweep(sizes=["rung-32"], slurm={"extra": {"exclude": "node3"}})
    record = RunRecord(sweep.run_dir(plan(sweep)[0].run_id))
    record.path.mkdir(parents=True)
    ended: dict[str, Any] = {"ended": 1.0, "device_hours": 0.0, "saved": [], "reason_class": "node"}
    submit_for(sweep)
    assert submitted("exclude") == ["node3"]
    record.append_attempt(attempt=1, failed_nodes=["node2"], **ended)
    for number in (1, 2, 3):
        if number != 2:
            log = sweep.directory / "slurm" / f"{number}.out"
            log.write_text(f"job begins on node node{1 if number == 1 else 4}\npython: Exec format error\n")
        if number == 3:
            with pytest.raises(UserError, match="Exec format error"):
                submit_for(sweep)
        (part,) = submit_for(sweep, retry=number > 1)
        assert part.excluded == ("node1", "node2" if number < 3 else "node4"), "one is left"
        assert submitted("exclude")[-1] == ",".join(["node3", *part.excluded])


def test_what_a_worker_says_of_itself_is_shown_and_a_regular_end_is_not(write_sweep: Any, submitted: Any) -> None:
    sweep = write_sweep(seeds=[0, 1])
    submit_for(sweep)
    ends = ["aimscale: this job is too short", "worker ends: nothing is left", "started a\nKilled", "started b"]
    for i, end in enumerate(ends):
        (sweep.directory / "slurm" / f"1_{i}.out").write_text(f"noise\nworker begins: job 1_{i}\n{end}\n")
    (said,) = sweep_status(PlannedSweep(sweep), {}).failed_jobs
    assert "this job is too short (1 jobs" in said


def test_a_torn_line_of_the_record_of_jobs_breaks_nothing(write_sweep: Any, submitted: Any, tmp_path: Path) -> None:
    sweep = write_sweep()
    submit_for(sweep)
    record = slurm.submissions_file(sweep)
    for damage in ('{"job_id": "1", "num', "[]", "null", '{"job_id": 3}', "\x00", '{"number": {}}'):
        record.write_text(record.read_text() + damage + "\n")
    (tmp_path / "queue").write_text("1_0|PENDING|\n1_1|PENDING|")
    assert [job.info.job_id for job in live_jobs(sweep, slurm.jobs())] == ["1_0", "1_1"]
    assert not submit_for(sweep)


def test_a_launch_does_not_wait_without_bound_for_another_that_submits(
    write_sweep: Any, submitted: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    sweep = write_sweep()
    monkeypatch.setattr("aimscale.sweeps.slurm.jobs.SUBMISSION_TIMEOUT_S", 0.1)
    sweep.directory.mkdir(parents=True)
    with (
        hold_lock(sweep.directory / "slurm" / "lock"),
        pytest.raises(UserError, match="submits jobs of this sweep, for more than"),
    ):
        submit_for(sweep)
    assert "waiting for process" in caplog.text


def test_the_script_asks_for_nothing_that_no_one_asked_for(write_sweep: Any) -> None:
    """A site that enforces accounts refuses workload keys that it does not know."""
    sweep = write_sweep()
    (part,) = submit(PlannedSweep(sweep), allow_dirty=True, dry_run=True)
    options = re.findall(r"^#SBATCH --([a-z-]+)", part.script, re.M)
    known = ["job-name", "time", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "array", "output"]
    assert sorted(options) == sorted([*known, "open-mode", "requeue", "signal"])
