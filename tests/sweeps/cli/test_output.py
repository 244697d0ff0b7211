"""Output of the verbs of a sweep: notices, keys and values, and the next command."""

from __future__ import annotations

import functools
import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from aimscale.sweeps.cli.main import main
from aimscale.sweeps.cli.plan_view import print_plan
from aimscale.sweeps.engine import launch as engine
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.run import problem
from aimscale.sweeps.planning.sweepfile import PRESETS, load_sweep
from aimscale.sweeps.slurm.commands import submissions_file
from aimscale.sweeps.state.planned_sweep import PlannedSweep


@pytest.fixture
def say(capsys: Any, write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a verb on a sweep whose runs end at once, and return what it prints."""
    sweep = write_sweep(sizes=["rung-32"])
    monkeypatch.setattr("aimscale.sweeps.cli.plan.check", lambda *_: ())
    monkeypatch.setattr("aimscale.sweeps.cli.launch.raise_on_problems", lambda *_: None)

    def run(verb: str, *options: str, behaviour: str = "finish") -> list[str]:
        monkeypatch.setattr(engine, "launch", functools.partial(launch, command=stand_in(behaviour)))
        with pytest.raises(SystemExit):
            main([verb, str(sweep.source), "--root", str(sweep.root), *options])
        return str(capsys.readouterr().out).splitlines()

    return run


def test_verbs_end_with_what_to_run_next_on_the_users_own_sweep(say: Any, write_sweep: Any, monkeypatch: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    (run,) = plan(sweep)
    file, root = sweep.source, sweep.root

    def follows(*call: str, **options: str) -> str:
        last = say(*call, **options)[-1]
        assert last.startswith("next: aimscale "), last
        return str(last.removeprefix("next: aimscale "))

    assert follows("plan") == f"launch {file} --root {root}" == follows("status") == follows("launch", "--dry-run")
    assert follows("launch", behaviour="crash") == f"logs {file} {run.run_id} --root {root}" == follows("status")
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert follows("launch", behaviour="crash") == f"logs {file} {run.run_id} --root {root}"
    assert follows("launch") == f"logs {file} {run.run_id} --root {root}", "two nodes were tried"
    assert follows("launch", "--dry-run") == f"logs {file} {run.run_id} --root {root}"
    assert follows("launch", "--dry-run", "--retry") == f"launch {file} --retry --root {root}"
    over = f"report {sweep.directory}"
    assert follows("launch", "--retry") == over == follows("launch", "--dry-run") == follows("collect")
    assert follows("status") == over == follows("plan"), "the folder, which needs no --root"
    write_sweep(sizes=["rung-32"], slurm={})
    assert follows("launch", "--dry-run", "--allow-dirty") == over
    monkeypatch.setattr("aimscale.sweeps.engine.slurm_worker.launch_slurm", lambda *_, **__: [])
    assert follows("launch") == over, "no job was needed"
    for verb in ("plan", "status"):
        json.loads("\n".join(say(verb, "--json")))


def test_the_summary_comes_first_then_the_failed_run_then_the_table(say: Any) -> None:
    say("launch", behaviour="crash")
    said = say("status")
    assert [line.split()[0] for line in (*said[:5], said[-1])] == ["runs", "done", "spent", "paused", "run", "next:"]
    assert "RuntimeError: the user's code is wrong; `aimscale launch` resumes it" in said[3]


def test_slurm_is_asked_about_sweeps_that_were_submitted_alone(
    say: Any, write_sweep: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("aimscale.sweeps.cli.sweep.slurm.try_list_jobs", lambda: asked.append(1))
    say("launch")
    say("status")
    assert not asked
    file = submissions_file(write_sweep(sizes=["rung-32"]))
    file.parent.mkdir()
    say("status")
    assert not asked, "a launch that Slurm refused leaves the folder"
    file.touch()
    say("status")
    assert asked


@pytest.mark.parametrize("width", [80, 120, 1000])
@pytest.mark.parametrize("name", ["demo", "aim-paper", "isoflop"])
def test_a_plan_fits_a_terminal_with_its_flags_first(name: str, width: int, tmp_path: Any) -> None:
    sweep = load_sweep(PRESETS / f"{name}.yaml", tmp_path)
    runs = plan(sweep)
    console = Console(width=width, file=io.StringIO())
    notice = problem("data.sources", "some folder does not exist").of(runs[0].run_id)
    print_plan(PlannedSweep(sweep), console, problems=[notice])
    _, *said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    keys = [line.split()[0] for line in said if not line.startswith(" ")]
    assert keys[0] == "fail"
    assert next(key for key in keys if key not in ("fail", "warn")) == "size"
    assert keys[-6:] == ["runs", "training", "evaluation", "time", "disk", "assumed"]
    assert max(map(len, said)) <= width
    (header,) = (re.split(r"\s{2,}", line.strip()) for line in said if line.startswith("size "))
    assert len(header) <= 11
    if width > 80:  # a user decides by these; what is alike in all runs is told once
        assert {"params", "images", "FLOPs", "memory", "step, ms", "time", "device-h"} <= {*header}
    told = " ".join(" ".join(said).split())
    alike = {"demo": "batch 32, lr 0.0036, devices 1", "aim-paper": "batch 4096, lr 0.001", "isoflop": "devices 8"}
    assert f"; each with {alike[name]} " in told
    assert not {*re.findall(r"(\w+) [\d.]+", alike[name])} & {*header}
    for header in ("memory", "step, ms"):
        shown = any(header in line and line.startswith("size ") for line in said)
        assert shown == any(line.startswith(f"{header}: ") for line in said), "a legend explains a column that is shown"
