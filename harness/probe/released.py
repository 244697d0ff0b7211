"""Score the attentive head that came with imported weights on a task: the published accuracies, by one command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from aimscale.aim.config import ModelConfig
from aimscale.aim.model import DTYPES
from aimscale.aim.weights import load_probe
from aimscale.harness.distributed.group import ALONE, Group
from aimscale.harness.probe.features.backbones import matmul_precision
from aimscale.harness.probe.features.extraction import StreamedTokens, batched, own_indices
from aimscale.harness.probe.features.images import LabelledImages, open_labelled, read_without_bad
from aimscale.harness.probe.features.tasks import ProbeError
from aimscale.harness.probe.heads.scores import Predictions, gather_predictions, score, to_predictions
from aimscale.harness.probe.heads.training import TEST_BATCH
from aimscale.harness.probe.run import backbone_of
from aimscale.harness.results import add_probes, as_entry, task_key, update_row
from aimscale.harness.run.config import ProbeSection
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.schedule import chosen_budgets

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


def parse_blocks(config: ModelConfig, text: str) -> list[int]:
    """Parse the blocks that a head averages: `last` (six), `best` (as published), or numbers, `14-19`."""
    if text == "last":
        return list(range(max(0, config.depth - 6), config.depth))
    if text == "best":
        if config.name not in BEST_BLOCKS:
            raise ProbeError(f"no best blocks are published for {config.name}; give their numbers, FIRST-LAST")
        return list(BEST_BLOCKS[config.name])
    if not (span := re.fullmatch(r"(\d+)(?:-(\d+))?", text)):
        raise ProbeError(f"'{text}' names no blocks; give last, best, or their numbers, FIRST-LAST")
    return check_blocks(config, range(int(span[1]), int(span[2] or span[1]) + 1))


def check_blocks(config: ModelConfig, blocks: Sequence[int]) -> list[int]:
    """Return the blocks; ProbeError if there are none, or one that the model does not have."""
    if not blocks or min(blocks) < 0 or max(blocks) >= config.depth:
        raise ProbeError(f"a head cannot read blocks {list(blocks)} of {config.name}; it has 0 to {config.depth - 1}")
    return list(blocks)


def read_head_blocks(file: Path) -> list[int]:
    """Read which blocks a head averages from the header of its file in a run directory."""
    with safe_open(file, framework="pt") as opened:
        blocks: list[int] = json.loads(opened.metadata()["blocks"])
    return blocks


@torch.no_grad()
def score_released(
    run_dir: Path, sections: Sequence[ProbeSection], *, group: Group = ALONE
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Score an imported run's own head, without training, on the test splits of tasks; yields (images seen, entries)
    after each task, and writes them to the task's file and the run's row, as of kind `released`."""
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
    blocks = read_head_blocks(path)
    for section in sections:
        max_bad_fraction = config.training.data.max_bad_fraction
        test = open_labelled(section.test, section, config.training.model, config.runtime, max_bad_fraction)
        if len(test.classes) != head.linear.out_features:
            raise ProbeError(
                f"task '{section.task}': {section.test} has {len(test.classes)} classes and the released head "
                f"{head.linear.out_features}; score it on the data set that it was trained for"
            )
        backbone.use(DTYPES[section.precision])

        def predict(images: LabelledImages) -> Predictions:
            indices = own_indices(range(len(images)), group)
            chunks = list(batched(indices, TEST_BATCH))
            parts = [
                to_predictions(head(outputs[blocks].float().mean(0)), images.labels[chunk])
                for chunk, outputs in zip(chunks, StreamedTokens(backbone, images, group).parts(chunks), strict=True)
            ]
            return gather_predictions(indices, parts, len(images), group)

        with matmul_precision(section.precision):
            test, predictions = read_without_bad(test, group, predict)
        prints = test.dataset.fingerprint, test.dataset.fingerprint  # it was trained elsewhere
        key = task_key(backbone.name, section, *prints, config.training.seed)
        detail = {
            "task": section.task,
            "kind": RELEASED,
            "blocks": blocks,
            "num_classes": len(test.classes),
            **score(predictions, test.labels, test.classes),
            "precision": section.precision,
            "evaluation": key["evaluation"],
            "protocol": key["protocol"],
        }
        if group.is_first:
            add_probes(run.probes_dir(budget), section, key, {RELEASED: detail})
            update_row(run, config, budget)
        yield budget, [as_entry(detail)]
