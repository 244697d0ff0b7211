"""Lines of metrics: cut back exactly, means over applied steps, spikes named, state restored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aimscale.harness.device.distributed import Group, Placement
from aimscale.harness.log.lines import JsonLines
from aimscale.harness.log.metrics import SPIKE_WINDOW, StepLog
from aimscale.harness.step.engine import StepOutcome

ALONE = Group(
    Placement(rank=0, world_size=1, local_rank=0, address="127.0.0.1", port=0), torch.device("cpu"), host_group=None
)


def add(log: StepLog, step: int, loss: float, *, in_tail: bool = False) -> None:
    is_finite = torch.isfinite(torch.tensor(loss)).item()
    outcome = StepOutcome(
        loss_sum=torch.tensor(10 * loss), grad_norm=torch.tensor(2 * loss), was_applied=bool(is_finite)
    )
    log.add(outcome, images_seen=8 * step, lr=0.1, num_targets=10, in_tail=in_tail)


def test_lines_are_cut_back_to_what_a_checkpoint_knew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1})
    size = lines.sync()
    lines.write({"step": 2})
    lines.close()
    again = JsonLines(path, size)
    again.write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]
    with pytest.raises(ValueError, match="not JSON compliant"):
        again.write({"loss": float("nan")})


def test_a_line_means_over_applied_steps(tmp_path: Path) -> None:
    log = StepLog(ALONE)
    for step, loss in ((1, 1.0), (2, float("inf")), (3, 3.0)):
        add(log, step, loss)
    line = log.line(8, None, 1)
    assert line == {
        "images_seen": 24, "step": 3, "branch": None, "loss": 2.0, "loss_max": 3.0, "grad_norm": 4.0, "lr": 0.1,
        "num_skipped_steps": 1, "loss_spikes": [],
    }  # fmt: skip
    add(log, 4, float("nan"))
    assert log.line(8, None, 2)["loss"] is None


def test_state_brings_back_what_is_in_no_line_yet() -> None:
    log, copy = StepLog(ALONE), StepLog(ALONE)
    add(log, 1, 1.0, in_tail=True)
    add(log, 2, 2.0, in_tail=True)
    copy.restore(json.loads(json.dumps(log.state())))
    for each in (log, copy):
        add(each, 3, 6.0, in_tail=True)
    assert copy.line(8, 24, 0) == log.line(8, 24, 0)
    assert copy.train_loss() == log.train_loss() == 3.0
    log.start_segment()
    assert log.train_loss() is None


def test_a_spike_is_named_once_there_is_something_to_compare_with() -> None:
    log = StepLog(ALONE)
    add(log, 0, 50.0)
    assert log.line(8, None, 0)["loss_spikes"] == []
    for step in range(1, SPIKE_WINDOW + 2):
        add(log, step, 1.0 + 0.01 * (step % 2))
    add(log, 500, 1.3)
    assert log.line(8, None, 0)["loss_spikes"] == [4000]
