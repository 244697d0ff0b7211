"""Frozen-feature probes of one model: linear, attentive, efficient and k-NN, chosen on a hold-out, tested once.

Protocol. The backbone is frozen and used with bidirectional attention; a probe reads the average of raw block outputs.
The training split is cut once, stratified and seeded, into a fit part and a hold-out. Every head of the grid (learning
rate x block set) is trained twice in the same pass, on the fit part and on the whole split; the hold-out chooses among
the former, and the latter of the chosen setting is scored once on the test split, as is that of the best setting on the
last six blocks (half of the blocks of a shallow model), which is the paper's default and has no choice of blocks in it.

The batch norm uses the exact statistics of what its head was trained on instead of a running estimate, which makes
results independent of batch and world size.

Work. One backbone pass over both splits gives the pooled features of every block and all statistics; linear and k-NN
probes need nothing else. The attentive heads of the whole grid train on one further backbone pass per batch. Kinds that
train together are done together, and kept in the task's file: a killed probe repeats those under way.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aimscale.aim.weights import write_weights
from aimscale.harness.data.errors import DataError
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.stream.overlap import count_shared
from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.backbones import (
    DTYPES,
    AimBackbone,
    Backbone,
    PixelBackbone,
    matmul_precision,
    precision_difference,
)
from aimscale.harness.probe.features.benchmarks import ProbeError
from aimscale.harness.probe.features.extraction import ALONE, FeaturePass, Features, Pause, SplitFeatures
from aimscale.harness.probe.features.images import LabelledImages, holdout_split, open_task
from aimscale.harness.probe.features.sizes import BlockSet, block_sets
from aimscale.harness.probe.features.views import PublishedViews
from aimscale.harness.probe.files import PROTOCOL, Key, add_probes, as_entry, finished_probes, task_key
from aimscale.harness.probe.heads.fit import Candidate, GridFit, Split, answers_of_heads, best
from aimscale.harness.probe.heads.knn import Neighbours
from aimscale.harness.probe.heads.lora import RANK, adapt
from aimscale.harness.probe.heads.scores import Answers, score
from aimscale.harness.probe.heads.stacks import ON_TOKENS, STACKS, AttentiveStack
from aimscale.harness.run.config import ModelSection, ProbeSection

COMPARED_IMAGES = 16
"""Training images on which bf16 features are compared with fp32 ones."""

Detail = dict[str, Any]
"""What a task's file says of one kind of probe: a row's entry, per-class counts and the grid."""


def probe_backbone(
    backbone: Backbone,
    section: ProbeSection,
    *,
    model_section: ModelSection,
    seed: int,
    out: Path | None,
    group: Group = ALONE,
    pause: Pause = lambda: None,
    pools: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Probe a frozen backbone on one task.

    Args:
        backbone: weights loaded, on its device; used in the task's precision afterwards.
        seed: splits the hold-out, draws the heads' start and the order of images.
        out: folder of the evaluation's file, the same with per-class counts and the whole grid: kinds that it has of
            the same weights, settings, data and seed are not done again; None reads and writes nothing.
        group: the ranks that share the images; all of them call this and get the same entries, rank 0 writes.
        pause: called by all ranks together, often; raises to stop there, and the next call repeats the kinds under way.
        pools: data sets that the backbone was pre-trained on, among which test images are looked for; None where they
            are not known.

    Returns:
        One entry per kind for the `probes` list of a results row.

    Raises:
        ProbeError: unlabelled or unmatched data, too few images, features that are not finite or have no room.
    """
    _check_kinds(backbone, section)
    train, test = open_task(section, model_section)
    if section.augmentation == "published":
        train = replace(train, views=PublishedViews(model_section, seed))
    key = task_key(backbone.name, section, train.dataset.fingerprint, test.dataset.fingerprint, seed)
    found: dict[str, Detail] = {}
    if out is not None:
        found = group.from_first(finished_probes(out, section.task, key) if group.is_first else None)
    kinds = [kind for kind in section.kinds if kind not in found]
    if not kinds:
        return [as_entry(found[kind]) for kind in section.kinds]
    started = time.monotonic()
    shared = group.from_first(_shared_images(section, train, test, pools) if group.is_first else None)
    with matmul_precision(section.precision):
        probing = _Probing(backbone, section, train, test, key, group, pause)
        for details in probing.details(kinds, out):
            about = {"evaluation": key["evaluation"], "protocol": PROTOCOL, "seed": seed, **shared}
            done = {detail["kind"]: detail | about for detail in details}
            found |= done
            if out is not None and group.is_first:
                took = {"world_size": group.world_size, "wall_s": time.monotonic() - started}
                add_probes(out, section, key, done, classes=list(train.classes), **took)
            pause()
    return [as_entry(found[kind]) for kind in section.kinds]


class _Probing:
    """One task on a backbone in the task's precision; all ranks make it and call its methods together."""

    def __init__(
        self,
        backbone: Backbone,
        section: ProbeSection,
        train: LabelledImages,
        test: LabelledImages,
        key: Key,
        group: Group,
        pause: Pause,
    ) -> None:
        """Hold some images out, and bring the backbone into the task's precision, saying what that changes."""
        self.backbone, self.section, self.train, self.test = backbone, section, train, test
        self.seed, self.evaluation, self.group, self.pause = int(key["seed"]), key["evaluation"], group, pause
        self.split = Split(
            train.labels, *holdout_split(train.labels, section.holdout_fraction, self.seed), len(train.classes)
        )
        images = train.images(range(min(COMPARED_IMAGES, len(train))))
        self.difference = precision_difference(backbone, images, DTYPES[section.precision])
        backbone.use(DTYPES[section.precision])
        if self.difference and group.is_first:
            _say(f"{section.task}: features in bf16 differ from fp32 by {100 * self.difference:.2f} % of their spread")

    def details(self, kinds: Sequence[str], out: Path | None) -> Iterator[list[Detail]]:
        """What is found about some kinds of probe, those together that are done together; heads go to `out`."""
        frozen = [kind for kind in kinds if kind != "lora"]
        has_views = self.train.views is not None
        if frozen:
            features = FeaturePass(
                backbone=self.backbone,
                group=self.group,
                precision=self.section.precision,
                for_tokens=has_views or not set(ON_TOKENS).isdisjoint(kinds),
                folder=out,
                pause=self.pause,
            )
            fitted, tested = features.split(self.train, self.split.fit), features.split(self.test)
            for some in _together(frozen, has_views):
                found = (
                    [self._neighbours(fitted, tested)] if some == ["knn"] else self._heads(some, fitted, tested, out)
                )
                yield [detail | {"precision_difference": self.difference} for detail in found]
        if "lora" in kinds:
            yield [self._lora()]

    def _heads(
        self, kinds: Sequence[str], fitted: SplitFeatures, tested: SplitFeatures, out: Path | None
    ) -> list[Detail]:
        """Train, choose and score the heads of some kinds."""
        sets, last = block_sets(self.backbone.num_blocks)
        fitting = GridFit(
            split=self.split,
            section=self.section,
            num_heads=self.backbone.num_heads,
            seed=self.seed,
            features=fitted,
            group=self.group,
            pause=self.pause,
        )
        is_pooled = self.train.views is None and list(kinds) == ["linear"]
        candidates = fitting.candidates(fitted.pooled if is_pooled else fitted.tokens, kinds, sets, last)
        details = []
        for kind in kinds:
            top, fixed = best(candidates, kind), best(candidates, kind, last)
            features: Features = tested.pooled if kind == "linear" else tested.tokens
            given = answers_of_heads(features, self.test, (top, fixed), self.group)
            details.append(self._detail(top, fixed, given, candidates))
            if kind == "attentive" and out is not None and self.group.is_first:
                _save_head(top, out / f"{self.section.task}-{self.evaluation}.{kind}.safetensors")
        return details

    def _neighbours(self, fitted: SplitFeatures, tested: SplitFeatures) -> Detail:
        """Fill, choose, fill again with everything and score k-NN."""
        sets, last = block_sets(self.backbone.num_blocks)
        search = Neighbours(features=fitted, split=self.split, group=self.group, pause=self.pause)
        candidates = search.candidates(sets)
        top, fixed = best(candidates, "knn"), best(candidates, "knn", last)
        given = [search.answers(each, tested.pooled, self.test) for each in (top, fixed)]
        return self._detail(top, fixed, given, candidates)

    def _lora(self) -> Detail:
        """Adapt the trunk on the last blocks, choose the learning rate, and score it."""
        assert isinstance(self.backbone, AimBackbone)
        _, last = block_sets(self.backbone.num_blocks)
        self.backbone.use(torch.float32)
        adapted = adapt(
            self.backbone.model,
            self.section,
            self.split,
            self.train,
            self.test,
            blocks=last,
            seed=self.seed,
            group=self.group,
            pause=self.pause,
        )
        return self._entry("lora", adapted.given, last, adapted.lr) | {
            "holdout_top1": adapted.holdout_top1,
            "lora_rank": RANK,
            "num_trained": adapted.num_trained,
            "grid": [{"lr": lr, "holdout_top1": top1} for lr, top1 in adapted.grid],
        }

    def _detail(
        self, top: Candidate, fixed: Candidate, given: Sequence[Answers], candidates: Sequence[Candidate]
    ) -> Detail:
        """A frozen probe's: the chosen one, the best on the last blocks, and the whole grid."""
        on_top, on_last = given
        last = score(on_last, self.test.labels, self.test.classes)
        names = ("blocks", "lr", "num_neighbours", "holdout_top1", "holdout_loss")
        return self._entry(top.kind, on_top, top.blocks, top.lr) | {
            "num_neighbours": top.num_neighbours,
            "holdout_top1": top.holdout_top1,
            "last_blocks": list(fixed.blocks),
            **{f"last_{name}": last[name] for name in ("top1", "top1_lo95", "top1_hi95")},
            "precision": self.section.precision,
            "grid": [{name: getattr(each, name) for name in names} for each in candidates if each.kind == top.kind],
        }

    def _entry(self, kind: str, given: Answers, blocks: BlockSet, lr: float | None) -> Detail:
        """Any probe's: what it read, how it scored, and its learning rate."""
        lrs = self.section.lrs
        return {
            "task": self.section.task,
            "kind": kind,
            "blocks": list(blocks),
            "num_classes": len(self.test.classes),
            **score(given, self.test.labels, self.test.classes),
            "lr": lr,
            # the best rate at the end of the grid says that the grid should go on there
            "lr_at_edge": lr is not None and len(lrs) > 1 and lr in (min(lrs), max(lrs)),
            "num_fit": len(self.split.fit),
            "num_holdout": len(self.split.held),
            "augmentation": self.section.augmentation,
        }


def _together(kinds: Sequence[str], has_views: bool) -> list[list[str]]:
    """Frozen kinds that are done together: on pooled features one by one, then all that learn from tokens at once."""
    on_tokens = [kind for kind in STACKS if kind in kinds and (has_views or kind in ON_TOKENS)]
    pooled = [[kind] for kind in ("linear", "knn") if kind in kinds and kind not in on_tokens]
    return pooled + ([on_tokens] if on_tokens else [])


def _save_head(candidate: Candidate, path: Path) -> None:
    """Write a trained head under the released names `head.*`; the blocks it averages are in the file's metadata."""
    assert isinstance(candidate.head, AttentiveStack)
    state = {f"head.{name}": tensor for name, tensor in candidate.head.state_of_one().items()}
    state["head.bn.num_batches_tracked"] = torch.tensor(0)
    write_weights(state, path, {"kind": candidate.kind, "blocks": json.dumps(candidate.blocks)})


def _check_kinds(backbone: Backbone, section: ProbeSection) -> None:
    """Raise ProbeError for a kind of probe that this model cannot have."""
    attending = [kind for kind in section.kinds if kind in ON_TOKENS]
    if isinstance(backbone, PixelBackbone) and attending:
        named = f"{backbone.name} has one token per image, nothing to attend over"
        raise ProbeError(f"{named}; leave out kind '{attending[0]}'")
    if "lora" in section.kinds and not isinstance(backbone, AimBackbone):
        raise ProbeError(f"LoRA adapts AIM trunks, not {backbone.name}; leave out kind 'lora'")


def _shared_images(
    section: ProbeSection, train: LabelledImages, test: LabelledImages, pools: Sequence[str] | None
) -> dict[str, int | None]:
    """How many test images are in the training split, and in the pre-training pool, byte for byte; says so if any are.

    Returns:
        `test_in_train` and `test_in_pool`, the latter None where the pool is unknown or not available.
    """
    counts: dict[str, int | None] = {"test_in_train": count_shared([train.dataset], test.dataset), "test_in_pool": None}
    if pools is not None:
        try:
            counts["test_in_pool"] = count_shared([open_dataset(pool) for pool in pools], test.dataset)
        except DataError:  # moved, remote, or of imported weights
            _say(
                f"{section.task}: the pre-training images are not available, so they were not searched for test images"
            )
    for where, name in (("its training split", "test_in_train"), ("the pre-training pool", "test_in_pool")):
        if counts[name]:
            _say(f"{section.task}: {counts[name]} of {len(test)} test images are in {where}, too; results are marked")
    return counts


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
