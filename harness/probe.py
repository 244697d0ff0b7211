"""Frozen-feature probes of one model: linear, attentive and k-NN, chosen on a hold-out, tested once.

Protocol. The backbone is frozen and used with bidirectional attention; a probe reads the average of raw block outputs.
The training split is cut once, stratified and seeded, into a fit part and a hold-out. Every head of the grid (learning
rate x weight decay x block set) is trained on the fit part; the hold-out chooses; the chosen head is scored once on the
test split, as is the best head on the last six blocks (half of the blocks of a shallow model), which is the paper's
default and has no choice of blocks in it.

Two choices differ from a plain batch norm and say so: its statistics are those of the fit part, exactly, instead of a
running estimate, which makes results independent of batch and world size; and heads are not retrained on the
hold-out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aim.model import AIM
from harness.config import ModelSection, ProbeSection, fingerprint
from harness.probe_features import (
    CACHE_GB,
    EXTRACT_BATCH,
    AimBackbone,
    Backbone,
    LabelledImages,
    PixelBackbone,
    ProbeError,
    averages,
    batched,
    block_sets,
    holdout_split,
    open_task,
    token_source,
)
from harness.probe_fit import Candidate, Split, best, fit_candidates
from harness.probe_score import score
from harness.rundir import write_json

SCHEMA_VERSION = 1
"""Of `probes/<images_seen>/<task>.json`."""


def probe_model(
    model: AIM,
    section: ProbeSection,
    *,
    model_section: ModelSection,
    seed: int,
    out: Path | None,
    cache_gb: float = CACHE_GB,
) -> list[dict[str, Any]]:
    """Probe one AIM on one task.

    Args:
        model: weights loaded, on its device; left as it was found.
        section: the task.
        model_section: image geometry.
        seed: splits the hold-out, draws the heads' start and the order of images.
        out: folder for `<task>.json`, the same with per-class counts and the whole grid; None writes nothing.
        cache_gb: memory for cached tokens; beyond it every epoch runs the backbone again.

    Returns:
        One entry per kind for the `probes` list of a results row.

    Raises:
        ProbeError: unlabelled or unmatched data, or too few images.
    """
    was_training = model.training
    model.eval()
    try:
        return probe_backbone(
            AimBackbone(model), section, model_section=model_section, seed=seed, out=out, cache_gb=cache_gb
        )
    finally:
        model.train(was_training)


def probe_backbone(
    backbone: Backbone,
    section: ProbeSection,
    *,
    model_section: ModelSection,
    seed: int,
    out: Path | None,
    cache_gb: float = CACHE_GB,
) -> list[dict[str, Any]]:
    """Probe any frozen backbone on one task; arguments as for `probe_model`."""
    started = time.monotonic()
    if isinstance(backbone, PixelBackbone) and "attentive" in section.kinds:
        raise ProbeError(f"{backbone.name} has one token an image, nothing to attend over; leave out kind 'attentive'")
    train, test = open_task(section, model_section)
    fit, held = holdout_split(train.labels, section.holdout_fraction, seed)
    split = Split(train.labels, fit, held, len(train.classes))
    sets, last = block_sets(backbone.num_blocks)
    source = token_source(backbone, train, cache_gb=cache_gb)
    candidates = fit_candidates(source, split, section, sets, num_heads=backbone.num_heads, seed=seed)
    chosen = {kind: (best(candidates, kind), best(candidates, kind, last)) for kind in section.kinds}
    del source
    logits = score_candidates(backbone, test, [candidate for pair in chosen.values() for candidate in pair])
    entries, details = [], []
    for position, (kind, (top, fixed)) in enumerate(chosen.items()):
        result = score(logits[2 * position], test.labels, test.classes)
        on_last = score(logits[2 * position + 1], test.labels, test.classes)
        per_class = result.pop("per_class")
        entry = {
            "task": section.task,
            "kind": kind,
            "blocks": list(top.blocks),
            "num_classes": split.num_classes,
            **result,
            "lr": top.setting.lr if top.setting else None,
            "weight_decay": top.setting.weight_decay if top.setting else None,
            "num_neighbours": top.num_neighbours,
            "lr_at_edge": len(section.lrs) > 1 and top.setting is not None and top.setting.lr in _edges(section.lrs),
            "holdout_top1": top.holdout_top1,
            "last_blocks": list(fixed.blocks),
            **{f"last_{key}": on_last[key] for key in ("top1", "top1_lo95", "top1_hi95")},
            "num_fit": len(fit),
            "num_holdout": len(held),
            "seed": seed,
        }
        entries.append(entry)
        details.append({**entry, "per_class": per_class, "grid": [_grid_row(c) for c in candidates if c.kind == kind]})
    if out is not None:
        document = {
            "schema_version": SCHEMA_VERSION,
            "backbone": backbone.name,
            "task": section.model_dump(mode="json"),
            "task_hash": fingerprint(section),
            "data": {"train": train.dataset.fingerprint, "test": test.dataset.fingerprint},
            "classes": list(train.classes),
            "wall_s": time.monotonic() - started,
            "probes": details,
        }
        write_json(out / f"{section.task}.json", document)
    return entries


@torch.no_grad()
def score_candidates(backbone: Backbone, test: LabelledImages, candidates: Sequence[Candidate]) -> list[Tensor]:
    """Class scores (n, K) of each candidate on the test split, from one backbone pass."""
    blocks = sorted({block for candidate in candidates for block in candidate.blocks})
    parts: list[list[Tensor]] = [[] for _ in candidates]
    for indices in batched(range(len(test)), EXTRACT_BATCH):
        tokens = backbone.features(test.images(indices), blocks)
        for candidate, part in zip(candidates, parts, strict=True):
            part.append(candidate.scorer(averages(tokens, [candidate.blocks], blocks)).cpu())
    return [torch.cat(part) for part in parts]


def _edges(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


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
