from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import running_slurm

from aimscale.sweeps import launch
from aimscale.sweeps.engine.slurm_worker import launch_slurm
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import Sweep, load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.submit import Submission
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord

Losses = dict[str, list[tuple[int, float]]]

HERE = Path(__file__).parent
PATIENCE_S = 400
"""For what must happen; a busy machine needs minutes for what takes seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(3 * PATIENCE_S))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """Start a Slurm for each test process and return its folder."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    with running_slurm(27000 + 400 * worker) as folder:
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        os.environ["DS_ACCELERATOR"] = "cpu"
        yield folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, write_images: Any) -> Path:
    """Pack folders `train` and `validation` of small images."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, number) in enumerate({"train": 96, "validation": 16}.items()):
        write_images(folder / name, number, seed=seed, side=20)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory, write_images: Any) -> Path:
    """Pack folders `train` and `test` of red and blue images."""
    folder = tmp_path_factory.mktemp("labelled")
    for seed, (name, number) in enumerate({"train": 24, "test": 12}.items()):
        write_images(folder / name, number, seed=seed, classes=("red", "blue"))
    return folder


@dataclass(kw_only=True)
class Fault:
    """Sweep on the cluster, with methods that wait for its states and read its results."""

    sweep: Sweep
    runs: list[Run]

    @property
    def records(self) -> list[RunRecord]:
        return [RunRecord(self.sweep.run_dir(run.run_id)) for run in self.runs]

    def launch(self, **options: Any) -> list[Submission]:
        return launch_slurm(PlannedSweep(self.sweep), allow_dirty=True, **options)

    def job(self, index: int = 0) -> str:
        """Return the id of the Slurm job that executes a run, or did last."""
        worker = self.records[index].claimant()
        assert worker is not None
        return str(worker.facts["job_id"])

    def ends(self) -> list[list[int | None]]:
        """Return the exit codes of the attempts of each run."""
        return [[ended.get("exit_code") for ended in record.read_attempts()] for record in self.records]

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.time() + PATIENCE_S
        while time.time() < deadline:
            if value := condition():
                return value
            time.sleep(0.2)
        paths = [*self.sweep.directory.rglob("*.log"), *self.sweep.directory.rglob("*.out")]
        logs = "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in sorted(paths))
        states = [(record.read_status(), record.is_claimed()) for record in self.records]
        pytest.fail(f"{what} did not happen within {PATIENCE_S} s: {states} {slurm.jobs()}\n{logs}")

    def wait_trained(self) -> None:
        """Wait until all runs have a checkpoint and train beyond it."""
        self.wait(
            lambda: all(record.is_held() and any(record.checkpoints.glob("[0-9]*")) for record in self.records),
            "a first checkpoint of each run",
        )

    def wait_state(self, *states: str) -> None:
        self.wait(lambda: all(record.read_status().state in states for record in self.records), f"state {states}")

    def wait_empty_queue(self) -> None:
        """Wait until no job of any kind is left: a fault must leave nothing behind."""
        self.wait(lambda: all(job.phase == "ended" for job in slurm.jobs().values()), "an empty queue")

    def losses(self) -> Losses:
        return {r.path.name: [(row["images_seen"], row["val_loss"]) for row in r.read_rows()] for r in self.records}


def sweep_values(data: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "faults",
        "sizes": ["rung-32"],
        "budgets": [160, 320],
        "base": {
            "model": {"image_size": 16, "patch_size": 4},
            "data": {"sources": [{"path": str(data / "train")}]},
            "optimiser": {"batch_size": 16},
            "validation": {"path": str(data / "validation")},
            "runtime": {"log_every_steps": 1, "checkpoint_every_images": 32},
        },
        "slurm": {"gpus": False, "devices_per_node": 1, "cpus_per_task": 1, "time_limit_min": 10},
        **changes,
    }


@pytest.fixture
def fault(cluster: Path, data: Path, tmp_path: Path) -> Iterator[Callable[..., Fault]]:
    """Return a function that makes a sweep; keywords are variables of `slowly`, `slurm` options and other fields."""

    def make(*, slurm: dict[str, Any] | None = None, step_s: float = 0.6, fault: str = "", **changes: Any) -> Fault:
        values = sweep_values(data, **changes)
        words = f"PYTHONPATH=$PYTHONPATH:{HERE / 'slowly'} STEP_S={step_s} FAULT={fault}"
        setup = [f"export {words} OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu"]
        values["slurm"] |= {"setup": setup, **(slurm or {})}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(values))
        sweep = load_sweep(path, tmp_path / "root")
        return Fault(sweep=sweep, runs=plan(sweep))

    yield make
    slurm.command("scancel", "--full", "--user=root")  # of a test that failed: the next counts jobs


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Train the runs of the tests here, without a fault, and return their losses."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep_values(data, seeds=[0, 1])))
    sweep = load_sweep(path, folder / "root")
    result = launch(sweep, devices=2)
    assert len(result.finished) == 2
    records = [RunRecord(sweep.run_dir(run_id)) for run_id in result.finished]
    return {r.path.name: [(row["images_seen"], row["val_loss"]) for row in r.read_rows()] for r in records}
