"""How the jobs of a sweep keep to `slurm.max_parallel`: Slurm bounds the elements of one array, not of several.

Arrays share the limit out where there are no more of them than it allows. Else they form as many lanes, in each of
which one follows the other. What is submitted while earlier jobs of the sweep take the whole limit follows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.claims import records_of


@dataclass(frozen=True, kw_only=True)
class Turn:
    """When an array runs."""

    limit: int
    """Elements at a time."""
    lane: int
    """Arrays of one lane follow each other."""


def turns(most: int, sizes: Sequence[int]) -> list[Turn]:
    """The turn of each array of so many elements, of which `most` run at a time in all."""
    if len(sizes) > most:
        return [Turn(limit=1, lane=i % most) for i in range(len(sizes))]
    limits = [1] * len(sizes)
    left = most - len(sizes)
    while left > 0 and (able := [i for i, size in enumerate(sizes) if limits[i] < size]):
        for i in able[:left]:
            limits[i] += 1
        left -= min(left, len(able))
    return [Turn(limit=limit, lane=i) for i, limit in enumerate(limits)]


def queued_jobs(sweep: Sweep) -> set[str]:
    """Jobs of the sweep that wait in Slurm or run, of whatever kind."""
    is_queued = slurm.is_queued(slurm.jobs())
    paths = list(sweep.runs_dir.iterdir()) if sweep.runs_dir.is_dir() else []
    claims = [claim for path in paths for record in records_of(path) if (claim := record.find_claim())]
    return {claim.job_id for claim in claims if claim.job_id and is_queued(claim)}


def afterany(job_ids: Sequence[str]) -> list[str]:
    """Slurm's words for waiting until all of these jobs, of arrays all elements, ended."""
    arrays = dict.fromkeys(job_id.split("_")[0] for job_id in job_ids)
    return [":".join(["afterany", *arrays])] if arrays else []
