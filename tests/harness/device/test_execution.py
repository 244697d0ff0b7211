"""The choice of ZeRO stage, micro-batch and checkpointing, and the second try when memory runs out."""

from __future__ import annotations

from typing import Any

import pytest

from aimscale.aim.config import model_config
from aimscale.aim.cost import param_count
from aimscale.harness.data.stream.loader import split_step
from aimscale.harness.device.execution import (
    DoesNotFitError,
    ExecutionPlan,
    execution_plan,
    images_per_rank,
    out_of_memory,
    pass_size,
    plan_start,
)
from aimscale.harness.device.memory import measuring_bytes
from aimscale.harness.device.speed import has_fast_link
from aimscale.harness.run.config import RuntimeConfig, TrainingConfig

GB = 10**9


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
    return execution_plan(training, RuntimeConfig(**fields), **memory, **given)


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


@pytest.mark.parametrize(
    ("size", "ranks", "gb", "expected"),
    [
        ("aim-600M", 1, 85, (1, 128, False)),
        ("aim-600M", 8, 85, (2, 128, False)),
        ("aim-1B", 128, 85, (2, 32, False)),
        ("aim-7B", 8, 85, (2, 32, False)),
        ("aim-7B", 128, 85, (2, 32, False)),
        ("aim-7B", 8, 42, (2, 4, False)),
        ("aim-7B", 2, 85, (3, 2, False)),
    ],
)
def test_zero_2_is_taken_and_3_where_that_does_not_fit(
    size: str, ranks: int, gb: float, expected: tuple[int, int, bool]
) -> None:
    chosen = execute(size, ranks, gb=gb)
    assert (chosen.zero_stage, chosen.micro_batch, chosen.activation_checkpointing) == expected
    assert chosen.memory_bytes <= 0.8 * gb * GB
    if chosen.zero_stage == 3:
        with pytest.raises(DoesNotFitError):
            execute(size, ranks, gb=gb, zero_stage=2, activation_checkpointing=False)
    for more in (2, 4, 8):  # the largest that fits, of those that split a step evenly
        size_of_pass = more * chosen.micro_batch
        if size_of_pass <= min(256, 4096 // ranks) and not 4096 % (ranks * size_of_pass):
            with pytest.raises(DoesNotFitError):
                execute(size, ranks, gb=gb, micro_batch=size_of_pass, zero_stage=chosen.zero_stage,
                        activation_checkpointing=chosen.activation_checkpointing)  # fmt: skip


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


@pytest.mark.parametrize(("precision", "ranks", "stage"), [("fp32", 1, 0), ("bf16", 1, 1), ("fp32", 2, 2)])
def test_one_rank_shares_nothing_out(precision: str, ranks: int, stage: int) -> None:
    small = execute("w64-d4", ranks, precision=precision, batch=256, gb=4)
    assert (small.zero_stage, small.micro_batch, small.activation_checkpointing) == (stage, 256 // ranks, False)


@pytest.mark.parametrize(
    ("size", "gb", "given", "stages"),
    [
        ("aim-600M", 48, {}, (2, 1)),
        ("aim-600M", 48, {"batch": 256}, (2, 2)),  # one pass reduces once, and while it computes
        ("aim-600M", 48, {"zero_stage": 2}, (2, 2)),
        ("aim-7B", 48, {}, (2, 2)),  # 6 bytes of every parameter do not fit
        ("aim-1B", 48, {"precision": "fp32"}, (2, 1)),
    ],
)
def test_gpus_without_a_fast_link_reduce_gradients_once_a_step(
    size: str, gb: float, given: dict[str, Any], stages: tuple[int, int]
) -> None:
    linked, apart = (execute(size, 8, gb=gb, is_linked=is_linked, **given) for is_linked in (True, False))
    assert (linked.zero_stage, apart.zero_stage) == stages
    assert apart.memory_bytes <= 0.8 * gb * GB
    assert execute(size, 1, gb=4 * gb, is_linked=False).zero_stage == execute(size, 1, gb=4 * gb).zero_stage


def test_a_gpus_name_tells_its_link() -> None:
    linked = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "GB200", "h200", "a card of 2030", "AMD EPYC")
    apart = ("NVIDIA A40", "NVIDIA A100 80GB PCIe", "NVIDIA H100 PCIe", "NVIDIA L40S", "a40", "NVIDIA RTX 6000 Ada")
    assert [has_fast_link(name) for name in linked + apart] == [True] * len(linked) + [False] * len(apart)
    training = TrainingConfig.model_validate(
        {"model": {"size": "aim-600M"}, "data": {"sources": [{"path": "none"}]}}
        | {"optimiser": {"batch_size": 4096, "precision": "bf16"}}
    )
    for device, stage in (("NVIDIA A40", 1), ("NVIDIA H100 80GB HBM3", 2)):
        plan = plan_start(training, RuntimeConfig(), None, device=device, world_size=8, device_bytes=48 * GB)
        assert plan.zero_stage == stage


def test_memory_counts_every_token_whose_prediction_is_scored() -> None:
    """Without a prefix all but the first are, in place of half of them."""

    def micro_batch(prefix: str) -> int:
        training = {"model": {"size": "aim-7B"}, "data": {"sources": [{"path": "none"}]}}
        training |= {"objective": {"prefix": prefix}, "optimiser": {"batch_size": 4096, "precision": "bf16"}}
        config = TrainingConfig.model_validate(training)
        return execution_plan(config, RuntimeConfig(), world_size=128, device_bytes=82 * GB).micro_batch

    assert (micro_batch("uniform"), micro_batch("none")) == (32, 16)


def test_the_start_after_memory_ran_out_takes_half_of_the_micro_batch() -> None:
    training = TrainingConfig.model_validate(
        {"model": {"size": "w64-d4"}, "data": {"sources": [{"path": "none"}]}, "optimiser": {"batch_size": 64}}
    )
    about = {"device": "H100", "world_size": 2}

    def start(too_large: dict[str, Any] | None, **fields: Any) -> ExecutionPlan:
        return plan_start(training, RuntimeConfig(**fields), too_large, device_bytes=80 * GB, **about)

    first = start(None)
    error = out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), first, **about)
    assert error is not None
    assert error.executed == {"zero_stage": 2, "micro_batch": 32, "activation_checkpointing": False} | about
    assert "with a micro-batch of 32; the next start takes 16;" in str(error)
    second = start(error.executed)
    assert (second.zero_stage, second.micro_batch, second.is_lowered) == (2, 16, True)
    assert out_of_memory(MemoryError(), second, **about) is None, "a third try would not help"
    assert out_of_memory(ValueError("no"), first, **about) is None
    for other in ({"zero_stage": 3}, {"device": "A100"}, {"world_size": 4}, {"micro_batch": 64}):
        assert start(error.executed | other) == first, "another step ran out of memory"
    assert start(error.executed, micro_batch=8).micro_batch == 8, "smaller already"


def test_measuring_during_training_has_its_room_and_changes_no_plan() -> None:
    model = model_config("aim-7B", head_rule="released")
    params = param_count(model).total
    needed = measuring_bytes(model, "bf16")
    assert 2 * params < needed < 2.5 * params
    roomy, tight = execute("aim-7B", 8, measuring=needed), execute("aim-7B", 2, measuring=needed, gb=100)
    assert (roomy.measures, tight.measures) == (True, False), "at ZeRO 3 on two cards a copy of 14 GB is too much"
    for chosen, usual in ((roomy, execute("aim-7B", 8)), (tight, execute("aim-7B", 2, gb=100))):
        assert (chosen.zero_stage, chosen.micro_batch) == (usual.zero_stage, usual.micro_batch)
        assert usual.memory_bytes <= chosen.memory_bytes <= 0.8 * 100 * GB
