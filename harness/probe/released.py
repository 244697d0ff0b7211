"""Score the attentive head that came with imported weights on a task: the published accuracies, by one command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from aimscale.aim.config import ModelConfig
from aimscale.aim.weights import load_probe
from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.backbones import DTYPES, matmul_precision
from aimscale.harness.probe.features.extraction import ALONE, StreamedTokens, batched, own_indices
from aimscale.harness.probe.features.images import open_labelled
from aimscale.harness.probe.features.tasks import ProbeError
from aimscale.harness.probe.files import add_probes, as_entry, task_key
from aimscale.harness.probe.heads.fit import TEST_BATCH
from aimscale.harness.probe.heads.scores import gather_predictions, score, to_predictions
from aimscale.harness.probe.pending_evaluations import update_row
from aimscale.harness.probe.run import backbone_of
from aimscale.harness.run.budgets import chosen_budgets
from aimscale.harness.run.config import ProbeSection
from aimscale.harness.run.directory import RunDir

RELEASED = "released"
"""Kind of such a probe."""
RELEASED_HEAD = "released_head.safetensors"
"""File name in the directory of an imported run."""
BEST_BLOCKS = {
    "aim-600M": tuple(range(14, 20)),
    "aim-1B": tuple(range(12, 18)),
    "aim-3B": tuple(range(12, 18)),
    "aim-7B": tuple(range(14, 20)),
}
"""Blocks that the published best-layers heads average (the authors' inference code)."""

HeadBlocks = Literal["last", "best"]


def released_blocks(config: ModelConfig, which: HeadBlocks) -> list[int]:
    """Return the blocks that a released head averages."""
    if which == "last":
        return list(range(max(0, config.depth - 6), config.depth))
    if config.name not in BEST_BLOCKS:
        raise ProbeError(f"no best blocks are published for {config.name}; import its head with --head-blocks last")
    return list(BEST_BLOCKS[config.name])


@torch.no_grad()
def score_released(
    run_dir: Path, sections: Sequence[ProbeSection], *, group: Group = ALONE
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Score an imported run's own head on the test splits of tasks; yields (images seen, entries) after each task.

    Nothing is trained. The entry, of kind `released`, goes to the task's file and the run's row.
    """
    run = RunDir(run_dir)
    config = run.load_config()
    path = run.path / RELEASED_HEAD
    if not path.is_file():
        raise ProbeError(
            f"{run_dir} has no released head; import one with `aimscale weights import FILE RUN_DIR --head HEAD_FILE`"
        )
    (budget,) = chosen_budgets(run, None)
    backbone = backbone_of(run, config, budget, group)
    head = load_probe(path, backbone.config).to(group.device).eval()
    with safe_open(path, framework="pt") as file:
        blocks: list[int] = json.loads(file.metadata()["blocks"])
    for section in sections:
        test = open_labelled(section.test, section, config.training.model, config.runtime)
        if len(test.classes) != head.linear.out_features:
            raise ProbeError(
                f"task '{section.task}': {section.test} has {len(test.classes)} classes and the released head "
                f"{head.linear.out_features}; score it on the data set that it was trained for"
            )
        backbone.use(DTYPES[section.precision])
        own = own_indices(range(len(test)), group)
        chunks = list(batched(own, TEST_BATCH))
        with matmul_precision(section.precision):
            parts = [
                to_predictions(head(outputs[blocks].float().mean(0)), test.labels[chunk])
                for chunk, outputs in zip(chunks, StreamedTokens(backbone, test, group).parts(chunks), strict=True)
            ]
        prints = test.dataset.fingerprint, test.dataset.fingerprint  # it was trained elsewhere
        key = task_key(backbone.name, section, *prints, config.training.seed)
        detail = {
            "task": section.task,
            "kind": RELEASED,
            "blocks": blocks,
            "num_classes": len(test.classes),
            **score(gather_predictions(own, parts, len(test), group), test.labels, test.classes),
            "precision": section.precision,
            "evaluation": key["evaluation"],
            "protocol": key["protocol"],
        }
        if group.is_first:
            add_probes(run.probes_dir(budget), section, key, {RELEASED: detail})
            update_row(run, config, budget)
        yield budget, [as_entry(detail)]
