"""Low-rank adaptation: of a copy, and interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.harness.probe.features.backbones import PixelBackbone
from aimscale.harness.probe.heads.lora import _Adaptation
from aimscale.harness.probe.heads.progress import StepSaver


class Interrupted(Exception):
    pass


def test_lora_adapts_a_copy_of_the_trunk(task: Any, model: AIM) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = task.section(kinds=("lora",), epochs=3, lrs=(1e-2,))
    (lora,) = task.probe(wanted, seed=0, out=None)
    assert (lora["kind"], lora["lora_rank"]) == ("lora", 8)
    assert lora["top1_lo95"] > 2 * lora["chance"]
    d, depth = model.config.width, model.config.depth
    updates = 8 * depth * 3 * (d + d)  # query, value and output projection
    assert lora["num_trained"] == updates + 2 * d * d + d + 10 * d
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="leave out kind 'lora'"):
        task.probe(task.section(kinds=("lora",)), PixelBackbone(), seed=0, out=None)


def test_a_killed_lora_goes_on_to_the_same_numbers(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = task.section(
        kinds=("knn", "lora"), epochs=2, batch_size=40, lrs=(3e-3, 1e-2), train=str(task.root / "some")
    )

    def run(out: Path, pauses: int) -> tuple[Any, int]:
        """Probe until the n-th save; counts the batches trained."""
        left, batches = [pauses], [0]
        batches_of = _Adaptation._batches

        def counted(self: _Adaptation, order: np.ndarray, epoch: int) -> Any:
            for each in batches_of(self, order, epoch):
                batches[0] += 1
                yield each

        def pause() -> None:
            left[0] -= 1
            if not left[0]:
                raise Interrupted

        with monkeypatch.context() as patch:
            patch.setattr(_Adaptation, "_batches", counted)
            try:
                return task.probe(wanted, seed=0, out=out, pause=pause), batches[0]
            except Interrupted:
                return None, batches[0]

    monkeypatch.setattr(StepSaver, "is_due", lambda self: True)
    whole, num_batches = run(tmp_path / "whole", 10**9)
    # saves: the frozen probes, then every step and the end of each point of the grid
    for pauses in (1, 3, num_batches // 2):
        out = tmp_path / f"cut-{pauses}"
        cut, before = run(out, pauses)
        assert cut is None
        assert not list(out.glob("*.json"))
        resumed, after = run(out, 10**9)
        assert resumed == whole, pauses
        assert before + after == num_batches  # no step was trained twice
        assert not list(out.glob("*.partial*"))
