from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aimscale.harness.run.directory import (
    EXIT_CRASHED,
    EXIT_DIVERGED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    SHARED,
)
from aimscale.harness.run.lock import Holder, Lock
from aimscale.sweeps.state import attempts
from aimscale.sweeps.state.attempts import clear_failure, may_retry, record_end, record_lost_attempt
from aimscale.sweeps.state.record import RunRecord


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    (tmp_path / "sweep" / "runs").mkdir(parents=True)
    return RunRecord(tmp_path / "sweep" / "runs" / "run")


def attempt(record: RunRecord, exit_code: int, *, saves: int = 0, nodes: Sequence[str] = (), **status: Any) -> str:
    """Record an attempt that saves a checkpoint at `saves` images and ends with `exit_code`."""
    record.write_status(state="running", reason=None, reason_class=None, claim="mine")
    if saves:
        record.checkpoint_dir(saves).mkdir(parents=True)
    if status:
        record.write_status(**status)
    return record_end(record, 1, exit_code, claims=("mine", None), stop_requested=False, nodes=nodes)


def test_time_limits_are_bounded_by_progress_alone(record: RunRecord) -> None:
    for images in range(100, 1100, 100):
        assert attempt(record, EXIT_PREEMPTED, saves=images) == "preempted"
    assert [attempt(record, EXIT_PREEMPTED) for _ in range(2)] == ["preempted", "failed"]
    assert record.read_status().reason_class == "timeout"
    assert "slurm.time_limit_min" in str(record.read_status().reason)


LOST = "another rank is gone or stands still, and its own entry in logs/ may say why"
TERMINATED = "srun: error: node-1: task 0: Terminated"
FIRST_EXITED = "srun: error: node-1: task 0: Exited with exit code 1"
SECOND_EXITED = "srun: error: node-2: task 1: Exited with exit code 1"
CRASHED = "srun: error: node-2: tasks 8-15: Segmentation fault"


@pytest.mark.parametrize(
    ("nodes", "failed_on", "log", "outcome", "failed_nodes"),
    [
        (["node-1"], None, "", "released", ["node-1"]),
        (["node-1"], "node-2", "", "released", ["node-2"]),
        (["node-1"], SHARED, "", "retry", []),
        (["node-1", "node-2"], "node-2", f"{TERMINATED}\n", "released", ["node-2"]),
        (["node-1", "node-2"], None, f"{SECOND_EXITED}\n{TERMINATED}", "released", ["node-2"]),
        (["node-1", "node-2"], None, f"{CRASHED}\n{TERMINATED}\n{LOST}", "released", ["node-2"]),
        # node-2 stands still, and node-1 is the first to say so
        (["node-1", "node-2"], None, f"{FIRST_EXITED}\n{LOST}", "retry", []),
        (["node-1", "node-2"], None, "srun: error: node-[1-2]: tasks 0-1: Exited with exit code 1", "retry", []),
        (["node-1", "node-2"], None, "", "retry", []),
    ],
)  # fmt: skip
def test_an_early_failure_is_given_to_others_than_the_node_that_failed_first(
    record: RunRecord, nodes: list[str], failed_on: str | None, log: str, outcome: str, failed_nodes: list[str]
) -> None:
    reason = LOST if LOST in log else "r"
    record.write_status(state="failed", reason=reason, reason_class="node", failed_on=failed_on, claim="mine")
    record.logs.mkdir(parents=True)
    record.attempt_log(1).write_text(log)
    claims = ("mine", None)
    ended = record_end(record, 1, EXIT_CRASHED, claims=claims, stop_requested=False, nodes=nodes, is_early=True)
    assert (ended, record.failed_nodes()) == (outcome, failed_nodes)


def test_being_stopped_by_a_person_never_counts(record: RunRecord) -> None:
    for _ in range(5):
        for code in (-signal.SIGTERM, -signal.SIGKILL):
            assert record_end(record, 1, code, claims=("mine", None), stop_requested=True) == "preempted"


def test_processes_that_still_die_with_their_run_hold_it_no_more(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = iter([True, True, False])
    monkeypatch.setattr(RunRecord, "is_held", lambda _: next(held))
    assert attempt(record, -signal.SIGKILL) == "retry"
    monkeypatch.setattr(RunRecord, "is_held", lambda _: True)
    monkeypatch.setattr(attempts, "RANK_EXIT_TIMEOUT_S", 0.2)
    assert [attempt(record, code) for code in (-signal.SIGKILL, EXIT_CRASHED)] == ["claim lost", "claim lost"]


@pytest.mark.parametrize(
    ("exit_code", "status", "kind", "outcomes"),
    [
        (EXIT_CRASHED, {}, "code", ["retry", "failed"]),
        (
            EXIT_CRASHED,
            {"state": "failed", "reason": "r", "reason_class": "node"},
            "node",
            ["retry", "retry", "failed"],
        ),
        (EXIT_CRASHED, {"state": "failed", "reason": "r", "reason_class": "oom"}, "oom", ["retry", "failed"]),
        (EXIT_CRASHED, {"state": "preempted"}, "timeout", ["preempted", "preempted", "failed"]),
        (EXIT_PREEMPTED, {"state": "failed", "reason": "r", "reason_class": "data"}, "data", ["failed"]),  # by srun
        (128 + signal.SIGKILL, {}, "oom", ["retry", "failed"]),
        (EXIT_USER_ERROR, {"state": "failed", "reason": "r", "reason_class": "data"}, "data", ["failed"]),
        (EXIT_USER_ERROR, {}, "config", ["failed"]),
        (EXIT_DIVERGED, {"state": "diverged", "reason": "r", "reason_class": "nan"}, "nan", ["failed"]),
        (-signal.SIGKILL, {}, "oom", ["retry", "failed"]),
        (-signal.SIGSEGV, {}, "code", ["retry", "failed"]),
    ],
)
def test_each_end_has_its_class_and_its_bound(
    record: RunRecord, exit_code: int, status: dict[str, Any], kind: str, outcomes: list[str]
) -> None:
    assert [attempt(record, exit_code, **status) for _ in outcomes] == outcomes
    assert record.read_status().reason_class == kind
    assert not may_retry(record.read_attempts(), kind)
    clear_failure(record)
    assert may_retry(record.read_attempts(), kind)
    assert attempt(record, EXIT_FINISHED) == "finished"


WATCHDOG = """\
[rank{rank}]:[E1130 03:57:41.19 ProcessGroupNCCL.cpp:629] [Rank {rank}] Watchdog caught collective operation timeout: \
WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=100000) ran for 100004 milliseconds.
terminate called after throwing an instance of 'c10::DistBackendError'
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x98 (0x7f in /opt/lib/libc10.so)
"""
TIMED_OUT = WATCHDOG.format(rank=1)
ABORTED = "srun: error: node-2: task 1: Aborted (core dumped)"


@pytest.mark.parametrize(
    ("exit_code", "status", "failure", "log", "reason", "kind"),
    [
        (137, {}, (1, -9), "", "rank 1 was killed by the system", "oom"),
        (1, {}, (1, 1), "NameError: uuid\n", "NameError: uuid", "code"),
        (1, {}, (1, 1), "", "ended with exit code 1", "code"),
        (139, {}, (1, -11), "frame #0", "rank 1 was ended with signal 11: frame #0", "code"),
        (139, LOST, (1, -11), "", "rank 1 was ended with signal 11", "node"),
        (137, LOST, (1, -9), "", "rank 1 was killed by the system", "oom"),
        (137, "disk is full", (1, -9), "", "disk is full", "node"),
        # NCCL's watchdog aborts ranks, of which no Python tells
        (134, {}, (1, -6), TIMED_OUT, "rank 1 was ended by NCCL, as it waited for another in vain", "node"),
        (134, LOST, (1, -6), TIMED_OUT, "rank 1 was ended by NCCL, as it waited for another in vain", "node"),
        (134, {}, (1, -6), "double free or corruption", "rank 1 was ended with signal 6: double free", "code"),
        (134, {}, None, f"{TIMED_OUT}{ABORTED}", "a rank on node-2 was ended by NCCL", "node"),
        (1, LOST, None, "srun: error: node-2: task 1: Killed", "a rank on node-2 was killed by the system", "oom"),
        (1, LOST, None, f"{FIRST_EXITED}\nsrun: error: node-2: task 1: Killed", LOST, "node"),
    ],
)
def test_the_rank_that_failed_first_is_named_and_its_reason_told(
    record: RunRecord, exit_code: int, status: Any, failure: tuple[int, int] | None, log: str, reason: str, kind: str
) -> None:
    record.logs.mkdir(parents=True)
    record.attempt_log(1).write_text(log)
    if failure:
        record.failed_rank(1).write_text(json.dumps({"rank": failure[0], "exit_code": failure[1], "time": 0.0}))
    written = {"state": "failed", "reason": status, "reason_class": "node"} if status else {}
    assert attempt(record, exit_code, nodes=["node-1"] if failure else ["node-1", "node-2"], **written) == "retry"
    found = record.read_status()
    assert str(found.reason).startswith(reason)
    assert found.reason_class == kind
    assert record.failed_nodes() == (["node-1"] if failure and kind == "node" else []), "another node is to try"


def test_reasons_that_take_turns_are_bounded_like_one(record: RunRecord) -> None:
    node = {"state": "failed", "reason": "r", "reason_class": "node"}
    oom = {"state": "failed", "reason": "r", "reason_class": "oom"}
    assert [attempt(record, EXIT_CRASHED, **kind) for kind in (node, oom)] == ["retry", "failed"]
    clear_failure(record)
    outcomes = [attempt(record, EXIT_PREEMPTED), attempt(record, EXIT_CRASHED, **node), attempt(record, EXIT_PREEMPTED)]
    assert outcomes == ["preempted", "retry", "failed"]


@pytest.mark.parametrize("name", ["budgets/640/model.safetensors", "validation/640.npz", "probes/640/pets.json"])
def test_evaluation_and_its_parts_are_progress(record: RunRecord, name: str) -> None:
    """A run that is interrupted repeatedly while it evaluates continues as long as evaluation makes progress."""
    assert attempt(record, EXIT_CRASHED) == "retry"
    (record.path / name).parent.mkdir(parents=True)
    (record.path / name).write_text("")
    assert [attempt(record, EXIT_CRASHED) for _ in range(2)] == ["retry", "failed"]


@pytest.mark.parametrize(
    ("job_state", "output", "state", "kind"),
    [
        ("NODE_FAIL", "", "failed", "node"),
        ("TIMEOUT", "", "failed", "timeout"),
        ("OUT_OF_MEMORY", "", "failed", "oom"),
        ("FAILED", "worker begins: x\nslurmstepd: error: Detected 1 oom_kill event in StepId=1.0", "failed", "oom"),
        ("FAILED", "exceeded memory limit\nworker begins: x\nTraceback", "failed", "code"),
        ("CANCELLED by 0", "", "preempted", "interrupted"),
        ("PREEMPTED", "", "preempted", "interrupted"),
        ("PENDING", "", "preempted", "interrupted"),
        (None, "", "failed", "node"),
    ],
)
def test_jobs_that_left_no_word_are_diagnosed(
    record: RunRecord, job_state: str | None, output: str, state: str, kind: str | None
) -> None:
    record.write_status(state="running")
    record.job_log("7").parent.mkdir(parents=True)
    record.job_log("7").write_text(output)
    worker = Holder(facts={"job_id": "7", "devices": 1, "nodes": "node3"})
    record_lost_attempt(record, worker, job_state)
    status = record.read_status()
    assert (status.state, status.reason_class) == (state, kind if state == "failed" else None)
    assert [ended["reason_class"] for ended in record.read_attempts()] == [kind]
    assert record.failed_nodes() == (["node3"] if kind == "node" else [])
    record_lost_attempt(record, worker, "NODE_FAIL")
    assert record.read_status() == status  # what was said first stays
    clear_failure(record)
    assert record.failed_nodes() == []


@pytest.mark.parametrize(("state", "claim"), [("finished", "theirs"), ("running", "theirs")])
def test_a_worker_that_wakes_up_after_another_took_the_run_writes_nothing(
    record: RunRecord, state: str, claim: str
) -> None:
    record.write_status(state=state, claim=claim)
    before = record.read_status()
    assert record_end(record, 1, EXIT_CRASHED, claims=("mine", "before"), stop_requested=False) == "claim lost"
    assert (record.read_status(), record.read_attempts()) == (before, [])


def test_a_line_of_an_attempt_that_was_cut_off_takes_no_other_with_it(record: RunRecord) -> None:
    record.write_status(state="failed", reason="", reason_class="code")
    for _ in range(2):
        with record.attempts.open("a") as file:
            file.write('{"attempt": 1, "en')
        clear_failure(record)
    assert [ended["forgiven"] for ended in record.read_attempts()] == [True, True]


def test_a_run_that_takes_its_launcher_with_it_is_not_tried_for_ever(record: RunRecord) -> None:
    """A container that runs out of memory kills both."""
    for num in (1, 2, 3):
        worker = Holder(facts={"job_id": None, "devices": 2})
        lock = Lock(record.claim)
        lock.take(**worker.facts)
        lock.release()
        with record.hold():
            record.write_start()
            record.write_status(started=1e6 * num, heartbeat=1e6 * num + 1800)
            record_lost_attempt(record, worker, None)
            assert record.read_status().state == "running", "it lives"
        record_lost_attempt(record, worker, None)
        record_lost_attempt(record, worker, None)
        assert (record.read_status().state, len(record.read_attempts())) == ("failed", num)
        assert record.read_attempts()[-1]["device_hours"] == pytest.approx(1.0), "up to its last sign of life"
        assert may_retry(record.read_attempts(), "node") == (num < 3)


def test_restarts_are_paid_for_and_bounded_by_progress(record: RunRecord) -> None:
    """Slurm starts the jobs of a node that goes down again, and a run may be what takes it down."""
    worker = Holder(facts={"job_id": "7", "devices": 2, "nodes": "node3"})
    lock = Lock(record.claim)
    lock.take(**worker.facts)
    lock.release()
    for num in range(1, 9):
        record.write_status(state="running", started=1e6 * num, heartbeat=1e6 * num + 1800, claim="mine")
        if num == 2:
            record.checkpoint_dir(100).mkdir(parents=True)
        if num < 8:
            record_lost_attempt(record, worker, "RUNNING")
        else:
            code = -signal.SIGTERM
            assert (
                record_end(record, 1, code, claims=("mine", None), stop_requested=False, is_interrupted=True)
                == "failed"
            )
        assert record.read_status().state == ("preempted" if num < 7 else "failed")
        if num == 7:
            assert "stopped 6 times before it saved anything new" in str(record.read_status().reason)
    assert [ended["device_hours"] for ended in record.read_attempts()][:7] == [pytest.approx(1.0)] * 7
    assert may_retry(record.read_attempts(), "node"), "no fault of a node is held against it"


def test_a_job_that_a_person_cancels_is_no_time_limit(record: RunRecord) -> None:
    claims = ("mine", None)
    for _ in range(4):
        record.write_status(state="preempted", reason="stopped by a signal", claim="mine")
        options: dict[str, Any] = {"claims": claims, "stop_requested": False, "is_interrupted": True}
        assert record_end(record, 1, EXIT_PREEMPTED, **options) == "preempted"
    assert may_retry(record.read_attempts(), "timeout")


def test_device_hours_count_after_a_clock_was_set_back(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = []
    for now, started in ((90_000.0, 86_400.0), (10_800.0, 3_600.0), (10_900.0, 3_600.0)):  # the last one never started
        monkeypatch.setattr("time.time", lambda now=now: now)
        attempt(record, EXIT_CRASHED, started=started)
        hours.append(record.read_attempts()[-1]["device_hours"])
    assert hours == [1.0, 2.0, 0.0]
