"""A grid of heads: trained together, judged and kept as each would be alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor, nn
from torch.nn import functional

from aimscale.aim.model import AIM
from aimscale.harness.distributed.group import ALONE, Group
from aimscale.harness.probe.features.backbones import AimBackbone
from aimscale.harness.probe.features.images import Task, holdout_split, open_task
from aimscale.harness.probe.features.tasks import head_params
from aimscale.harness.probe.heads.scores import best, next_values
from aimscale.harness.probe.heads.stacks import CLIP_NORM, LR_END, STACKS, learning_rate
from aimscale.harness.probe.heads.training import HeadTraining, search_heads
from aimscale.harness.run.config import RuntimeConfig


def test_heads_of_a_whole_grid_train_on_one_backbone_pass_per_batch(
    task: Any, model: AIM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images: list[int] = []

    class Counted(AimBackbone):
        def features(self, batch: Tensor, blocks: Sequence[int]) -> Tensor:
            images.append(len(batch))
            return super().features(batch, blocks)

    def passes(out: str, **changes: Any) -> int:
        images.clear()
        wanted = task.section(**changes)
        backbone = Counted(lambda: copy.deepcopy(model))
        task.probe(wanted, backbone, seed=0, out=tmp_path / out)
        return sum(images)

    monkeypatch.setattr("aimscale.harness.probe.features.extraction.CACHE_SHARE", 0.0)
    monkeypatch.setattr("aimscale.harness.probe.heads.scores.MAX_GROWTH", 0)  # each time a grid grows is one more pass
    few = 100  # images that set shapes and centres, and on which precisions are compared
    # linear and k-NN: once over both splits, whatever the epochs and the grid
    assert 0 <= passes("pooled", kinds=("linear", "knn"), epochs=30) - (600 + 400) < few
    # attentive: that once, 7 batches without held-out images, the hold-out, 7 batches of all images, the test split
    found = passes("attentive", kinds=("attentive",), iterations=7, batch_size=50)
    assert -20 <= found - (600 + 400 + 0.8 * 7 * 50 + 120 + 7 * 50 + 400) < few


@pytest.mark.parametrize(("kind", "share"), [*((kind, 0.1) for kind in STACKS), ("attentive", 0.0)])
def test_a_head_is_judged_without_the_holdout_and_kept_as_trained_alone_on_everything(
    task: Any, model: AIM, kind: str, share: float, written_out: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aimscale.harness.probe.features.extraction.CACHE_SHARE", share)
    monkeypatch.setattr("aimscale.harness.probe.heads.scores.MAX_GROWTH", 1)
    monkeypatch.setattr("aimscale.harness.probe.heads.training.MICRO_BATCH", 7)
    monkeypatch.setattr("aimscale.harness.probe.heads.training.WORKING_GB", 1e-4)
    wanted = task.section(train=str(task.root / "some"), epochs=3, batch_size=30, lrs=(3e-3, 1e-2))
    train, _ = open_task(wanted, task.geometry, RuntimeConfig(), 0.0)
    fit, held = holdout_split(train.labels, 0.2, seed=5)
    whole = Task(section=wanted, train=train, test=train, seed=5, group=ALONE)
    features = task.features(train, fit=fit)
    source = features.tokens  # from which linear heads learn where there are views
    training = HeadTraining(task=whole, num_heads=model.config.num_heads, features=features, source=source)
    found = search_heads(training, [kind], [(0,), (1,), (0, 1)], last=(1,))
    chosen = best(found, kind)
    assert chosen.head is not None
    assert sum(p.numel() for p in chosen.head.parameters()) == head_params(kind, model.config.width, 10)
    (outputs,) = source.parts([list(range(len(train)))])
    tokens = outputs[list(chosen.blocks)].mean(0)

    def alone(images: np.ndarray) -> nn.Module:
        """An ordinary module, trained by torch's optimiser on those images of every batch."""
        (untrained,) = training.stacks([(kind, {chosen.blocks: [0.1]})], [chosen.blocks], with_holdout=False)
        probe = written_out(untrained)
        read = tokens[images].mean(1, keepdim=True) if kind == "linear" else tokens[images]
        probe.bn.running_mean.copy_(read.mean((0, 1)))
        probe.bn.running_var.copy_(read.var((0, 1), correction=0))
        groups = [
            {"params": [p for p in probe.parameters() if (p.dim() > 1) == decays], "weight_decay": 0.05 * decays}
            for decays in (True, False)
        ]
        optimiser, step, num_steps = torch.optim.AdamW(groups), 0, 3 * math.ceil(len(train) / 30)
        for epoch in range(3):
            order = np.random.default_rng([5, 1, epoch]).permutation(len(train))
            for start_at in range(0, len(train), 30):
                batch = [index for index in order[start_at : start_at + 30] if index in images]
                cosine = 1e-5 + (chosen.value - 1e-5) * 0.5 * (1 + math.cos(math.pi * step / (num_steps - 1)))
                for group in optimiser.param_groups:
                    group["lr"] = chosen.value if step == 0 else cosine  # 5 % of 9 steps warm up: the first
                optimiser.zero_grad()
                functional.cross_entropy(probe.eval()(tokens[batch]), train.labels[batch]).backward()
                nn.utils.clip_grad_norm_(probe.parameters(), CLIP_NORM)
                optimiser.step()
                step += 1
        return probe

    kept, judged = alone(whole.everything), alone(fit)
    with torch.no_grad():
        torch.testing.assert_close(chosen.head(tokens[None])[0, :, 0], kept(tokens), rtol=1e-2, atol=5e-3)
        answers, held_labels = judged(tokens[held]), train.labels[held]
    assert chosen.holdout_loss == pytest.approx(float(functional.cross_entropy(answers, held_labels)), rel=2e-3)
    assert chosen.holdout_top1 == pytest.approx(float((answers.argmax(1) == held_labels).float().mean()))


def test_tokens_that_are_computed_again_give_the_heads_of_kept_ones(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = task.section(kinds=("attentive", "efficient"), epochs=2)
    kept = task.probe(wanted, seed=0, out=None)
    monkeypatch.setattr("aimscale.harness.probe.features.extraction.CACHE_SHARE", 0.0)
    assert task.probe(wanted, seed=0, out=None) == kept


def test_linear_heads_are_the_solutions_of_scikit_learn_for_any_split_of_the_images(
    task: Any, model: AIM, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _ = task.open()
    fit, held = holdout_split(train.labels, 0.2, seed=0)
    whole = Task(section=task.section(), train=train, test=train, seed=0, group=ALONE)
    features = task.features(train, fit=fit)
    vectors = features.pooled.rows(slice(None)).numpy().astype(np.float64)
    training = HeadTraining(task=whole, num_heads=model.config.num_heads, features=features, source=features.pooled)
    tops = []
    for working_gb in (1.0, 1e-4):
        monkeypatch.setattr("aimscale.harness.probe.heads.training.WORKING_GB", working_gb)
        found = search_heads(training, ["linear"], [(0,), (1,)], last=(1,))
        tops.append([each.holdout_top1 for each in found])
        for each in found:
            x = vectors[each.blocks[0]]
            x = (x - x[fit].mean(0)) / np.sqrt(x[fit].var(0) + 1e-6)
            theirs = LogisticRegression(C=1 / each.value / len(fit), max_iter=10_000, tol=1e-8)
            theirs.fit(x[fit], train.labels[fit])
            loss = log_loss(train.labels[held], theirs.predict_proba(x[held]))
            assert each.holdout_loss == pytest.approx(loss, abs=0.01)
            assert each.holdout_top1 == pytest.approx(theirs.score(x[held], train.labels[held]), abs=1.5 / len(held))
        chosen = best(found, "linear")
        assert chosen.holdout_loss == min(each.holdout_loss for each in found)
        assert chosen.head is not None
    assert np.allclose(*tops, atol=1.5 / len(held))


def test_a_grid_grows_by_its_own_ratio_where_the_choice_is_at_its_end_and_no_further_than_it_may() -> None:
    assert next_values((1e-3, 1e-2), [1e-3, 1e-2], 1e-2) == [pytest.approx(1e-1)]
    assert next_values((1e-3, 1e-2), [1e-3, 1e-2], 1e-3) == [pytest.approx(1e-4)]
    assert next_values((1e-3, 1e-2), [1e-3, 1e-2, 1e-1], 1e-2) == []
    assert next_values((1e-3,), [1e-3], 1e-3) == []
    assert next_values((1e-3, 1e-2), [1e-3, 1e-2, 10, 100], 100) == []


def test_the_rate_warms_up_over_a_twentieth_of_the_steps_and_falls_along_half_a_cosine() -> None:
    rates = [learning_rate(0.03, step, 40) for step in range(40)]
    assert rates[:2] == [0.015, 0.03]
    assert rates[20] == pytest.approx((0.03 + LR_END) / 2)
    assert rates[-1] == LR_END
    assert learning_rate(1e-6, 39, 40) == 1e-6


def chosen_heads(group: Group, task: Any) -> tuple[list[bytes], int, int]:
    """The chosen heads, the bytes of heads that this rank is sent, and those of all chosen heads."""
    train, _ = task.open()
    fit, _ = holdout_split(train.labels, 0.2, seed=0)
    whole = Task(section=task.section(), train=train, test=train, seed=0, group=group)
    features = task.features(train, group, fit=fit)
    training = HeadTraining(task=whole, num_heads=2, features=features, source=features.pooled)
    sent, broadcast, gather = [0], group.broadcast, group.all_gather_object

    def watched(value: Any, rank: int) -> Any:
        value = broadcast(value, rank)
        sent[0] += sum(each.numel() * each.element_size() for head in value.values() for each in head.parameters())
        return value

    def watched_gather(value: Any) -> list[Any]:
        assert not isinstance(value, dict) or not any(isinstance(each, nn.Module) for each in value.values())
        return gather(value)

    group.broadcast, group.all_gather_object = watched, watched_gather  # type: ignore[method-assign]
    heads = [each.head for each in search_heads(training, ["linear"], [(0,), (1,), (0, 1)], last=(1,)) if each.head]
    tensors = [each.detach() for head in heads for each in head.parameters()]
    return [each.numpy().tobytes() for each in tensors], sent[0], sum(each.nbytes for each in tensors)


def test_each_chosen_head_is_sent_to_all_ranks_once(task: Any, in_group: Any) -> None:
    found = in_group(chosen_heads, task, world_size=3)
    assert found[0][0] == found[1][0] == found[2][0] != []
    assert all(sent == of_heads for _, sent, of_heads in found), "by its owner alone, and none is padded to the largest"
