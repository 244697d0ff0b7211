"""Frozen-feature probes of one model: linear, attentive and k-NN, chosen on a hold-out, tested once.

Protocol. The backbone is frozen and used with bidirectional attention; a probe reads the average of raw block outputs.
The training split is cut once, stratified and seeded, into a fit part and a hold-out. Every head of the grid (learning
rate x weight decay x block set) is trained on the fit part; the hold-out chooses; the chosen head is scored once on the
test split, as is the best head on the last six blocks (half of the blocks of a shallow model), which is the paper's
default and has no choice of blocks in it.

Between the two the chosen heads train once more, with their settings, on the whole training split (`refit: false` in a
task leaves that out, and every result says which). The batch norm uses the exact statistics of what its head was
trained on instead of a running estimate, which makes results independent of batch and world size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aimscale.aim.model import AIM
from aimscale.aim.weights import write_weights
from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features import (
    ALONE,
    CACHE_GB,
    EXTRACT_BATCH,
    AimBackbone,
    Backbone,
    BlockSet,
    LabelledImages,
    PixelBackbone,
    ProbeError,
    averages,
    batched,
    block_sets,
    holdout_split,
    open_task,
    share,
    token_source,
)
from aimscale.harness.probe.files import SCHEMA_VERSION, Pause, as_entry, finished_probes, task_key, task_lock
from aimscale.harness.probe.fit import Candidate, GridFit, Split, best
from aimscale.harness.probe.heads import Setting
from aimscale.harness.probe.lora import RANK, adapt
from aimscale.harness.probe.progress import ProbeProgress
from aimscale.harness.probe.scores import Answers, answers, score
from aimscale.harness.probe.views import PublishedViews
from aimscale.harness.run.config import ModelSection, ProbeSection
from aimscale.harness.run.files import write_json


def _go_on() -> None:
    """Never pause."""


def probe_model(
    model: AIM,
    section: ProbeSection,
    *,
    model_section: ModelSection,
    seed: int,
    out: Path | None,
    group: Group = ALONE,
    cache_gb: float = CACHE_GB,
    name: str = "aim",
    since: float | None = None,
    pause: Pause = _go_on,
) -> list[dict[str, Any]]:
    """Probe one AIM on one task.

    Args:
        model: weights loaded, on its device; left as it was found.
        section: the task.
        model_section: image geometry.
        seed: splits the hold-out, draws the heads' start and the order of images.
        out: folder for `<task>.json`, the same with per-class counts and the whole grid; None writes nothing.
        group: the ranks that share the images; all of them call this and get the same entries, rank 0 writes.
        cache_gb: memory for a rank's cached tokens; beyond it every epoch runs the backbone again.
        name: identifies the weights in the file.
        since: return what the file says if it comes from the same name, task, data and seed and is not older than this
            Unix time; None probes in any case.
        pause: called by all ranks together wherever work is saved; raises to stop there, and the next call goes on.

    Returns:
        One entry per kind for the `probes` list of a results row.

    Raises:
        ProbeError: unlabelled or unmatched data, or too few images.
    """
    was_training = model.training
    model.eval()
    try:
        return probe_backbone(
            AimBackbone(model, name),
            section,
            model_section=model_section,
            seed=seed,
            out=out,
            group=group,
            cache_gb=cache_gb,
            since=since,
            pause=pause,
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
    group: Group = ALONE,
    cache_gb: float = CACHE_GB,
    since: float | None = None,
    pause: Pause = _go_on,
) -> list[dict[str, Any]]:
    """Probe any frozen backbone on one task; arguments as for `probe_model`."""
    _check_kinds(backbone, section)
    train, test = open_task(section, model_section)
    if section.augmentation == "published":
        train = replace(train, views=PublishedViews(model_section, seed))
    key = task_key(backbone.name, section, train.dataset.fingerprint, test.dataset.fingerprint, seed)
    with task_lock(out, section.task, group, pause):
        if since is not None and out is not None:
            path = out / f"{section.task}.json"
            done = group.from_first(finished_probes(path, key, since=since) if group.is_first else None)
            if done is not None:
                return [as_entry(detail) for detail in done]
        progress = ProbeProgress(out, section.task, key) if out is not None else None
        probing = _Probing(backbone, section, train, test, seed, out, group, cache_gb, progress, pause)
        started = time.monotonic()
        details = probing.details()
        if out is not None and group.is_first:
            document = {
                "schema_version": SCHEMA_VERSION,
                "key": key,
                "backbone": backbone.name,
                "task": section.model_dump(mode="json"),
                "classes": list(train.classes),
                "world_size": group.world_size,
                "wall_s": time.monotonic() - started,
                "probes": details,
            }
            write_json(out / f"{section.task}.json", document)
            assert progress is not None
            progress.clear()
        return [as_entry(detail) for detail in details]


@dataclass(frozen=True)
class _Probing:
    """One task under way; arguments as for `probe_model`."""

    backbone: Backbone
    section: ProbeSection
    train: LabelledImages
    test: LabelledImages
    seed: int
    out: Path | None
    group: Group
    cache_gb: float
    progress: ProbeProgress | None
    pause: Pause

    def details(self) -> list[dict[str, Any]]:
        """One entry a kind, with per-class counts and the grid."""
        fit, held = holdout_split(self.train.labels, self.section.holdout_fraction, self.seed)
        split = Split(self.train.labels, fit, held, len(self.train.classes))
        about = {
            "num_fit": len(fit),
            "num_holdout": len(held),
            "refit": self.section.refit,
            "augmentation": self.section.augmentation,
            "seed": self.seed,
        }
        details = self._frozen_once(split) if set(self.section.kinds) - {"lora"} else []
        if "lora" in self.section.kinds:
            details = [*details, self._lora(split)]
        return [detail | about for detail in details]

    def _frozen_once(self, split: Split) -> list[dict[str, Any]]:
        """The frozen probes, kept while LoRA, which takes longer, is still under way."""
        saved = self.progress.load("frozen") if self.progress and self.group.is_first else None
        saved = self.group.from_first(saved)
        if saved:
            found: list[dict[str, Any]] = saved["details"]
            return found
        found = self._frozen(split)
        if self.progress and "lora" in self.section.kinds:
            if self.group.is_first:
                self.progress.save("frozen", {"details": found})
            self.pause()
        return found

    def _frozen(self, split: Split) -> list[dict[str, Any]]:
        section, test, group = self.section, self.test, self.group
        kinds = [kind for kind in section.kinds if kind != "lora"]
        sets, last = block_sets(self.backbone.num_blocks)
        fitting = GridFit(
            split=split,
            section=section,
            num_heads=self.backbone.num_heads,
            seed=self.seed,
            group=group,
            progress=self.progress,
            pause=self.pause,
        )
        source = token_source(self.backbone, self.train, group, cache_gb=self.cache_gb)
        candidates = fitting.candidates(source, sets)
        # for each kind the best of all, and the best on the fixed block set
        chosen = [best(candidates, kind, blocks) for kind in kinds for blocks in (None, last)]
        if section.refit:
            chosen = fitting.refit(source, chosen)
        given = answers_on_test(self.backbone, test, chosen, group)
        details = []
        for kind, top, fixed, on_top, on_fixed in zip(
            kinds, chosen[::2], chosen[1::2], given[::2], given[1::2], strict=True
        ):
            on_last = score(on_fixed, test.labels, test.classes)
            details.append(
                _detail(section, kind, test, on_top, top.blocks, top.setting)
                | {
                    "num_neighbours": top.num_neighbours,
                    "holdout_top1": top.holdout_top1,
                    "last_blocks": list(fixed.blocks),
                    **{f"last_{name}": on_last[name] for name in ("top1", "top1_lo95", "top1_hi95")},
                    "grid": [_grid_row(candidate) for candidate in candidates if candidate.kind == kind],
                }
            )
            if self.out is not None and group.is_first and top.head is not None:
                save_head(top, self.out / f"{section.task}.{kind}.safetensors")
        return details

    def _lora(self, split: Split) -> dict[str, Any]:
        assert isinstance(self.backbone, AimBackbone)
        _, last = block_sets(self.backbone.num_blocks)
        adapted = adapt(
            self.backbone.model,
            self.section,
            split,
            self.train,
            self.test,
            blocks=last,
            seed=self.seed,
            group=self.group,
            progress=self.progress,
            pause=self.pause,
        )
        points = [{"lr": p.lr, "weight_decay": p.weight_decay, "holdout_top1": top1} for p, top1 in adapted.grid]
        return (
            _detail(self.section, "lora", self.test, adapted.given, last, adapted.setting)
            | {"holdout_top1": adapted.holdout_top1, "lora_rank": RANK, "num_trained": adapted.num_trained}
            | {"grid": points}
        )


def _check_kinds(backbone: Backbone, section: ProbeSection) -> None:
    if isinstance(backbone, PixelBackbone) and "attentive" in section.kinds:
        raise ProbeError(f"{backbone.name} has one token an image, nothing to attend over; leave out kind 'attentive'")
    if "lora" in section.kinds and not isinstance(backbone, AimBackbone):
        raise ProbeError(f"LoRA adapts AIM trunks, not {backbone.name}; leave out kind 'lora'")


def _detail(
    section: ProbeSection,
    kind: str,
    test: LabelledImages,
    given: Answers,
    blocks: BlockSet,
    setting: Setting | None,
) -> dict[str, Any]:
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


def save_head(candidate: Candidate, path: Path) -> None:
    """Write a trained head under the released names `head.*`; the blocks it averages are in the file's metadata."""
    assert candidate.head is not None
    state = {f"head.{name}": tensor for name, tensor in candidate.head.state_of(0, 0).items()}
    state["head.bn.num_batches_tracked"] = torch.tensor(0)
    write_weights(state, path, {"kind": candidate.kind, "blocks": json.dumps(candidate.blocks)})


@torch.no_grad()
def answers_on_test(
    backbone: Backbone, test: LabelledImages, candidates: Sequence[Candidate], group: Group
) -> list[Answers]:
    """What each candidate says about the test split, from one backbone pass that the ranks share."""
    blocks = sorted({block for candidate in candidates for block in candidate.blocks})
    own = share(range(len(test)), group)
    parts: list[list[Answers]] = [[] for _ in candidates]
    for indices, images in test.ahead(batched(own, EXTRACT_BATCH)):
        tokens = backbone.features(images, blocks)
        for candidate, part in zip(candidates, parts, strict=True):
            scores = candidate.scorer(averages(tokens, [candidate.blocks], blocks))
            part.append(answers(scores, test.labels[indices]))
    mine = [
        (torch.cat([a.predicted for a in part]), torch.cat([a.in_top5 for a in part])) if part else None
        for part in parts
    ]
    gathered = group.gather((own, mine))
    merged = []
    for position in range(len(candidates)):
        predicted = torch.empty(len(test), dtype=torch.int64)
        in_top5 = torch.empty(len(test), dtype=torch.bool)
        for indices, theirs in gathered:
            if indices:
                predicted[indices], in_top5[indices] = theirs[position]
        merged.append(Answers(predicted, in_top5))
    return merged


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
