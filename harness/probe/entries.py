"""What trained heads answer on the test split, and what a row, a task's file and a head's file say of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aimscale.aim.weights import write_weights
from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.blocks import averages
from aimscale.harness.probe.features.extraction import Features, batched, share
from aimscale.harness.probe.features.images import LabelledImages
from aimscale.harness.probe.features.sizes import BlockSet
from aimscale.harness.probe.heads.fit import Candidate
from aimscale.harness.probe.heads.scores import Answers, answers, score, together
from aimscale.harness.probe.heads.stacks import Setting
from aimscale.harness.run.config import ProbeSection

TEST_BATCH = 64
"""Test images at a time."""


@torch.no_grad()
def answers_of_heads(
    features: Features, test: LabelledImages, candidates: Sequence[Candidate], group: Group
) -> list[Answers]:
    """What each candidate's head says about the test split; the ranks share its images."""
    own = list(batched(share(range(len(test)), group), TEST_BATCH))
    parts: list[list[Answers]] = [[] for _ in candidates]
    for chunk, outputs in zip(own, features.parts(own), strict=True):
        for candidate, part in zip(candidates, parts, strict=True):
            assert candidate.head is not None
            scores = candidate.head(averages(outputs, [candidate.blocks]))[0, :, 0]
            part.append(answers(scores, test.labels[chunk]))
    return [together(part, len(test), group) for part in parts]


def entry(
    section: ProbeSection, kind: str, test: LabelledImages, given: Answers, blocks: BlockSet, setting: Setting | None
) -> dict[str, Any]:
    """Any probe's: what it read, how it scored, and its setting."""
    return {
        "task": section.task,
        "kind": kind,
        "blocks": list(blocks),
        "num_classes": len(test.classes),
        **score(given, test.labels, test.classes),
        "lr": setting.lr if setting else None,
        "weight_decay": setting.weight_decay if setting else None,
        # the best rate at the end of the grid says that the grid should go on there
        "lr_at_edge": setting is not None
        and len(section.lrs) > 1
        and setting.lr in (min(section.lrs), max(section.lrs)),
    }


def frozen_entry(
    section: ProbeSection,
    test: LabelledImages,
    top: Candidate,
    fixed: Candidate,
    on_top: Answers,
    on_fixed: Answers,
    candidates: Sequence[Candidate],
) -> dict[str, Any]:
    """A frozen probe's: the chosen one, the best on the last blocks, and the whole grid."""
    on_last = score(on_fixed, test.labels, test.classes)
    return entry(section, top.kind, test, on_top, top.blocks, top.setting) | {
        "num_neighbours": top.num_neighbours,
        "holdout_top1": top.holdout_top1,
        "last_blocks": list(fixed.blocks),
        **{f"last_{name}": on_last[name] for name in ("top1", "top1_lo95", "top1_hi95")},
        "grid": [_grid_row(candidate) for candidate in candidates if candidate.kind == top.kind],
    }


def _grid_row(candidate: Candidate) -> dict[str, Any]:
    setting = candidate.setting
    return {
        "blocks": list(candidate.blocks),
        "lr": setting.lr if setting else None,
        "weight_decay": setting.weight_decay if setting else None,
        "num_neighbours": candidate.num_neighbours,
        "holdout_top1": candidate.holdout_top1,
        "holdout_loss": candidate.holdout_loss,
    }


def save_head(candidate: Candidate, path: Path) -> None:
    """Write a trained head under the released names `head.*`; the blocks it averages are in the file's metadata."""
    assert candidate.head is not None
    state = {f"head.{name}": tensor for name, tensor in candidate.head.state_of_one().items()}
    state["head.bn.num_batches_tracked"] = torch.tensor(0)
    write_weights(state, path, {"kind": candidate.kind, "blocks": json.dumps(candidate.blocks)})
