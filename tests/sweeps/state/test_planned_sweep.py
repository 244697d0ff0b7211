from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest

from aimscale.sweeps.cli.main import main
from aimscale.sweeps.engine import launch as engine
from aimscale.sweeps.planning import aim_run, planner
from aimscale.sweeps.planning.sweepfile import SweepError
from aimscale.sweeps.state import planned_sweep
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count expansions of a sweep file, prices of a run, and looks of a verb at a run."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str, what: str) -> None:
        function = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counted[what] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    count(planner, "_planned_runs", "plans")
    count(aim_run, "card_of", "prices")
    count(planned_sweep, "read_state", "looks")
    return counted


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        (["plan"], (1, 2, 2)),
        (["launch", "--dry-run"], (1, 2, 2)),
        (["launch", "--dry-run", "--retry"], (1, 2, 2)),
        (["launch"], (1, 2, 6)),  # before, for its first line of progress, and after
        (["status"], (1, 2, 2)),
        (["status", "--wait"], (1, 2, 12)),  # five looks without a worker in between
        (["cancel"], (1, 0, 2)),
        (["collect"], (1, 2, 0)),
        (["logs", "rung-32"], (1, 0, 0)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_verb_plans_prices_and_looks_once(
    verb: list[str], expected: tuple[int, int, int], calls: Counter[str], write_sweep: Any, launch: Any, stand_in: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    run, _ = PlannedSweep(sweep).runs
    record = RunRecord(RunRecord.create(sweep.run_dir(run.run_id), run.config).path)
    record.logs.mkdir()
    record.attempt_log(1).touch()
    monkeypatch.setattr("aimscale.sweeps.cli.status_view.LOOK_INTERVAL_S", 0.0)
    monkeypatch.setattr("aimscale.sweeps.cli.status_view.MAX_LOOK_SHARE", 1.0)
    monkeypatch.setattr("aimscale.sweeps.cli.launch.raise_on_problems", lambda *_: None)
    monkeypatch.setattr("aimscale.sweeps.cli.plan.check", lambda *_: ())
    monkeypatch.setattr("aimscale.sweeps.cli.status_view.LOG_INTERVAL_S", 1e9)
    monkeypatch.setattr(engine, "launch", functools.partial(launch, command=stand_in()))
    calls.clear()
    name, *options = verb
    with pytest.raises(SystemExit):
        main([name, str(sweep.source), *options, "--root", str(sweep.root)])
    assert (calls["plans"], calls["prices"], calls["looks"]) == expected


def test_finished_runs_are_looked_at_once_and_others_again(write_sweep: Any, launch: Any, stand_in: Any) -> None:
    planned = PlannedSweep(write_sweep(sizes=["rung-32"]))
    assert [each.state for each in planned.states] == ["not started"]
    launch(planned, devices=1, command=stand_in())
    assert [each.state for each in planned.states] == ["not started"], "as they were read last"
    assert [each.state for each in planned.look()] == ["finished"]
    assert planned.look()[0] is planned.states[0]


def test_a_launch_starts_the_longest_runs_first(write_sweep: Any) -> None:
    planned = PlannedSweep(write_sweep(sizes=["rung-32", "rung-64", "rung-48"]))
    assert [run.cell["size"] for run in planned.runs] == ["rung-32", "rung-64", "rung-48"]
    assert [run.cell["size"] for run in planned.longest_first] == ["rung-64", "rung-48", "rung-32"]
    assert planned.startable() == planned.longest_first


def test_a_run_that_is_no_longer_planned_is_named(write_sweep: Any) -> None:
    planned = PlannedSweep(write_sweep())
    assert planned.of_run(planned.runs[1].run_id).runs == planned.runs[1:]
    with pytest.raises(SweepError, match="old-run is no longer planned"):
        planned.of_run("old-run")
