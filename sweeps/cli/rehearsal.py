"""Rehearsals of planned runs (`aimscale plan SWEEP --rehearse`): the step of each, on fake tensors and ranks."""

from __future__ import annotations

from collections.abc import Sequence

from rich.filesize import decimal

from aimscale.harness.data.stream.loader import split_step
from aimscale.harness.log.progress import Bar
from aimscale.harness.rehearsal.step import PARTS, Part, Rehearsal, rehearse
from aimscale.harness.run.row import build_model_config
from aimscale.harness.step.deepspeed_setup import EngineOptions
from aimscale.sweeps.monitor.layout import Column, fitted_table, new_console
from aimscale.sweeps.planning.run import CostCard


def rehearse_runs(cards: Sequence[CostCard]) -> dict[str, Rehearsal]:
    """Map the ids of runs that fit their devices to their rehearsed steps; equal steps are rehearsed once."""
    rehearsals = {}
    with Bar() as bar:
        for number, card in enumerate(cards):
            bar("rehearsing", number, len(cards), "runs")
            if (plan := card.fit) is None or card.batch_size is None:
                continue
            run, recompute = card.run, plan.activation_checkpointing
            training, init = run.config.training, run.config.training.init
            parts = split_step(0, card.batch_size, micro_batch=plan.micro_batch, rank=0, world_size=run.devices)
            rehearsals[run.run_id] = rehearse(
                build_model_config(training),
                precision=training.optimiser.precision,
                options=EngineOptions(
                    zero_stage=plan.zero_stage,
                    activation_checkpointing=recompute,
                    freezes_backbone=init is not None and init.freeze_images > 0,
                ),
                world_size=run.devices,
                micro_batches=tuple(map(len, parts)),
                prefix=training.objective.prefix,
                on_gpu=card.device.is_gpu,
            )
    return rehearsals


def print_rehearsal(run_id: str, rehearsal: Rehearsal) -> None:
    """Print the memory of a step by phase and part, and its collectives."""
    memory: list[tuple[str, dict[Part, int]]] = []
    for phase in rehearsal.phases:
        memory += [(f"{phase.phase}, at most", phase.peak), (f"{phase.phase}, at its end", phase.held)]

    def column(part: Part) -> Column:
        return Column(header=part, cell=lambda row: decimal(row[1].get(part, 0)))

    parts = [
        Column(header="memory", cell=lambda row: row[0], align_right=False),
        *map(column, PARTS),
        Column(header="sum", cell=lambda row: decimal(sum(row[1].values()))),
    ]
    calls = [
        Column(
            header="collective", cell=lambda collective: f"{collective.phase}: {collective.name}", align_right=False
        ),
        Column(header="calls", cell=lambda collective: f"{collective.count:,}"),
        Column(header="bytes", cell=lambda collective: decimal(collective.num_bytes)),
    ]
    console = new_console()
    print(f"\n{run_id}: one step of a rank, rehearsed")
    console.print(fitted_table(parts, memory, console.width))
    console.print(fitted_table(calls, rehearsal.collectives, console.width))
    print(f"checkpoint: the rank writes {decimal(rehearsal.checkpoint_bytes)}, copied to its host if that has room")
