"""Lines of metrics: appended whole, means over applied steps, spikes named, state restored."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from aimscale.harness.log.record import SPIKE_WINDOW, Metrics, TrainedStep
from aimscale.harness.run.files import append_line
from aimscale.harness.run.schedule import Segment


def metrics(branch: int | None = None) -> Metrics:
    made = Metrics(batch_size=8)
    made.enter(Segment(start=0, stop=24, branch=branch))
    return made


def add(log: Metrics, step: int, loss: float) -> None:
    known = loss if math.isfinite(loss) else None
    taken = TrainedStep(
        images_seen=8 * step,
        lr=0.1,
        num_targets=10,
        was_applied=known is not None,
        loss=known,
        grad_norm=None if known is None else 2 * known,
    )
    log.count(taken)
    log.add(taken)


def test_a_line_is_whole_behind_what_a_kill_left_of_another(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    append_line(path, {"step": 2})
    with path.open("a") as file:
        file.write('{"step": 3, "bra')
    append_line(path, {"step": 4})
    assert [text for text in path.read_text().splitlines() if text.endswith("}")] == [
        '{"step": 1}', '{"step": 2}', '{"step": 4}',
    ]  # fmt: skip
    path.unlink()
    append_line(path, {"step": 5})
    assert json.loads(path.read_text()) == {"step": 5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_line(path, {"loss": float("nan")})


def test_a_line_means_over_applied_steps() -> None:
    log = metrics()
    for step, loss in ((1, 1.0), (2, float("inf")), (3, 3.0)):
        add(log, step, loss)
    assert log.line() == {
        "images_seen": 24, "step": 3, "branch": None, "loss": 2.0, "loss_max": 3.0, "grad_norm": 4.0, "lr": 0.1,
        "num_skipped_steps": 1, "loss_spikes": [],
    }  # fmt: skip
    add(log, 4, float("nan"))
    assert log.line()["loss"] is None
    assert (log.images_done, log.consecutive_skipped, log.total.num_skipped_steps) == (32, 1, 2)


def test_a_spike_is_named_once_there_is_something_to_compare_with() -> None:
    log = metrics()
    add(log, 0, 50.0)
    assert log.line()["loss_spikes"] == []
    for step in range(1, SPIKE_WINDOW + 2):  # mean 1, standard deviation .01
        add(log, step, 1.0 + 0.01 * (-1) ** step)
    add(log, 500, 1.059)
    add(log, 501, 1.09)
    assert log.line()["loss_spikes"] == [4008], "six standard deviations, and neither five nor nine"
    assert log.trunk.num_loss_spikes == 1


def test_a_budgets_loss_is_the_mean_of_its_last_twentieth() -> None:
    log = metrics(branch=800)
    for step in range(81, 101):
        add(log, step, float(step))
    assert log.train_loss == (96 + 97 + 98 + 99 + 100) / 5


def test_a_state_is_restored_and_so_is_that_of_an_earlier_version() -> None:
    log = metrics(branch=800)
    for step in range(90, 99):
        add(log, step, float(step))
    state = json.loads(json.dumps(dataclasses.asdict(log)))
    earlier = {key: value for key, value in state.items() if key not in ("batch_size", "segment")}
    for saved in (state, earlier):
        again = metrics(branch=800)
        again.restore(saved)
        again.enter(dataclasses.replace(log.segment, resumes=True))
        for each in (log, again):
            assert (each.images_done, each.train_loss, each.recent) == (72, 97.0, [float(i) for i in range(90, 99)])
        assert again.steps == log.steps
