"""Plan of how a run uses its devices, and the second try, with half of the micro-batch, when memory runs out."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from aimscale.harness.data.store.dataset_info import DatasetLookup
from aimscale.harness.device.distributed import Group
from aimscale.harness.device.execution import ExecutionPlan, execution_plan, images_per_rank, pass_size
from aimscale.harness.device.peak import Peak, device_name
from aimscale.harness.probe.cost import curve_bytes
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import TooLargeError, describe_out_of_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Plan of this start, the same on all ranks."""

    execution: ExecutionPlan
    half: int
    """Images of a pass of at most half of the micro-batch; 0 if there is none."""
    is_lowered: bool
    """Whether memory ran out in an earlier start, so that the micro-batch is half of the one planned."""
    executed: dict[str, Any]
    """Settings that the memory of a step depends on, as in `Status.too_large`."""

    def too_large(self, error: Exception) -> TooLargeError | None:
        """Return what to raise if memory ran out in the first step; None if half of the micro-batch was tried.

        Others may wait in a collective that this rank never enters, so none goes on; the next start reads it in
        `status.json`.
        """
        if self.is_lowered or not self.half:
            return None
        return TooLargeError(
            f"{describe_out_of_memory(error)} in the first step with a micro-batch of {self.execution.micro_batch}; "
            f"the next start takes {self.half}",
            self.executed,
        )


def plan_training(run: RunDir, config: RunConfig, group: Group, peak: Peak, lookup: DatasetLookup) -> TrainingPlan:
    """Plan how to train on the devices of a group; all ranks call this together.

    Raises:
        DoesNotFitError: the model fits no device of this size.
    """
    batch_size, measuring = config.training.optimiser.batch_size, group.from_first(lambda: curve_bytes(config, lookup))
    plan_of = functools.partial(
        execution_plan,
        config.training,
        pace=group.from_first(lambda: group.pace(peak)),
        world_size=group.world_size,
        device_bytes=group.min_over_ranks(group.memory_bytes()),
        host_bytes=group.min_over_ranks(group.host_memory_bytes()) if group.device.type == "cuda" else None,
        measuring=measuring,
    )
    planned = plan_of(config.runtime)
    known = group.from_first(lambda: run.read_status().too_large)
    largest = known["micro_batch"] if known else planned.micro_batch + 1
    plan = planned
    if planned.micro_batch >= largest and known == _executed(planned, group) | {"micro_batch": largest}:
        fixed = {"zero_stage": plan.zero_stage, "activation_checkpointing": plan.activation_checkpointing}
        half = _half(batch_size, group, largest)
        plan = plan_of(config.runtime.model_copy(update=fixed | {"micro_batch": half}))
    if measuring and not plan.measures and group.is_first:
        print("nothing is measured during training: the device has no memory left for it", flush=True)
    return TrainingPlan(
        execution=plan,
        half=_half(batch_size, group, plan.micro_batch),
        is_lowered=plan is not planned,
        executed=_executed(plan, group),
    )


def _executed(plan: ExecutionPlan, group: Group) -> dict[str, Any]:
    names = ("zero_stage", "micro_batch", "activation_checkpointing")
    about = {"device": device_name(group.device), "world_size": group.world_size}
    return {name: getattr(plan, name) for name in names} | about


def _half(batch_size: int, group: Group, micro_batch: int) -> int:
    return pass_size(images_per_rank(batch_size, group.world_size), micro_batch // 2)
