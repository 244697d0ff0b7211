"""Probe a run as a job: `python -m aimscale.harness.probe.job RUN_DIR/probing`, alone, by torchrun, in Slurm.

`RUN_DIR/probing/` holds what a job of its own has, as a run directory does for training: `request.json` (what to
probe), `status.json`, the lease and the logs. So probing neither waits for the training of the same run nor disturbs
it. The job takes up budgets that the run finishes meanwhile, and ends when all that are there are probed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from aimscale.harness.device.distributed import Group
from aimscale.harness.device.job import Job, execute_job
from aimscale.harness.run.config import ConfigError, ProbeSection, Section, parse
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import run_worker
from aimscale.harness.run.files import write_text

FOLDER = "probing"
"""Of the job within a run directory."""
REQUEST_FILE = "request.json"


class ProbeRequest(Section):
    """What a probe job is to do."""

    version: Literal[1] = 1
    """Version of this file format."""
    tasks: tuple[ProbeSection, ...] = Field(min_length=1)
    """Tasks."""
    images_seen: int | None = None
    """One budget; null probes all that are saved."""
    since: float = 0.0
    """Repeat what was finished before this Unix time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the backbone runs."""
    cache_gb: float = 2.0
    """Memory of a rank for tokens, and the same for pooled features, 10^9 bytes."""
    disk_gb: float = 500.0
    """Disk of a rank for pooled features that memory does not hold."""

    def write(self, job: RunDir) -> None:
        """Store it in the job's folder."""
        write_text(job.path / REQUEST_FILE, self.model_dump_json(indent=1) + "\n")


def read_request(job: RunDir) -> ProbeRequest:
    """The request of a job.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = job.path / REQUEST_FILE
    try:
        return parse(ProbeRequest, json.loads(path.read_text()), str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{job.path} holds no probe job; start one with `aimscale probe RUN --on local`") from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); remove it and start the probes again") from error


def probe_job(path: Path) -> int:
    """Execute the job in `path` and return the exit code (`run.directory`).

    Raises:
        UserError: the tasks cannot be probed; `status.json` says why, too.
        LeaseHeld: another process executes this job.
    """
    folder, run = RunDir(path), RunDir(path.parent)
    request = read_request(folder)
    return execute_job(folder, lambda job: _probe(job, run, request), also=[run.path / "probes"])


def _probe(job: Job, run: RunDir, request: ProbeRequest) -> None:
    """Probe budget by budget, those included that come to be saved meanwhile."""
    from aimscale.harness.probe.protocol import Bounds
    from aimscale.harness.probe.run import join_ranks, probe_run, saved_budgets

    group = job.stack.enter_context(join_ranks(request.device, run.load_config().runtime.num_threads))
    bounds = Bounds(cache_gb=request.cache_gb, disk_gb=request.disk_gb)
    pause = job.pausing(group)
    done: set[int] = set()
    while left := _left(run, request, group, done, saved_budgets(run)):
        budget = left[0]
        probing = probe_run(
            run.path, budget, request.tasks, group=group, bounds=bounds, since=request.since, pause=pause
        )
        job.tell(durable=False, phase=f"probe at {budget:,} images ({len(left)} budgets left)")
        for _, entries in probing:
            for entry in entries if group.is_first else []:
                print(f"{budget} {entry['task']} {entry['kind']} top-1 {100 * entry['top1']:.1f} %", flush=True)
        done.add(budget)


def _left(run: RunDir, request: ProbeRequest, group: Group, done: set[int], saved: list[int]) -> list[int]:
    """Budgets still to be looked at, the same on all ranks."""
    wanted = saved if request.images_seen is None else [request.images_seen]
    left: list[int] = group.from_first([budget for budget in wanted if budget not in done])
    return left


if __name__ == "__main__":
    run_worker(probe_job, "aimscale.harness.probe.job RUN_DIR/probing")
