"""Steps of two devices, a matrix of the model as large as the reduction bucket, against one device's and FSDP2's.

This is the configuration of large runs: reductions overlap with the backward pass. On a GPU they run on a stream of
their own; `AIMSCALE_TEST_DEVICE=cpu` runs the same on two CPU ranks over gloo, with a small model and a small bucket.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference_engine import ReferenceEngine

from aimscale.aim.config import model_config
from aimscale.aim.cost import largest_param
from aimscale.aim.model import AIM
from aimscale.harness.bench.train import random_batches
from aimscale.harness.data.stream.loader import count_targets
from aimscale.harness.device import memory
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.distributed.group import Group, find_placement, start_group, stop_group
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.engine import Engine

DEVICE = os.environ.get("AIMSCALE_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="fewer than two cards"),
]

SIZE, BUCKET = ("w3584-d2", memory.MAX_BUCKET_VALUES) if DEVICE == "cuda" else ("w256-d2", 100_000)
CONFIG = model_config(SIZE, image_size=32, patch_size=8, head_rule="none")
CASES = [(precision, stage) for precision in ("fp32", "bf16") for stage in (1, 2, 3)]
TOLERANCES = {"fp32": 1e-3 if DEVICE == "cuda" else 1e-5, "bf16": 2e-2}
"""Relative errors of losses and norms; float32 products are TF32 on a card."""
NUM_IMAGES, NUM_STEPS = 8, 3
Outcome = tuple[list[float], list[float]]
"""Losses and gradient norms of the steps."""


def outcome(engine: Engine | ReferenceEngine, group: Group) -> Outcome:
    """Take the steps, of two micro-batches, on this rank's share of the images."""
    losses, norms = [], []
    whole = random_batches(CONFIG, NUM_IMAGES, NUM_IMAGES // (2 * group.world_size))
    num_targets = count_targets(whole, CONFIG.num_tokens)
    own = [batch.on(group.device) for batch in whole[2 * group.rank : 2 * group.rank + 2]]
    for _ in range(NUM_STEPS):
        taken = engine.step(own, num_targets=num_targets, lr=1e-3)
        losses.append(group.sum_tensor(taken.loss_sum.double()).item() / num_targets)
        norms.append(float(taken.grad_norm))
    engine.close()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return losses, norms


def main(out: Path) -> None:
    """Write the outcomes of every case and of FSDP2, or on one rank those of ZeRO 1; every rank calls this."""
    memory.MAX_BUCKET_VALUES = BUCKET
    torch.set_num_threads(1)
    group = start_group(find_placement(), DEVICE)
    found: dict[str, Outcome] = {}
    for precision, stage in CASES if group.world_size > 1 else [case for case in CASES if case[1] == 1]:
        optimiser = OptimiserSection(batch_size=NUM_IMAGES, precision=precision, clip_norm=0.5)  # type: ignore[arg-type]
        options = EngineOptions(zero_stage=stage)
        found[f"{precision} {stage}"] = outcome(Engine(CONFIG, optimiser, options, group), group)
        if precision not in found and group.world_size > 1:
            reference = ReferenceEngine(AIM(CONFIG), optimiser, options, group, sharded=True)
            found[precision] = outcome(reference, group)
    if group.is_first:
        out.write_text(json.dumps(found))
    stop_group()


def outcomes(num_ranks: int, out: Path) -> dict[str, Outcome]:
    """Run `main` under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    env = {name: value for name, value in os.environ.items() if DEVICE == "cpu" or name != "DS_ACCELERATOR"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, __file__, str(out)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Outcome] = json.loads(out.read_text())
    return found


def test_two_ranks_take_the_steps_of_one_and_of_fsdp2(tmp_path: Path) -> None:
    assert largest_param(CONFIG) > BUCKET
    one, two = (outcomes(num_ranks, tmp_path / str(num_ranks)) for num_ranks in (1, 2))
    for precision, stage in CASES:
        ours = two[f"{precision} {stage}"]
        for expected in (one[f"{precision} 1"], two[precision]):
            for found, theirs in zip(ours, expected, strict=True):
                assert found == pytest.approx(theirs, rel=TOLERANCES[precision]), (precision, stage)
        assert ours[0][-1] < ours[0][0]


if __name__ == "__main__":  # a rank of `outcomes`
    main(Path(sys.argv[1]))
    os._exit(0)  # gloo's threads may outlive the interpreter
