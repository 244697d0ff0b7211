"""Tests that need a GPU; results are compared with a CPU's. `AIMSCALE_TEST_DEVICE=cpu` runs those that need no GPU."""

from __future__ import annotations

import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from reference_engine import ReferenceEngine
from torch.profiler import profile

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.harness.bench.train import random_batches
from aimscale.harness.data.stream.loader import count_targets, train_batches
from aimscale.harness.data.stream.stream import Batch, TrainStream
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.device.memory import WORKSPACE_BYTES, held_bytes, kept_bytes_per_image
from aimscale.harness.distributed.group import ALONE, Group, find_placement, start_group, stop_group
from aimscale.harness.run.config import OptimiserSection, run_config
from aimscale.harness.step.checkpoint import load_checkpoint
from aimscale.harness.step.engine import Engine, flat_slice
from aimscale.harness.step.saving import CheckpointWriter
from aimscale.sweeps import launch
from aimscale.sweeps.planning.sweepfile import load_sweep

DEVICE = os.environ.get("AIMSCALE_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no card"),
]
needs_card = pytest.mark.skipif(DEVICE != "cuda", reason="the question is a card's")

CONFIG = model_config("w128-d2", image_size=32, patch_size=4)
MEDIUM = model_config("w1024-d8", image_size=224, patch_size=14)
STAGES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[Group]:
    if DEVICE == "cuda":
        os.environ.pop("DS_ACCELERATOR", None)  # tests elsewhere ask DeepSpeed for the CPU
    placement = find_placement({})
    yield start_group(placement, DEVICE)
    stop_group()


@pytest.fixture
def engine(group: Group) -> Iterator[Callable[..., Engine]]:
    """Return a function that makes engines; their memory is freed at the end."""
    made: list[Engine] = []

    def make(config=CONFIG, precision: str = "bf16", stage: int = 1, compile: bool = False) -> Engine:
        optimiser = OptimiserSection(batch_size=16, precision=precision, clip_norm=0.5)  # type: ignore[arg-type]
        made.append(Engine(config, optimiser, EngineOptions(zero_stage=stage, compile=compile), group))
        return made[-1]

    yield make
    for each in made:
        each.close()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def losses(engine: Engine | ReferenceEngine, num_steps: int = 5, config=CONFIG) -> list[float]:
    step = random_batches(config, 16, 8)
    num_targets = count_targets(step, config.num_tokens)
    return [engine.step(step, num_targets=num_targets, lr=1e-3).loss_sum.item() for _ in range(num_steps)]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 2e-2)])
def test_loss_and_gradient_are_the_cpus(precision: str, tolerance: float) -> None:
    """float32 products are TF32 on a card: ten bits."""
    (batch,) = random_batches(CONFIG, 16, 16)

    def outcome(device: str, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        model = AIM(CONFIG).to(device, dtype)
        loss_sum, _ = model(batch.images_on(device), batch.prefix_lengths)
        gradient = torch.autograd.grad(loss_sum, list(model.parameters()))
        return loss_sum.item(), torch.cat([each.float().cpu().flatten() for each in gradient])

    loss, gradient = outcome(DEVICE, torch.float32 if precision == "fp32" else torch.bfloat16)
    expected, expected_gradient = outcome("cpu", torch.float32)
    assert loss == pytest.approx(expected, rel=tolerance)
    assert (gradient - expected_gradient).norm() < 5 * tolerance * expected_gradient.norm()


@pytest.mark.parametrize(("precision", "stage"), STAGES)
def test_every_stage_takes_the_steps_of_fsdp2(precision: str, stage: int, engine: Callable, group: Group) -> None:
    optimiser = OptimiserSection(batch_size=16, precision=precision, clip_norm=0.5)  # type: ignore[arg-type]
    reference = ReferenceEngine(AIM(CONFIG), optimiser, EngineOptions(zero_stage=stage), group, sharded=True)
    expected = losses(reference)
    reference.close()
    found = losses(engine(precision=precision, stage=stage))
    assert found == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 1e-2)
    assert found[-1] < found[0]


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)])
def test_a_resumed_run_holds_the_same_bits(
    precision: str, stage: int, engine: Callable, group: Group, tmp_path: Path
) -> None:
    first = engine(precision=precision, stage=stage)
    losses(first, 3)
    writer = CheckpointWriter(first, group)
    writer.save(tmp_path / "saved", run_id="x", images_seen=48, branch=None, progress={}, keep=())
    losses(first, 1)  # while it is written
    writer.finish()
    load_checkpoint(tmp_path / "saved", first, group)
    second = engine(precision=precision, stage=stage)
    load_checkpoint(tmp_path / "saved", second, group)
    for one, other in zip(first.fragments(), second.fragments(), strict=True):
        states = [(each, holder.adam_state(each.flat)) for each, holder in ((one, first), (other, second))]
        for name in ("exp_avg", "exp_avg_sq"):
            mine, its = (flat_slice(state[name], fragment) for fragment, state in states)
            assert torch.equal(mine, its), (one.name, name)
        assert torch.equal(flat_slice(one.flat, one), flat_slice(other.flat, other)), one.name
    writer.close()
    assert losses(second, 2) == pytest.approx(losses(first, 2), rel=1e-4)


def step_of_images(number: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (number, 3, 32, 32), generator=generator, dtype=torch.uint8).pin_memory()
    prefix_len = torch.tensor([5, CONFIG.num_tokens - 5] * (number // 2))
    return [Batch(images=images, prefix_lengths=prefix_len, positions=torch.arange(number))]


@needs_card
def test_a_card_takes_the_loaders_images(group: Group, write_images: Callable[..., str], tmp_path: Path) -> None:
    """The ring buffer is page-locked."""
    train, validation = (write_images(tmp_path / name, 64, seed=seed) for seed, name in enumerate(("train", "held")))
    fields = {
        "model": {"size": "w64-d2", "image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": train}]},
        "optimiser": {"batch_size": 16},
        "budgets": [64],
        "validation": {"path": validation},
    }
    stream = TrainStream(run_config(fields, "the test"))
    for workers in (0, 2):
        sizes = {"start": 0, "stop": 640, "batch_size": 16, "micro_batch": 8}
        steps = train_batches(stream, **sizes, num_workers=workers, pin_memory=True)
        for number, step in enumerate(steps):
            expected = stream.batch(range(16 * number, 16 * number + 16)).images
            assert torch.equal(torch.cat([batch.on(group.device).images.cpu() for batch in step]), expected)


@needs_card
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1), ("bf16", 2)])
def test_the_peak_of_a_step_is_within_ten_percent_of_the_estimate(precision: str, stage: int, engine: Callable) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    made = engine(MEDIUM, precision, stage)
    torch.cuda.reset_peak_memory_stats()
    step = random_batches(MEDIUM, 64, 64)
    for _ in range(2):
        made.step(step, num_targets=count_targets(step, MEDIUM.num_tokens), lr=1e-3)
    torch.cuda.synchronize()
    estimate = held_bytes(MEDIUM, precision, zero_stage=stage, world_size=1) - WORKSPACE_BYTES  # type: ignore[arg-type]
    estimate += 64 * kept_bytes_per_image(MEDIUM, precision, False, MEDIUM.num_tokens / 2)  # type: ignore[arg-type]
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(estimate, rel=0.1)


@needs_card
def test_nothing_of_ours_waits_for_the_card_in_a_step(
    engine: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine()
    source = (step_of_images(16) for _ in range(5))
    waits: Counter[str] = Counter()

    def note(*_: object, **__: object) -> None:
        frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
        ours = [frame for frame in frames if "/deepspeed/" in frame or "/src/aimscale/" in frame]
        waits[ours[-1] if ours else frames[-1]] += 1

    for number, step in enumerate(source):
        if number == 3:  # by now everything that is made once is made
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", note)
        made.step(step, num_targets=count_targets(step, CONFIG.num_tokens), lr=1e-3)
    torch.cuda.set_sync_debug_mode("default")
    with capsys.disabled():
        print(f"\nwaits of two steps, all DeepSpeed's: {dict(waits)}")
    assert [place for place in waits if "/deepspeed/" not in place] == []


def test_a_run_is_evaluated_as_on_the_cpu(evaluations: Callable[..., list[list[float]]], group: Group) -> None:
    """Validation and every kind of probe, with tokens kept in memory or computed again."""
    expected, *others = evaluations([(ALONE, 0.1), (group, 0.1), (group, 0.0)], num_images=80, epochs=2)
    for other in others:
        assert other[0] == pytest.approx(expected[0], rel=2e-3)
        assert other[1:] == pytest.approx(expected[1:], abs=0.05)


@needs_card
def test_attention_takes_a_fused_kernel_with_the_dense_mask() -> None:
    model = AIM(MEDIUM).to("cuda", torch.bfloat16)
    (batch,) = random_batches(MEDIUM, 4, 4)
    with profile() as recorded:
        model(batch.images_on("cuda"), batch.prefix_lengths)[0].backward()
    names = {event.key for event in recorded.key_averages() if "dot_product" in event.key}
    assert any("efficient" in name or "cudnn" in name for name in names), names
    assert not any("math" in name for name in names), names


@needs_card
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1)])
def test_compiled_steps_are_the_others(precision: str, stage: int, engine: Callable) -> None:
    """Runs last, since each compilation takes half a minute."""
    expected = losses(engine(precision=precision, stage=stage))
    found = losses(engine(precision=precision, stage=stage, compile=True))
    assert found == pytest.approx(expected, rel=2e-3 if precision == "fp32" else 1e-2)


def test_runs_of_a_launch_take_the_card(write_images: Callable[..., str], tmp_path: Path) -> None:
    """The launcher itself must not initialise CUDA."""
    train, validation = (write_images(tmp_path / name, 64, seed=seed) for seed, name in enumerate(("train", "held")))
    base = {
        "model": {"image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": train}]},
        "optimiser": {"batch_size": 16},
        "validation": {"path": validation},
        "runtime": {"device": DEVICE},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "sizes": ["w64-d2"], "budgets": [64], "seeds": [0, 1], "base": base}))
    result = launch(load_sweep(path, tmp_path / "root"), devices=1)
    assert len(result.finished) == 2
