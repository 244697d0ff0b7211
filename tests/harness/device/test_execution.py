"""The estimate of a step, and the choice of ZeRO stage, micro-batch and checkpointing by it."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest

from aimscale.aim.config import model_config
from aimscale.aim.cost import param_count
from aimscale.harness.data.stream.loader import split_step
from aimscale.harness.device.execution import (
    DoesNotFitError,
    ExecutionPlan,
    Pace,
    execution_plan,
    images_per_rank,
    pass_size,
)
from aimscale.harness.device.memory import measuring_bytes
from aimscale.harness.run.config import RuntimeConfig, TrainingConfig

GB = 10**9
H100 = Pace(flops_per_s=0.40 * 989.5e12, cores=None, ranks_per_node=8)
CORE = Pace(flops_per_s=0.35 * 1e11, cores=1, ranks_per_node=8)


def execute(
    size: str, world_size: int, *, precision: str = "bf16", batch: int = 4096, gb: float = 85, **given: Any
) -> ExecutionPlan:
    """The plan of a size on cards of 85 GB; `given` are fields of `runtime`, and arguments."""
    fields = {name: given.pop(name) for name in list(given) if name in RuntimeConfig.model_fields}
    head = "released" if size.startswith("aim") else "proportional"
    training = TrainingConfig.model_validate(
        {"model": {"size": size, "head_rule": head}, "data": {"sources": [{"path": "none"}]}}
        | {"optimiser": {"batch_size": batch, "precision": precision}}
    )
    memory = {"world_size": world_size, "device_bytes": int(gb * GB)}
    return execution_plan(training, RuntimeConfig(**fields), **memory, **{"pace": H100} | given)


@pytest.mark.parametrize("batch", [2, 64, 96, 512, 1000, 4096, 6144, 15])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 24, 128])
def test_all_passes_of_a_step_are_of_one_size_where_ranks_share_it_equally(batch: int, ranks: int) -> None:
    num_images = images_per_rank(batch, ranks)
    for most in (1, 2, 7, 8, 100, 104, 172, 256):
        size = pass_size(num_images, most)
        steps = [split_step(0, batch, micro_batch=size, rank=rank, world_size=ranks) for rank in range(ranks)]
        sizes = {len(part) for step in steps for part in step}
        assert 1 <= max(sizes) <= size <= max(most, 1)
        assert len({len(step) for step in steps}) == 1, "each rank joins in every reduction"
        if num_images * ranks == batch and num_images % size == 0:
            assert sizes == {size}
        if any(2 * each >= most and num_images % each == 0 for each in range(2, most + 1, 2)):
            assert num_images % size == 0
    assert pass_size(512, 172) == 128, "3 passes of 172, 170 and 170 would be compiled twice"
    assert pass_size(512, 104) == 64
    assert pass_size(2 * 257, 128) == 104, "257 is a prime: 257 passes of 2 would take a minute"


def test_a_step_takes_what_its_flops_passes_and_bytes_take() -> None:
    """aim-600M by hand: 1.37e12 FLOPs executed for an image, 36 blocks, 1.09e9 parameters."""
    d, depth, head, n, tokens, o = 1536, 24, 2048, 12, 256, 588
    forward = 2 * tokens * o * d + depth * 2 * (12 * tokens * d**2 + 2 * tokens**2 * d) - 128 * 16 * d**2
    forward += 128 * 2 * (d * head + 8 * n * head**2 + head * o)
    image_s = 3 * forward / (0.40 * 989.5e12)
    params = param_count(model_config("aim-600M", head_rule="released")).total
    eight = execute("aim-600M", 8, zero_stage=1, micro_batch=128).step
    assert eight.images_s == pytest.approx(512 * image_s)
    assert eight.passes_s == pytest.approx(4 * 36 * 0.3e-3)
    # float32 gradients are all-reduced (twice 7/8 of them) and bf16 weights gathered, behind the last backward pass
    assert eight.exposed_communication_s == pytest.approx((8 + 2) * params * 7 / 8 / 300e9, rel=0.1)
    far = execute("aim-600M", 128, zero_stage=1, micro_batch=32).step
    assert far.exposed_communication_s == pytest.approx((8 + 2) * params * 127 / 128 / 200e9, rel=0.1)
    assert 0.21 < far.exposed_communication_s / far.total_s < 0.39
    # at ZeRO 2 all but the last bucket and the weights is sent beside the backward pass, which it slows down by a tenth
    beside_s = 8 * params * 127 / 128 / 200e9
    after_s = (8 * 50e6 + 2 * params) * 127 / 128 / 200e9
    two = execute("aim-600M", 128, zero_stage=2, micro_batch=32).step
    assert two.exposed_communication_s == pytest.approx(after_s + 0.1 * beside_s, rel=0.1)
    recomputed = execute("aim-600M", 128, zero_stage=1, micro_batch=32, activation_checkpointing=True).step
    assert recomputed.images_s / far.images_s == pytest.approx(4 / 3, rel=0.01)
    alone = execute("aim-600M", 1, batch=64).step
    assert (alone.exposed_communication_s, alone.images_s) == (0, pytest.approx(64 * image_s))


@pytest.mark.parametrize(
    ("size", "ranks", "stage", "micro_batch"),
    [
        ("aim-600M", 8, 1, 128),
        ("aim-600M", 128, 2, 32),
        ("aim-1B", 8, 1, 64),
        ("aim-1B", 128, 2, 32),
        ("aim-3B", 8, 2, 64),
        ("aim-3B", 128, 2, 32),
        ("aim-7B", 8, 2, 16),
        ("aim-7B", 128, 2, 32),
    ],
)
def test_no_other_setting_that_fits_is_a_per_cent_faster(size: str, ranks: int, stage: int, micro_batch: int) -> None:
    chosen = execute(size, ranks)
    assert (chosen.zero_stage, chosen.micro_batch, chosen.activation_checkpointing) == (stage, micro_batch, False)
    assert chosen.memory_bytes <= 0.8 * 85 * GB
    for other, recompute, passes in itertools.product((1, 2, 3), (False, True), (1, 2, 4, 8, 16, 32)):
        given = {"zero_stage": other, "activation_checkpointing": recompute, "micro_batch": 4096 // ranks // passes}
        with contextlib.suppress(DoesNotFitError):
            assert execute(size, ranks, **given).step.total_s >= 0.99 * chosen.step.total_s


def test_what_is_given_is_obeyed_and_the_rest_fits() -> None:
    assert execute("aim-600M", 8, precision="fp32").memory_bytes < 0.8 * 85 * GB
    assert execute("aim-7B", 8, gb=45).memory_bytes < 0.8 * 45 * GB, "a smaller device shares or recomputes more"
    assert execute("aim-600M", 8, micro_batch=100).micro_batch == 100, "an upper bound: passes of 86 and 84"
    assert execute("aim-600M", 8, micro_batch=5000, batch=64).micro_batch == 8
    assert execute("aim-600M", 8, zero_stage=3).zero_stage == 3
    with pytest.raises(DoesNotFitError, match="aim-7B"):
        execute("aim-7B", 1, gb=16)
    with pytest.raises(DoesNotFitError, match="zero_stage 0"):
        execute("aim-600M", 8, zero_stage=0)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cpus_share_nothing_out_while_it_fits(precision: str, stage: int, ranks: int) -> None:
    """They do not reduce beside the backward pass, and what they hold is small."""
    small = execute("w64-d4", ranks, precision=precision, batch=256, gb=4, pace=CORE)
    assert (small.zero_stage, small.micro_batch, small.activation_checkpointing) == (stage, 256 // ranks, False)


def test_measuring_during_training_has_its_room_and_changes_no_plan() -> None:
    model = model_config("aim-7B", head_rule="released")
    params = param_count(model).total
    needed, probed = (measuring_bytes(model, "bf16", is_probed=is_probed) for is_probed in (False, True))
    assert 2 * params < needed < 2.5 * params < probed
    roomy, tight = execute("aim-7B", 8, measuring=needed), execute("aim-7B", 2, measuring=needed, gb=100)
    assert (roomy.measures, tight.measures) == (True, False), "at ZeRO 3 on two cards a copy of 14 GB is too much"
    for chosen, usual in ((roomy, execute("aim-7B", 8)), (tight, execute("aim-7B", 2, gb=100))):
        assert (chosen.zero_stage, chosen.micro_batch) == (usual.zero_stage, usual.micro_batch)
        assert usual.memory_bytes <= chosen.memory_bytes <= 0.8 * 100 * GB
    assert roomy.memory_bytes >= roomy.held_bytes + needed


def test_checkpoints_are_copied_where_the_host_has_room() -> None:
    def copies(device_mib: int, host_mib: int | None) -> bool:
        host_bytes = None if host_mib is None else host_mib * 2**20
        given = {"precision": "fp32", "batch": 16, "gb": device_mib * 2**20 / GB, "host_bytes": host_bytes}
        return execute("w640-d4", 1, pace=CORE, **given).copies_checkpoints

    # 32 million parameters are 512 MiB during a step, activations not counted, and 384 in a checkpoint's copy
    assert [copies(4000, host) for host in (4000, 490, 450)] == [True, True, False]
    assert [copies(device, None) for device in (4000, 1200)] == [True, False], "a CPU holds both"
