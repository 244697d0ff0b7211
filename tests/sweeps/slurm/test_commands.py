"""Parsing of Slurm's answers, odd ones among them; its commands are small programs here."""

from __future__ import annotations

from typing import Any

import pytest

from aimscale.sweeps.slurm import commands as slurm


def test_odd_lines_among_the_jobs_are_passed_over(program: Any) -> None:
    program("squeue", r"printf 'plugin says hello\n\n7|RUNNING|node\377\n8_2|PENDING|(Priority)\n9|\n'")
    found = slurm.jobs()
    assert {job_id: job.phase for job_id, job in found.items()} == {"7": "running", "8_2": "pending"}
    assert found["8_2"].reason == "Priority"


def test_a_state_that_is_unknown_here_has_not_ended_and_no_reason_steers_the_terminal(program: Any) -> None:
    program("squeue", r"printf '7|POWER_UP_NODE|\033]0;owned\007here\n8|PREEMPTED|\n'")
    found = slurm.jobs()
    assert {job_id: job.phase for job_id, job in found.items()} == {"7": "running", "8": "ended"}
    assert found["7"].reason == r"\x1b]0;owned\x07here"


def test_a_slurm_without_arrays_takes_single_jobs(program: Any) -> None:
    for size, longest in (("0", 1), ("1001", 1001)):
        program("scontrol", f"echo 'MaxArraySize            = {size}'")
        assert slurm.max_array_size() == longest


def test_accounting_that_does_not_answer_says_nothing(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program("squeue", "echo '6|RUNNING|node1'")
    assert slurm.job_states("67") == {"6": "RUNNING"}
    program("sacct", "echo '7|OUT_OF_MEMORY'; echo odd; echo '8|'; echo '9|CANCELLED by 0'")
    assert slurm.job_states("6789") == {"6": "RUNNING", "7": "OUT_OF_MEMORY", "9": "CANCELLED"}
    monkeypatch.setitem(slurm.command.__kwdefaults__, "timeout_s", 0.2)
    program("sacct", "exec sleep 20")
    assert slurm.job_states("7") == {}
    program("sacct", "printf '\\377'; exit 1")
    assert slurm.job_states("7") == {}


def test_a_run_keeps_off_nodes_where_it_failed_while_others_are_left(program: Any) -> None:
    program("sinfo", "echo a; echo b; echo c; echo a")
    assert slurm.nodes_to_exclude(["b", "gone"], None, 2) == ("b", "gone")
    assert slurm.nodes_to_exclude(["b", "c"], "main", 2) == ()
    assert slurm.nodes_to_exclude([], None, 1) == ()
