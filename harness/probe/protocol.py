"""Frozen-feature probes of one model: linear, attentive, efficient and k-NN, chosen on a hold-out, tested once.

Protocol. The backbone is frozen and used with bidirectional attention; a probe reads the average of raw block outputs.
The training split is cut once, stratified and seeded, into a fit part and a hold-out. Every head of the grid (learning
rate x weight decay x block set) is trained twice in the same pass, on the fit part and on the whole split; the hold-out
chooses among the former, and the latter of the chosen setting is scored once on the test split, as is that of the best
setting on the last six blocks (half of the blocks of a shallow model), which is the paper's default and has no choice
of blocks in it.

The batch norm uses the exact statistics of what its head was trained on instead of a running estimate, which makes
results independent of batch and world size.

Work. One backbone pass over both splits gives the pooled features of every block and all statistics; linear and k-NN
probes need nothing else. The attentive heads of the whole grid train on one further backbone pass per batch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.checks import check_kinds, shared_images
from aimscale.harness.probe.entries import answers_of_heads, entry, frozen_entry, save_head
from aimscale.harness.probe.features.backbones import (
    DTYPES,
    AimBackbone,
    Backbone,
    matmul_precision,
    precision_difference,
)
from aimscale.harness.probe.features.extraction import ALONE, CACHE_GB, DISK_GB, FeaturePass, Features, SplitFeatures
from aimscale.harness.probe.features.images import LabelledImages, holdout_split, open_task
from aimscale.harness.probe.features.sizes import block_sets
from aimscale.harness.probe.features.views import PublishedViews
from aimscale.harness.probe.files import (
    PROTOCOL,
    SCHEMA_VERSION,
    Pause,
    as_entry,
    evaluation_of,
    finished_probes,
    task_key,
    task_lock,
)
from aimscale.harness.probe.heads.fit import Candidate, GridFit, Split, best
from aimscale.harness.probe.heads.lora import RANK, adapt
from aimscale.harness.probe.heads.neighbours import Neighbours
from aimscale.harness.probe.heads.progress import ProbeProgress
from aimscale.harness.probe.heads.scores import Answers
from aimscale.harness.probe.heads.stacks import ON_TOKENS, STACKS
from aimscale.harness.probe.resources import Resources
from aimscale.harness.run.config import ModelSection, ProbeSection
from aimscale.harness.run.files import write_json

COMPARED_IMAGES = 16
"""Training images on which bf16 features are compared with fp32 ones."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a rank may use for features, 10^9 bytes."""

    cache_gb: float = CACHE_GB
    """Memory for tokens, and the same for pooled features."""
    disk_gb: float = DISK_GB
    """Disk for pooled features that memory does not hold."""


def _go_on() -> None:
    """Never pause."""


def probe_backbone(
    backbone: Backbone,
    section: ProbeSection,
    *,
    model_section: ModelSection,
    seed: int,
    out: Path | None,
    group: Group = ALONE,
    bounds: Bounds = Bounds(),
    since: float | None = None,
    pause: Pause = _go_on,
    pools: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Probe a frozen backbone on one task.

    Args:
        backbone: weights loaded, on its device; used in the task's precision afterwards.
        seed: splits the hold-out, draws the heads' start and the order of images.
        out: folder for the evaluation's file, the same with per-class counts and the whole grid; None writes nothing.
        group: the ranks that share the images; all of them call this and get the same entries, rank 0 writes.
        since: take what files of the same weights, evaluation and seed say that are not older than this Unix time, and
            do the other kinds; None does them all.
        pause: called by all ranks together wherever work is saved; raises to stop there, and the next call goes on.
        pools: data sets that the backbone was pre-trained on, among which test images are looked for; None where they
            are not known.

    Returns:
        One entry per kind for the `probes` list of a results row.

    Raises:
        ProbeError: unlabelled or unmatched data, too few images, or features beyond the bounds.
    """
    check_kinds(backbone, section)
    train, test = open_task(section, model_section)
    if section.augmentation == "published":
        train = replace(train, views=PublishedViews(model_section, seed))
    prints = train.dataset.fingerprint, test.dataset.fingerprint
    key = task_key(backbone.name, section, *prints, seed)
    name = f"{section.task}-{evaluation_of(section, *prints)}"
    with task_lock(out, name, group, pause):
        found: dict[str, dict[str, Any]] = {}
        if since is not None and out is not None:
            found = group.from_first(finished_probes(out, section, key, since=since) if group.is_first else None)
        wanted, kinds = section.kinds, tuple(kind for kind in section.kinds if kind not in found)
        if not kinds:
            return [as_entry(found[kind]) for kind in wanted]
        section = section.model_copy(update={"kinds": kinds})
        progress = ProbeProgress(out, name, key) if out is not None else None
        shared = group.from_first(shared_images(section, train, test, pools) if group.is_first else None)
        probing = _Probing(backbone, section, train, test, seed, key, name, out, group, bounds, progress, pause, shared)
        used = Resources(group)
        found |= {detail["kind"]: detail for detail in probing.details()}
        if out is not None:
            probing.write(out / f"{name}.json", found, used)
        return [as_entry(found[kind]) for kind in wanted]


@dataclass(frozen=True)
class _Probing:
    """One task under way; arguments as for `probe_backbone`."""

    backbone: Backbone
    section: ProbeSection
    train: LabelledImages
    test: LabelledImages
    seed: int
    key: str
    name: str
    """Start of the names of its files."""
    out: Path | None
    group: Group
    bounds: Bounds
    progress: ProbeProgress | None
    pause: Pause
    shared: dict[str, int | None]
    """Counts of test images that are in other data sets, too."""

    def details(self) -> list[dict[str, Any]]:
        """One entry per kind, with per-class counts and the grid, in the order of the task's kinds."""
        with matmul_precision(self.section.precision):
            return self._details()

    def _details(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for kinds, work in self._parts():
            saved = self.progress.load("done-" + "-".join(kinds)) if self.progress and self.group.is_first else None
            details = self.group.from_first(saved and saved["details"])
            if details is None:
                details = work()
                if self.progress:
                    if self.group.is_first:
                        self.progress.save("done-" + "-".join(kinds), {"details": details})
                    self.pause()
            found |= {detail["kind"]: detail for detail in details}
        about = {
            "protocol": PROTOCOL,
            "num_fit": len(self._split.fit),
            "num_holdout": len(self._split.held),
            "augmentation": self.section.augmentation,
            "seed": self.seed,
            "evaluation": self.name.removeprefix(f"{self.section.task}-"),
            **self.shared,
        }
        return [found[kind] | about for kind in self.section.kinds]

    def _parts(self) -> list[tuple[tuple[str, ...], Callable[[], list[dict[str, Any]]]]]:
        """Kinds that are done together, with the work: what is done is kept while the rest is under way."""
        has = set(self.section.kinds)
        parts: list[tuple[tuple[str, ...], Callable[[], list[dict[str, Any]]]]] = []
        if self.train.views is not None:  # linear heads learn from the views, too
            heads = tuple(kind for kind in STACKS if kind in has)
            parts += [(heads, lambda: self._heads(heads, self._train_features.tokens))] if heads else []
        else:
            if "linear" in has:
                parts.append((("linear",), lambda: self._heads(("linear",), self._train_features.pooled)))
            with_tokens = tuple(kind for kind in ON_TOKENS if kind in has)  # from the same passes
            if with_tokens:
                parts.append((with_tokens, lambda: self._heads(with_tokens, self._train_features.tokens)))
        if "knn" in has:
            parts.insert(1 if self.train.views is None and "linear" in has else 0, (("knn",), self._neighbours))
        if "lora" in has:
            parts.append((("lora",), lambda: [self._lora()]))
        return parts

    @functools.cached_property
    def _split(self) -> Split:
        fit, held = holdout_split(self.train.labels, self.section.holdout_fraction, self.seed)
        return Split(self.train.labels, fit, held, len(self.train.classes))

    @functools.cached_property
    def _difference(self) -> float:
        """Bring the backbone into the task's precision, and say what that changes."""
        images = self.train.images(range(min(COMPARED_IMAGES, len(self.train))))
        difference = precision_difference(self.backbone, images, DTYPES[self.section.precision])
        if difference and self.group.is_first:
            print(
                f"{self.section.task}: features in bf16 differ from fp32 by {100 * difference:.2f} % of their spread",
                file=sys.stderr,
                flush=True,
            )
        return difference

    @functools.cached_property
    def _pass(self) -> FeaturePass:
        assert self._difference >= 0
        return FeaturePass(
            backbone=self.backbone,
            group=self.group,
            precision=self.section.precision,
            for_tokens=self.train.views is not None or not set(ON_TOKENS).isdisjoint(self.section.kinds),
            cache_gb=self.bounds.cache_gb,
            disk_gb=self.bounds.disk_gb,
            folder=self.out,
            pause=self.pause,
        )

    @functools.cached_property
    def _train_features(self) -> SplitFeatures:
        return self._pass.split(self.train, f"{self.name}.train", self.key, self._split.fit)

    @functools.cached_property
    def _test_features(self) -> SplitFeatures:
        return self._pass.split(self.test, f"{self.name}.test", self.key)

    def write(self, path: Path, found: dict[str, dict[str, Any]], used: Resources) -> None:
        """Write the evaluation's file, and give back the disk that its features and progress took."""
        made = [self.__dict__[name].pooled for name in ("_train_features", "_test_features") if name in self.__dict__]
        memory, disk = self.group.sum_counts(
            sum(pooled.num_bytes for pooled in made if not pooled.is_on_disk),
            sum(pooled.num_bytes for pooled in made if pooled.is_on_disk),
        )
        document = {
            "schema_version": SCHEMA_VERSION,
            "key": self.key,
            "backbone": self.backbone.name,
            "task": self.section.model_dump(mode="json") | {"kinds": list(found)},
            "classes": list(self.train.classes),
            "world_size": self.group.world_size,
            **used.so_far(),
            "feature_bytes": {"memory": memory, "disk": disk},
            "backbone_images": self.group.sum_counts(getattr(self.backbone, "images_seen", 0))[0],
            "probes": list(found.values()),
        }
        if self.group.is_first:
            write_json(path, document)
        for pooled in made:
            pooled.remove()
        self.group.wait()
        if self.group.is_first and self.progress is not None:
            self.progress.clear()

    def _heads(self, kinds: tuple[str, ...], source: Features) -> list[dict[str, Any]]:
        """Train, choose and score the heads of some kinds."""
        sets, last = block_sets(self.backbone.num_blocks)
        fitting = GridFit(
            split=self._split,
            section=self.section,
            num_heads=self.backbone.num_heads,
            seed=self.seed,
            features=self._train_features,
            device=self._train_features.of_pooled[0].centre.device,
            group=self.group,
            progress=self.progress,
            pause=self.pause,
        )
        candidates = fitting.candidates(source, kinds, sets, last)
        chosen = [best(candidates, kind, blocks) for kind in kinds for blocks in (None, last)]
        details = []
        for kind, top, fixed in zip(kinds, chosen[::2], chosen[1::2], strict=True):
            features: Features = self._test_features.pooled if kind == "linear" else self._test_features.tokens
            on_top, on_fixed = answers_of_heads(features, self.test, (top, fixed), self.group)
            details.append(self._entry(top, fixed, on_top, on_fixed, candidates))
            if self.out is not None and self.group.is_first:
                save_head(top, self.out / f"{self.name}.{kind}.safetensors")
        return details

    def _neighbours(self) -> list[dict[str, Any]]:
        """Fill, choose, fill again with everything and score k-NN."""
        sets, last = block_sets(self.backbone.num_blocks)
        search = Neighbours(features=self._train_features, split=self._split, group=self.group)
        candidates = search.candidates(sets)
        top, fixed = best(candidates, "knn"), best(candidates, "knn", last)
        on_top = search.answers(top, self._test_features.pooled, self.test)
        on_fixed = on_top if fixed is top else search.answers(fixed, self._test_features.pooled, self.test)
        return [self._entry(top, fixed, on_top, on_fixed, candidates)]

    def _entry(
        self, top: Candidate, fixed: Candidate, on_top: Answers, on_fixed: Answers, candidates: Sequence[Candidate]
    ) -> dict[str, Any]:
        found = frozen_entry(self.section, self.test, top, fixed, on_top, on_fixed, candidates)
        return found | {"precision": self.section.precision, "precision_difference": self._difference}

    def _lora(self) -> dict[str, Any]:
        assert isinstance(self.backbone, AimBackbone)
        _, last = block_sets(self.backbone.num_blocks)
        self.backbone.use(torch.float32)
        adapted = adapt(
            self.backbone.model,
            self.section,
            self._split,
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
            entry(self.section, "lora", self.test, adapted.given, last, adapted.setting)
            | {"holdout_top1": adapted.holdout_top1, "lora_rank": RANK, "num_trained": adapted.num_trained}
            | {"grid": points}
        )
