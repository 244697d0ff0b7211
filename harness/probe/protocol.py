"""Frozen-feature probes of one model: linear, attentive, efficient and k-NN, chosen on a hold-out, tested once.

Protocol. The backbone is frozen and used with the task's `attention`, bidirectional as a rule; a probe reads the
average of raw block outputs. The training split is cut once, stratified and seeded, into a fit part and a hold-out.
The hold-out chooses among heads that learn from the fit part (block set x learning rate or L2; the grid grows where the
choice lies at its end); one that learns from the whole split with the chosen setting is scored once on the test split,
as is that of the best setting on the last six blocks (half of the blocks of a shallow model), the paper's default.

Trained and solved heads standardise channels by the exact statistics of what they learn from, which makes results
independent of batch and world size; k-NN compares raw features.

Work. One backbone pass over both splits gives the pooled features of every block and all statistics; linear and k-NN
probes need nothing else. The attentive heads of the whole grid train on one further pass per batch if tokens are not
kept, and the chosen ones on another. A killed probe repeats the kinds under way.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aimscale.aim.model import DTYPES
from aimscale.aim.weights import write_weights
from aimscale.harness.distributed.group import ALONE, Group
from aimscale.harness.distributed.job import ProgressCallback, ignore_progress
from aimscale.harness.probe.features.backbones import AimBackbone, Backbone, matmul_precision
from aimscale.harness.probe.features.extraction import SplitFeatures, batched, extract_features, own_indices
from aimscale.harness.probe.features.images import LabelledImages, Task, open_task, read_without_bad
from aimscale.harness.probe.features.tasks import ProbeError, block_sets
from aimscale.harness.probe.features.views import PublishedViews
from aimscale.harness.probe.heads.knn import Neighbours
from aimscale.harness.probe.heads.lora import RANK, adapt
from aimscale.harness.probe.heads.scores import Candidate, Predictions, best, score, tried_values
from aimscale.harness.probe.heads.stacks import ON_TOKENS, STACKS, AttentiveStack
from aimscale.harness.probe.heads.training import TEST_BATCH, HeadTraining, predict_test_split, search_heads
from aimscale.harness.results import PROTOCOL, Key, add_probes, as_entry, finished_probes, task_key
from aimscale.harness.run.config import ModelSection, ProbeSection, RunConfig
from aimscale.harness.run.files import atomic_write

Detail = dict[str, Any]
"""Contents of a task's file about one kind of probe: a row's entry, per-class counts and the grid."""


def probe_backbone(
    backbone: Backbone,
    section: ProbeSection,
    config: RunConfig,
    *,
    out: Path | None,
    model_section: ModelSection | None = None,
    group: Group = ALONE,
    report_progress: ProgressCallback = ignore_progress,
) -> list[dict[str, Any]]:
    """Probe a frozen backbone on one task.

    Args:
        backbone: weights loaded, on its device; used in the task's precision afterwards.
        config: the run whose geometry of images, seed (of the hold-out, the heads' start and the order of images),
            runtime and `data.max_bad_fraction` are used.
        out: folder of the evaluation's file; kinds that it has of the same weights, settings, data and seed are not
            done again. None reads and writes nothing.
        model_section: geometry of the images, where it is not the run's.
        group: the ranks that share the images; all of them call this and get the same entries, rank 0 writes.
        report_progress: called by all ranks together, often; may raise to stop.

    Returns:
        One entry per kind for the `probes` list of a results row.

    Raises:
        ProbeError: unlabelled or unmatched data, too few images, features that are not finite or fit nowhere.
    """
    if isinstance(backbone, AimBackbone):
        backbone.is_causal = section.attention == "causal"
    elif section.attention == "causal":
        raise ProbeError(f"{backbone.name} has no causal attention; leave task '{section.task}' out")
    if impossible := [kind for kind in section.kinds if kind in backbone.impossible]:
        raise ProbeError(f"{backbone.name} cannot have probes of kind '{impossible[0]}'; leave that kind out")
    model_section, seed = model_section or config.training.model, config.training.seed
    train, test = open_task(section, model_section, config.runtime, config.training.data.max_bad_fraction)
    if section.augmentation == "published":
        train = replace(train, views=PublishedViews(model_section, seed))
    key = task_key(backbone.name, section, train.dataset.fingerprint, test.dataset.fingerprint, seed)
    finished: dict[str, Detail] = {}
    if out is not None:
        finished = group.broadcast_from_rank0(functools.partial(finished_probes, out, section.task, key))
    kinds = [kind for kind in section.kinds if kind not in finished]
    if not kinds:
        return [as_entry(finished[kind]) for kind in section.kinds]
    started = time.monotonic()
    task = Task(section=section, train=train, test=test, seed=seed, group=group, report_progress=report_progress)
    with matmul_precision(section.precision):
        for details in _details(task, backbone, kinds, out, key):
            about = {"evaluation": key["evaluation"], "protocol": PROTOCOL, "seed": seed}
            done = {detail["kind"]: detail | about for detail in details}
            finished |= done
            if out is not None and group.is_first:
                took = {"world_size": group.world_size, "wall_s": time.monotonic() - started}
                add_probes(out, section, key, done, classes=list(train.classes), **took)
            report_progress()
    return [as_entry(finished[kind]) for kind in section.kinds]


def _details(
    task: Task, backbone: Backbone, kinds: Sequence[str], out: Path | None, key: Key
) -> Iterator[list[Detail]]:
    """Do some kinds of probe, and yield the details of those done together; heads are saved to `out`."""
    frozen = [kind for kind in kinds if kind != "lora"]
    if frozen:
        backbone.use(DTYPES[task.section.precision])
        task, fitted, tested = _read_features(task, backbone, kinds)
        # on pooled features one by one, then all that learn from tokens at once
        has_views = task.train.views is not None
        on_tokens = [kind for kind in STACKS if kind in kinds and (has_views or kind in ON_TOKENS)]
        if "linear" in set(kinds) - set(on_tokens):
            yield _heads(task, backbone, ["linear"], fitted, tested, out, key)
        if "knn" in kinds:
            yield [_neighbours(task, backbone, fitted, tested)]
        if on_tokens:
            yield _heads(task, backbone, on_tokens, fitted, tested, out, key)
    if "lora" in kinds:
        assert isinstance(backbone, AimBackbone)
        yield [_adapted(task if frozen else _read_images(task), backbone)]


def _read_features(task: Task, backbone: Backbone, kinds: Sequence[str]) -> tuple[Task, SplitFeatures, SplitFeatures]:
    """Compute the features of both splits; returns the task without the images that do not decode, too."""
    extract = functools.partial(
        extract_features,
        backbone,
        group=task.group,
        precision=task.section.precision,
        for_tokens=task.train.views is not None or not set(ON_TOKENS).isdisjoint(kinds),
        report_progress=task.report_progress,
    )
    train, fitted = read_without_bad(
        task.train, task.group, lambda images: extract(images, fit=replace(task, train=images).fit)
    )
    test, tested = read_without_bad(task.test, task.group, extract)
    return replace(task, train=train, test=test), fitted, tested


def _read_images(task: Task) -> Task:
    """Decode all images once, and return the task without those that do not decode."""

    def read(images: LabelledImages) -> None:
        turns = list(batched(range(len(images)), TEST_BATCH * task.group.world_size))
        for _ in images.ahead(own_indices(turn, task.group) for turn in turns):
            task.report_progress()

    train, _ = read_without_bad(task.train, task.group, read)
    test, _ = read_without_bad(task.test, task.group, read)
    return replace(task, train=train, test=test)


def _heads(
    task: Task,
    backbone: Backbone,
    kinds: Sequence[str],
    fitted: SplitFeatures,
    tested: SplitFeatures,
    out: Path | None,
    key: Key,
) -> list[Detail]:
    """Train, choose and score the heads of some kinds."""
    sets, last = block_sets(backbone.num_blocks)
    is_pooled = task.train.views is None and list(kinds) == ["linear"]
    source = fitted.pooled if is_pooled else fitted.tokens
    training = HeadTraining(task=task, num_heads=backbone.num_heads, features=fitted, source=source)
    candidates = search_heads(training, kinds, sets, last)
    details = []
    for kind in kinds:
        chosen = best(candidates, kind), best(candidates, kind, last)
        predictions = predict_test_split(tested.pooled if kind == "linear" else tested.tokens, chosen, task)
        solved = {"is_converged": kind not in training.unsolved} if is_pooled and kind == "linear" else {}
        details.append(_detail(task, chosen, predictions, candidates) | solved)
        if kind == "attentive" and out is not None and task.group.is_first:
            _save_head(chosen[0], out / f"{task.section.task}-{key['evaluation']}.{kind}.safetensors")
    return details


def _neighbours(task: Task, backbone: Backbone, fitted: SplitFeatures, tested: SplitFeatures) -> Detail:
    """Choose k and blocks on the hold-out, and score k-NN with the whole training split as the bank."""
    sets, last = block_sets(backbone.num_blocks)
    search = Neighbours(task=task, features=fitted)
    candidates = search.candidates(sets)
    chosen = best(candidates, "knn"), best(candidates, "knn", last)
    return _detail(task, chosen, [search.predict(each, tested.pooled) for each in chosen], candidates)


def _adapted(task: Task, backbone: AimBackbone) -> Detail:
    """Adapt the backbone on the last blocks, choose the learning rate, and score it."""
    _, last = block_sets(backbone.num_blocks)
    backbone.use(torch.float32)
    candidates, predictions, num_trained = adapt(backbone.model, task, last)
    chosen = best(candidates, "lora")
    return _entry(task, chosen, predictions, candidates) | {"lora_rank": RANK, "num_trained": num_trained}


def _detail(
    task: Task, chosen: tuple[Candidate, Candidate], predictions: Sequence[Predictions], candidates: Sequence[Candidate]
) -> Detail:
    """Build the detail of a frozen probe: the chosen candidate, the best on the last blocks, and the whole grid."""
    top, fixed = chosen
    last = score(predictions[1], task.test.labels, task.test.classes)
    return _entry(task, top, predictions[0], candidates) | {
        "last_blocks": list(fixed.blocks),
        **{f"last_{name}": last[name] for name in ("top1", "top1_lo95", "top1_hi95")},
        "precision": task.section.precision,
    }


def _value(task: Task, candidate: Candidate) -> dict[str, float | int | None]:
    """Return the chosen value under the name of its kind; the others are None."""
    is_solved = candidate.kind == "linear" and task.train.views is None
    name = "num_neighbours" if candidate.kind == "knn" else "l2" if is_solved else "lr"
    value = int(candidate.value) if candidate.kind == "knn" else candidate.value
    return dict.fromkeys(("lr", "l2", "num_neighbours")) | {name: value}


def _entry(task: Task, chosen: Candidate, predictions: Predictions, candidates: Sequence[Candidate]) -> Detail:
    """Build the entry of any probe: its inputs, its scores, what was chosen, and all candidates of its kind."""
    values = tried_values(candidates, chosen)
    grid = [
        {"blocks": list(each.blocks), **_value(task, each)}
        | {"holdout_top1": each.holdout_top1, "holdout_loss": each.holdout_loss}
        for each in candidates
        if each.kind == chosen.kind
    ]
    return {
        "task": task.section.task,
        "kind": chosen.kind,
        "blocks": list(chosen.blocks),
        "num_classes": len(task.test.classes),
        **score(predictions, task.test.labels, task.test.classes),
        **_value(task, chosen),
        # for a rate or L2: better values may lie beyond, but the grid has reached its limit
        "lr_at_edge": chosen.kind != "knn" and min(values) < max(values) and chosen.value in (min(values), max(values)),
        "holdout_top1": chosen.holdout_top1,
        "num_fit": len(task.fit),
        "num_holdout": len(task.held),
        "augmentation": task.section.augmentation,
        "grid": grid,
    }


def _save_head(candidate: Candidate, path: Path) -> None:
    """Write a trained head under the released names `head.*`; the blocks it averages are in the file's metadata."""
    assert isinstance(candidate.head, AttentiveStack)
    state = {f"head.{name}": tensor for name, tensor in candidate.head.released_state().items()}
    state["head.bn.num_batches_tracked"] = torch.tensor(0)
    metadata = {"blocks": json.dumps(candidate.blocks)}  # one key: of several the order is random
    with atomic_write(path) as partial:
        write_weights(state, partial, metadata)
