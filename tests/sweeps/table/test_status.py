from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aimscale.harness.probe.files import task_key, weights_name
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import write_json
from aimscale.sweeps.plan.costs import cost_cards
from aimscale.sweeps.plan.planner import Run, plan
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.table.status import SweepStatus, sweep_status
from aimscale.sweeps.table.views import new_console, status_table

PROBED: dict[str, Any] = {
    "model": {"image_size": 16, "patch_size": 4},
    "data": {"sources": [{"path": "data/train"}]},
    "optimiser": {"batch_size": 64},
    "validation": {"path": "data/validation"},
    "probes": [{"task": name, "train": f"data/{name}", "test": f"data/{name}-test"} for name in ("pets", "cars")],
}


@pytest.fixture(autouse=True)
def counted(tmp_path: Path) -> None:
    """Folders that say how many images they hold, so that evaluation has a price."""
    for name in ("validation", "pets", "cars"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "dataset.json").write_text('{"num_samples": 1000}')


def look(sweep: Any) -> SweepStatus:
    return sweep_status(sweep, plan(sweep), cost_cards(sweep, plan(sweep)))


def finish_task(run: Run, record: RunRecord, budget: int, task: str, kinds: Sequence[str]) -> None:
    """Leave the file of a task whose probes of these kinds are done, and the weights that it is of."""
    weights = record.model_file(budget)
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(b"weights")
    section = next(each for each in run.config.evaluation.probes if each.task == task)
    key = task_key(weights_name(record, run.config, budget), section, "train", "test", run.config.training.seed)
    document = {**key, "probes": [{"kind": kind} for kind in kinds]}
    write_json(record.probes_dir(budget) / f"{task}-{key['evaluation']}.json", document)


def test_evaluation_is_shown(write_sweep: Any, launch: Any, stand_in: Any, capsys: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"], base=PROBED)
    run = plan(sweep)[0]
    assert look(sweep).runs[0].to_evaluate == 4
    launch(sweep, devices=1, command=stand_in())
    record = RunRecord(sweep.run_dir(run.run_id))
    status = look(sweep)
    assert (status.runs[0].state, status.runs[0].evaluated) == ("finished", 0)
    for budget in run.budgets:
        for task in ("pets", "cars"):
            finish_task(run, record, budget, task, ["linear"])
    assert look(sweep).runs[0].evaluated == 0, "attentive ones are missing"
    for budget in run.budgets:
        for task in ("pets", "cars"):
            finish_task(run, record, budget, task, ["linear", "attentive"])
    assert look(sweep).runs[0].evaluated == 4
    RunDir(record.path).write_status(mfu=1.09)
    console = new_console()
    console.print(status_table(look(sweep), console.width))
    said = capsys.readouterr().out
    assert "4 of 4" in said
    assert "109 % (!)" in said, "no program is faster than the fastest product: the peak was measured too low"


def test_a_finished_run_that_is_extended_is_neither_finished_nor_to_be_collected(
    write_sweep: Any, launch: Any, stand_in: Any
) -> None:
    launch(write_sweep(sizes=["rung-32"]), devices=1, command=stand_in())
    longer = look(write_sweep(sizes=["rung-32"], budgets=[640, 1280, 6400]))
    assert (longer.runs[0].state, longer.runs[0].status.reason) == ("preempted", "to do: training at 6400")
    assert 0 < longer.progress < 1


def test_what_is_left_takes_as_long_as_what_is_done_on_the_devices_that_run(write_sweep: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2], budgets=[64_000], cost={"peak_tflops": 1e9, "step_ms": 10})
    runs = plan(sweep)
    card = cost_cards(sweep, runs)[0]
    record = RunRecord(RunRecord.create(sweep.run_dir(runs[0].run_id), runs[0].config).path)
    spent = {"attempt": 1, "ended": 1.0, "exit_code": 0, "where": "here", "saved": [1], "reason_class": None}
    record.append_attempt(**spent, reason=None, device_hours=card.training_s / 3600)
    record.write_status(state="running", images_done=card.images_executed // 2)
    assert look(sweep).eta_s is None
    with record.hold():
        assert look(sweep).eta_s == pytest.approx(5 * card.training_s, rel=1e-3)
