"""What is made of Slurm's answers, odd ones among them; its commands are small programs here."""

from __future__ import annotations

from pathlib import Path

import pytest

from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.record import own_claim


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Make a command of Slurm's that executes these lines of shell."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    return make


def test_odd_lines_among_the_jobs_are_passed_over(program: object) -> None:
    program("squeue", r"printf 'plugin says hello\n\n7|RUNNING|node\377\n8_2|PENDING|(Priority)\n9|\n'")  # type: ignore[operator]
    found = slurm.jobs()
    assert {job_id: job.phase for job_id, job in found.items()} == {"7": "running", "8_2": "pending"}
    assert found["8_2"].reason == "Priority"


def test_accounting_that_does_not_answer_says_nothing(program: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.ended_states(["7"]) == {}
    program("sacct", "echo '7|OUT_OF_MEMORY'; echo odd; echo '8|'; echo '9|CANCELLED by 0'")  # type: ignore[operator]
    assert slurm.ended_states(["7", "8", "9"]) == {"7": "OUT_OF_MEMORY", "9": "CANCELLED"}
    monkeypatch.setitem(slurm.command.__kwdefaults__, "timeout_s", 0.2)
    program("sacct", "exec sleep 20")  # type: ignore[operator]
    assert slurm.ended_states(["7"]) == {}
    program("sacct", "printf '\\377'; exit 1")  # type: ignore[operator]
    assert slurm.ended_states(["7"]) == {}


def test_a_run_that_waits_in_slurm_is_slurms_until_its_job_is_gone(program: object, tmp_path: Path) -> None:
    """Also one that was submitted after a launch last asked, or while Slurm does not answer."""
    ask, claim = slurm.Queued(), own_claim("slurm", 1, "7")
    newer = own_claim("slurm", 1, "8")
    program("squeue", "echo '7|PENDING|(None)'")  # type: ignore[operator]
    assert ask(claim)
    assert not ask(newer)
    program("squeue", "echo '7|PENDING|(None)'; echo '8|PENDING|(None)'")  # type: ignore[operator]
    assert ask(newer)
    program("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")  # type: ignore[operator]
    assert slurm.Queued()(claim)
    program("squeue", "echo '7|CANCELLED|(None)'")  # type: ignore[operator]
    assert not slurm.Queued()(claim)
    (tmp_path / "squeue").unlink()
    assert slurm.Queued()(claim)


@pytest.mark.parametrize(
    ("most", "sizes", "limits", "lanes"),
    [
        (256, [3, 2], [3, 2], [0, 1]),
        (4, [10, 1], [3, 1], [0, 1]),
        (5, [10, 10], [3, 2], [0, 1]),
        (2, [4, 4, 4], [1, 1, 1], [0, 1, 0]),
        (7, [], [], []),
    ],
)
def test_a_sweeps_limit_is_shared_out_to_its_arrays(
    most: int, sizes: list[int], limits: list[int], lanes: list[int]
) -> None:
    found = slurm.turns(most, sizes)
    assert [turn.limit for turn in found] == limits
    assert [turn.lane for turn in found] == lanes
    assert sum({turn.lane: turn.limit for turn in found}.values()) <= most
