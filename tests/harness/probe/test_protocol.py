"""Probing end to end on the real 8x8 digits of scikit-learn."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from aimscale.aim.config import model_config
from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.aim.weights import load_probe
from aimscale.harness.data.store.pack import PackedImage, write_dataset
from aimscale.harness.probe.features import (
    ALONE,
    AimBackbone,
    LabelledImages,
    PixelBackbone,
    StreamedTokens,
    block_sets,
    holdout_split,
    open_task,
    token_source,
)
from aimscale.harness.probe.fit import GridFit, Split, Team, grid
from aimscale.harness.probe.knn import NeighbourVotes
from aimscale.harness.probe.lora import _Adaptation
from aimscale.harness.probe.protocol import probe_backbone, probe_model
from aimscale.harness.probe.scores import wilson_interval
from aimscale.harness.probe.views import PublishedViews
from aimscale.harness.run.config import ModelSection, ProbeSection

GEOMETRY = ModelSection(size="rung-32", image_size=16, patch_size=4)
DIGITS = tuple("0123456789")


def write_digits(out: Path, rows: slice, classes: tuple[str, ...] | None = DIGITS) -> Path:
    bunch = load_digits()

    def images() -> Any:
        for i in range(*rows.indices(len(bunch.images))):
            buffer = io.BytesIO()
            Image.fromarray((bunch.images[i] * 15).astype(np.uint8)).resize((16, 16)).save(buffer, "png")
            yield PackedImage(f"{i:06d}", "png", buffer.getvalue(), int(bunch.target[i]) if classes else None)

    write_dataset(out, images(), classes=classes)
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    write_digits(root / "train", slice(0, 600))
    write_digits(root / "test", slice(600, 1000))
    write_digits(root / "unlabelled", slice(0, 20), classes=None)
    write_digits(root / "some", slice(0, 80))
    write_digits(root / "few", slice(0, 12))
    write_digits(root / "renamed", slice(0, 50), classes=tuple("abcdefghij"))
    return root


def section(root: Path, **changes: Any) -> ProbeSection:
    values: dict[str, Any] = {
        "task": "digits",
        "train": str(root / "train"),
        "test": str(root / "test"),
        "kinds": ("linear", "attentive", "knn"),
        "epochs": 10,
        "batch_size": 64,
        "lrs": (3e-3, 3e-2),
    }
    return ProbeSection.model_validate(values | changes)


@pytest.fixture(scope="module")
def model() -> AIM:
    return AIM(model_config("rung-32", image_size=16, patch_size=4))


def test_probes_read_digits_repeatably_and_say_how(digits: Path, model: AIM, tmp_path: Path) -> None:
    entries = probe_model(model, section(digits), model_section=GEOMETRY, seed=3, out=tmp_path)
    again = probe_model(model, section(digits), model_section=GEOMETRY, seed=3, out=None)
    assert entries == again
    assert [entry["kind"] for entry in entries] == ["linear", "attentive", "knn"]
    for entry in entries:
        assert entry["n"] == 400
        assert entry["top1_lo95"] > 3 * entry["chance"]  # random weights, yet far above chance
        assert entry["top1_lo95"] < entry["top1"] < entry["top1_hi95"] < entry["top5"]
        assert entry["num_fit"] + entry["num_holdout"] == 600
    document = json.loads((tmp_path / "digits.json").read_text())
    for entry, detail in zip(entries, document["probes"], strict=True):
        assert sum(row["correct"] for row in detail["per_class"]) == round(entry["top1"] * 400)
        assert max(row["holdout_top1"] for row in detail["grid"]) == entry["holdout_top1"]
    sets, _ = block_sets(model.config.depth)
    assert len(document["probes"][1]["grid"]) == 2 * len(sets)


def test_saved_heads_are_released_probe_files_that_score_the_same(digits: Path, model: AIM, tmp_path: Path) -> None:
    (entry,) = probe_model(model, section(digits, kinds=("attentive",)), model_section=GEOMETRY, seed=0, out=tmp_path)
    probe = load_probe(tmp_path / "digits.attentive.safetensors", model.config).eval()
    _, test = open_task(section(digits), GEOMETRY)
    with torch.no_grad():
        logits = probe(model.features(test.images(range(len(test))), entry["blocks"]).mean(0))
    assert float((logits.argmax(1) == test.labels).float().mean()) == pytest.approx(entry["top1"], abs=0.003)


def test_streamed_and_cached_features_give_the_same_probes(
    digits: Path, model: AIM, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = section(digits, epochs=2, batch_size=100)
    cached = probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=None)
    monkeypatch.setattr("aimscale.harness.probe.fit.HEADS_GB", 3e-4)  # a few block sets at a time
    streamed = probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=None, cache_gb=0.0)
    for one, other in zip(cached, streamed, strict=True):
        assert one["blocks"] == other["blocks"]
        assert one["top1"] == pytest.approx(other["top1"], abs=0.005)


def test_shuffled_labels_are_not_learnt(digits: Path, model: AIM, monkeypatch: pytest.MonkeyPatch) -> None:
    # a probe that saw the test split, or labels by another path, would stay above chance
    train, test = open_task(section(digits), GEOMETRY)
    train.labels.copy_(train.labels[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))])
    monkeypatch.setattr("aimscale.harness.probe.protocol.open_task", lambda *_: (train, test))
    for entry in probe_model(model, section(digits), model_section=GEOMETRY, seed=0, out=None):
        assert entry["top1_lo95"] < 0.14


class PlantedBackbone:
    """Digits are readable from block 1 alone; the other blocks hold noise."""

    name = "planted"
    num_blocks = 4
    num_heads = 1

    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        pixels = images.flatten(1)[:, None, :256]  # one of three equal channels
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)) * 4
        return torch.stack([pixels if block == 1 else noise for block in blocks])


def test_the_search_finds_the_block_that_holds_the_answer(digits: Path) -> None:
    for entry in probe_backbone(PlantedBackbone(), section(digits, epochs=5), model_section=GEOMETRY, seed=0, out=None):
        assert entry["blocks"] == [1]
        assert entry["last_blocks"] == [2, 3]
        assert entry["top1"] > 0.75
        assert entry["last_top1"] < 0.2


def test_block_sets_hold_the_fixed_one_singles_and_the_published_best() -> None:
    sets, last = block_sets(24)
    assert last == (18, 19, 20, 21, 22, 23)
    assert (12, 13, 14, 15, 16, 17) in sets
    assert {(block,) for block in range(24)} <= set(sets)
    assert block_sets(2) == ([(0,), (1,)], (1,))


def test_holdout_is_stratified_disjoint_and_seeded() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 1)
    fit, held = holdout_split(labels, 0.2, seed=1)
    assert sorted([*fit, *held]) == list(range(81))
    assert np.bincount(labels[held], minlength=3).tolist() == [10, 6, 0]
    assert np.array_equal(held, holdout_split(labels, 0.2, seed=1)[1])
    assert not np.array_equal(held, holdout_split(labels, 0.2, seed=2)[1])
    assert len(holdout_split(torch.tensor([0, 0, 1, 1]), 0.01, seed=0)[1]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "unlabelled"}, "has no labels"),
        ({"test": "renamed"}, "classes of .* differ"),
        ({"train": "few"}, "12 training images for 10 classes"),
        ({"train": "nowhere"}, "nowhere"),
    ],
)
def test_bad_tasks_are_refused_in_one_sentence(digits: Path, model: AIM, changes: Any, message: str) -> None:
    wanted = section(digits, **{side: str(digits / name) for side, name in changes.items()})
    with pytest.raises(UserError, match=message) as caught:
        probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=None)
    assert "\n" not in str(caught.value)


def test_classes_are_matched_by_name_and_may_lack_test_images(digits: Path, model: AIM, tmp_path: Path) -> None:
    bunch = load_digits()
    names = tuple("98765430")  # in another order; no test image shows a 1 or a 2

    def images() -> Any:
        for i in range(600, 1000):
            if str(bunch.target[i]) in names:
                buffer = io.BytesIO()
                Image.fromarray((bunch.images[i] * 15).astype(np.uint8)).resize((16, 16)).save(buffer, "png")
                yield PackedImage(f"{i:06d}", "png", buffer.getvalue(), names.index(str(bunch.target[i])))

    write_dataset(tmp_path / "fewer", images(), classes=names)
    wanted = section(digits, kinds=("knn",), train=str(digits / "some"))
    probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=tmp_path / "all")
    fewer = wanted.model_copy(update={"test": str(tmp_path / "fewer")})
    probe_model(model, fewer, model_section=GEOMETRY, seed=0, out=tmp_path / "part")
    per_class = [
        json.loads((tmp_path / name / "digits.json").read_text())["probes"][0]["per_class"] for name in ("all", "part")
    ]
    for whole, part in zip(*per_class, strict=True):
        assert part == (whole if whole["class"] in names else whole | {"n": 0, "correct": 0})


def test_raw_pixels_have_no_tokens_to_attend_over(digits: Path) -> None:
    with pytest.raises(UserError, match="leave out kind 'attentive'"):
        probe_backbone(PixelBackbone(), section(digits), model_section=GEOMETRY, seed=0, out=None)
    wanted = section(digits, kinds=("linear", "knn"))
    for entry in probe_backbone(PixelBackbone(), wanted, model_section=GEOMETRY, seed=0, out=None):
        assert entry["top1"] > 0.8


def test_neighbours_vote_with_their_cosine() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [-0.9, 0.1]])
    votes = NeighbourVotes(bank, torch.tensor([0, 0, 1, 1]), 2).votes(torch.tensor([[0.8, 0.02]]), (1, 4))
    assert votes.argmax(2).tolist() == [[0], [0]]
    assert votes[0, 0].tolist() == [1.0, 0.0]  # the nearest has weight one
    assert votes[1, 0, 0] > votes[1, 0, 1] > 0


def test_wilson_interval_of_published_examples() -> None:
    # Newcombe, Statistics in Medicine 17:857 (1998), table I
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_tokens_are_cached_only_within_the_stated_memory(digits: Path, model: AIM) -> None:
    train, _ = open_task(section(digits), GEOMETRY)
    num_bytes = 600 * model.config.depth * model.config.num_tokens * model.config.width * 4
    assert token_source(AimBackbone(model), train, cache_gb=1.01 * num_bytes / 1e9).cached
    assert not token_source(AimBackbone(model), train, cache_gb=0.99 * num_bytes / 1e9).cached


class Interrupted(Exception):
    pass


class InterruptedBackbone(AimBackbone):
    """Dies at its n-th pass."""

    passes_left = 10**9

    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        self.passes_left -= 1
        if self.passes_left < 0:
            raise Interrupted
        return super().features(images, blocks)


def test_a_killed_streamed_probe_goes_on_to_the_same_numbers(digits: Path, model: AIM, tmp_path: Path) -> None:
    wanted = section(digits, epochs=4, kinds=("linear", "attentive"))

    def run(out: Path, passes: int) -> tuple[Any, int]:
        backbone = InterruptedBackbone(model)
        backbone.passes_left = passes
        entries = probe_backbone(backbone, wanted, model_section=GEOMETRY, seed=0, out=out, cache_gb=0.0)
        return entries, passes - backbone.passes_left

    whole, num_passes = run(tmp_path / "whole", 10**9)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", num_passes * 2 // 3)
    assert not (tmp_path / "cut" / "digits.json").exists()
    resumed, num_left = run(tmp_path / "cut", 10**9)
    assert resumed == whole
    assert num_left < num_passes * 2 // 3
    assert not list((tmp_path / "cut").glob("*.partial*"))


def test_published_views_depend_on_seed_epoch_and_image_alone(digits: Path) -> None:
    train, _ = open_task(section(digits), GEOMETRY)
    views = PublishedViews(GEOMETRY, seed=1)
    both = views.images(train.dataset, np.array([3, 8]), epoch=0)
    assert both.shape == (2, 3, 16, 16)
    torch.rand(3)  # somebody else draws
    assert torch.equal(views.images(train.dataset, np.array([8]), epoch=0)[0], both[1])
    assert not torch.equal(views.images(train.dataset, np.array([8]), epoch=1)[0], both[1])


def test_augmented_probes_learn_from_views(digits: Path, model: AIM) -> None:
    wanted = section(digits, augmentation="published", kinds=("linear",), epochs=3, refit=False)
    (entry,) = probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=None)
    assert entry["augmentation"] == "published"
    assert entry["top1_lo95"] > entry["chance"]


def test_lora_adapts_a_copy_of_the_trunk(digits: Path, model: AIM) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = section(digits, kinds=("lora",), epochs=3, lrs=(1e-2,))
    (lora,) = probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=None)
    assert (lora["kind"], lora["lora_rank"]) == ("lora", 8)
    assert lora["top1_lo95"] > 2 * lora["chance"]
    d, depth = model.config.width, model.config.depth
    updates = 8 * depth * ((d + 3 * d) + (d + d) + 2 * (d + 4 * d))
    assert lora["num_trained"] == updates + 2 * d * d + d + 10 * d
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="leave out kind 'lora'"):
        probe_backbone(PixelBackbone(), section(digits, kinds=("lora",)), model_section=GEOMETRY, seed=0, out=None)


def test_a_refit_trains_what_the_holdout_chose_on_the_whole_training_split(
    digits: Path, model: AIM, tmp_path: Path
) -> None:
    kinds = ("linear", "attentive", "knn")
    once, twice = (
        probe_model(
            model,
            section(digits, kinds=kinds, epochs=2, refit=refit, train=str(digits / "some")),
            model_section=GEOMETRY,
            seed=0,
            out=tmp_path / str(refit),
        )
        for refit in (False, True)
    )
    train, _ = open_task(section(digits, train=str(digits / "some")), GEOMETRY)
    fit, held = holdout_split(train.labels, 0.2, seed=0)
    for chosen, refitted in zip(once, twice, strict=True):
        assert (chosen["refit"], refitted["refit"]) == (False, True)
        for name in ("blocks", "lr", "num_neighbours", "holdout_top1", "num_fit", "num_holdout"):
            assert chosen[name] == refitted[name], name  # the choice is the hold-out's alone
    for refit, images in ((False, fit), (True, np.sort(np.concatenate([fit, held])))):
        saved = load_probe(tmp_path / str(refit) / "digits.attentive.safetensors", model.config)
        with torch.no_grad():
            tokens = model.eval().features(train.images(images), once[1]["blocks"]).mean(0)
        # the head's statistics tell what it was trained on
        assert saved.bn.running_mean == pytest.approx(tokens.flatten(0, 1).mean(0).numpy(), abs=1e-5)


def test_a_refit_is_a_plain_training_on_everything(digits: Path, model: AIM) -> None:
    train, _ = open_task(section(digits, train=str(digits / "some")), GEOMETRY)
    wanted = section(digits, train=str(digits / "some"), kinds=("attentive",), epochs=2, lrs=(3e-3,))
    source = token_source(AimBackbone(model.eval()), train)
    everything = np.arange(len(train))
    split = Split(train.labels, everything[::2], everything[1::2], 10)
    fitting = GridFit(split=split, section=wanted, num_heads=model.config.num_heads, seed=0, group=ALONE)
    (refitted,) = fitting.refit(source, fitting.candidates(source, [(0,)]))
    teams = [Team(kind="attentive", sets=((0,),), settings=grid(wanted))]
    (plain,) = fitting._train(source.select([(0,)]), [(0,)], teams, everything)
    tokens = next(source.select([(0,)]).batches(everything, 64)).tokens
    assert torch.equal(refitted.scorer(tokens), plain(tokens)[0, :, 0])


@pytest.mark.parametrize("refit", [False, True])
def test_a_killed_lora_goes_on_to_the_same_numbers(
    digits: Path, model: AIM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refit: bool
) -> None:
    wanted = section(
        digits,
        kinds=("knn", "lora"),
        epochs=2,
        batch_size=40,
        lrs=(3e-3, 1e-2),
        train=str(digits / "some"),
        refit=refit,
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
                return probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=out, pause=pause), batches[0]
            except Interrupted:
                return None, batches[0]

    whole, num_batches = run(tmp_path / "whole", 10**9)
    # saves: the frozen probes, then an epoch, another, and the end of each point of the grid
    for pauses in (1, 2, 5):
        out = tmp_path / f"cut-{pauses}"
        cut, before = run(out, pauses)
        assert cut is None
        assert not (out / "digits.json").exists()
        resumed, after = run(out, 10**9)
        assert resumed == whole, pauses
        assert before + after == num_batches  # no epoch was trained twice
        assert not list(out.glob("*.partial*"))


def test_images_are_decoded_ahead_in_order_and_errors_come_where_their_images_would(digits: Path) -> None:
    train, _ = open_task(section(digits), GEOMETRY)
    chunks = [[5, 3], [], [9], list(range(30)), [7]]
    ahead = list(train.ahead(chunks))
    assert [list(chunk) for chunk, _ in ahead] == chunks
    for chunk, images in ahead:
        assert torch.equal(images, train.images(chunk))
    with pytest.raises(IndexError):
        list(train.ahead([[0], [10**6]]))
    first = next(iter(train.ahead([[0]] * 50)))  # a reader that stops early leaves no thread waiting
    assert torch.equal(first[1], train.images([0]))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode") and thread.is_alive()]


def test_the_next_images_are_decoded_while_the_backbone_works(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = open_task(section(digits), GEOMETRY)
    under_way = {chunk: threading.Event() for chunk in range(3)}
    images_of = LabelledImages.images

    def images(self: LabelledImages, indices: Sequence[int], epoch: int | None = None) -> Tensor:
        under_way[indices[0] // 64].set()
        return images_of(self, indices, epoch)

    class Patient:
        """Does not answer for a chunk before the next one is being decoded: without reading ahead it never would."""

        name, num_blocks, num_heads, passes = "patient", 1, 1, 0

        def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
            self.passes += 1
            if self.passes in (2, 3):  # the first pass is one image, for the shape
                assert under_way[self.passes - 1].wait(timeout=60)
            return torch.zeros(len(blocks), len(images), 1, 4)

    source = StreamedTokens(Patient(), train, ALONE)
    monkeypatch.setattr(LabelledImages, "images", images)
    chunks = list(source.select([(0,)]).batches(np.arange(192), 192))
    assert [chunk.tokens.shape[1] for chunk in chunks] == [64, 64, 64]


def test_two_processes_on_one_task_probe_it_once(digits: Path, model: AIM, tmp_path: Path) -> None:
    wanted = section(digits, kinds=("linear",), epochs=2)
    passes = []

    class Counted(AimBackbone):
        def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
            passes.append(threading.current_thread().name)
            return super().features(images, blocks)

    def probe() -> None:
        found.append(probe_backbone(Counted(model), wanted, model_section=GEOMETRY, seed=0, out=tmp_path, since=0.0))

    found: list[Any] = []
    threads = [threading.Thread(target=probe, name=f"prober-{i}") for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert len(set(passes)) == 1
