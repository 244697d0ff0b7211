"""The paper's fifteen benchmarks as cards: what a data set must be before its accuracy compares with the paper's.

A probe whose task bears one of these names is checked against the card, so that a subset, another split or another
class list cannot pass for the benchmark. Any other name is a task of one's own and is not checked. Sizes and classes:
AIMv2 (arXiv 2411.14402), Table B1; iWildCam from WILDS (arXiv 2012.07421), because that table leaves it out. How splits
follow from a WILDS set's metadata is what the loaders of the `wilds` package (2.0) do.
"""

from __future__ import annotations

from dataclasses import dataclass

from aimscale.aim.errors import UserError


class TaskError(UserError):
    """A data set under a benchmark's name that is not that benchmark."""


@dataclass(frozen=True, kw_only=True)
class TaskCard:
    """One benchmark."""

    name: str
    """The task's name in configurations and tables."""
    title: str
    """The paper's column heading (Table 6)."""
    num_classes: int
    num_train: int
    num_test: int | None
    """Images of the split that is scored; None where the paper does not say which it is."""
    test_split: str
    """Which split is scored."""
    source: str
    """Where the data come from; this project neither ships nor downloads them."""
    folders: str
    """How to lay the images out before `aimscale data pack`."""
    metric: str = "top1"
    """Of the paper's table: top-1 accuracy for all fifteen."""

    @property
    def chance(self) -> float:
        """Accuracy of guessing evenly among the classes (a row's `chance` counts the commonest class instead)."""
        return 1 / self.num_classes


_TORCHVISION = "write each image of torchvision.datasets.{} into <split>/<class>/"


def _card(
    name: str, title: str, num_classes: int, num_train: int, num_test: int | None, split: str, source: str, folders: str
) -> TaskCard:
    return TaskCard(
        name=name,
        title=title,
        num_classes=num_classes,
        num_train=num_train,
        num_test=num_test,
        test_split=split,
        source=source,
        folders=folders,
    )


_CARDS = (
    _card(
        "imagenet-1k", "IN-1k", 1000, 1_281_167, 50_000, "validation", "image-net.org, ILSVRC 2012 (registration)",
        "train/<wnid>/ as in the archive; sort the validation images into val/<wnid>/ by the devkit's list",
    ),
    _card(
        "inat18", "iNAT-18", 8142, 437_513, 24_426, "validation", "github.com/visipedia/inat_comp, 2018",
        "sort by `category_id` of train2018.json and val2018.json into <split>/<category id, four digits>/",
    ),
    _card(
        "cifar10", "CIFAR-10", 10, 50_000, 10_000, "test", "cs.toronto.edu/~kriz/cifar.html",
        _TORCHVISION.format("CIFAR10"),
    ),
    _card(
        "cifar100", "CIFAR-100", 100, 50_000, 10_000, "test", "cs.toronto.edu/~kriz/cifar.html (the 100 fine labels)",
        _TORCHVISION.format("CIFAR100"),
    ),
    _card(
        "food101", "Food101", 101, 75_750, 25_250, "test", "data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        "images/ holds class folders; split them by meta/train.txt and meta/test.txt",
    ),
    _card(
        "dtd", "DTD", 47, 3_760, 1_880, "test1", "robots.ox.ac.uk/~vgg/data/dtd",
        "images/ holds class folders; train1 and val1 together are the training split (1,880 + 1,880)",
    ),
    _card(
        "pets", "Pets", 37, 3_680, 3_669, "test", "robots.ox.ac.uk/~vgg/data/pets",
        "the class is the file name up to its last underscore; split by annotations/*.txt",
    ),
    _card(
        "cars", "Cars", 196, 8_144, 8_041, "test",
        "Stanford Cars (ai.stanford.edu/~jkrause/cars; the original link is dead, mirrors exist)",
        _TORCHVISION.format("StanfordCars"),
    ),
    _card(
        "iwildcam", "iWildCam", 182, 129_809, None, "not stated in the paper; say which WILDS split was used",
        "wilds.stanford.edu, iwildcam v2.0",
        "sort by column `y` of metadata.csv within each `split` (train, val, test, id_val, id_test) into <split>/<y, "
        "three digits>/",
    ),
    _card(
        "camelyon17", "Camelyon17", 2, 302_436, 34_904, "validation (another hospital)",
        "wilds.stanford.edu, camelyon17 v1.0",
        "sort by `tumor` of metadata.csv into <split>/<0 or 1>/; train: `split` 0 of the centers 0, 3, 4; val: center "
        "1 (center 2 is the test hospital)",
    ),
    _card(
        "pcam", "PCAM", 2, 262_144, 32_768, "test", "github.com/basveeling/pcam", _TORCHVISION.format("PCAM"),
    ),
    _card(
        "rxrx1", "RxRx1", 1139, 40_612, 9_854, "validation (other experiments)", "wilds.stanford.edu, rxrx1 v1.0",
        "sort by `sirna_id` of metadata.csv within each `dataset` into <split>/<id, four digits>/; train: `site` 1 "
        "alone (site 2 of the same experiments is the in-distribution test)",
    ),
    _card(
        "eurosat", "EuroSAT", 10, 16_200, 5_400,
        "60 / 20 / 20 split of the RGB images; the paper does not list its files",
        "github.com/phelber/EuroSAT; lists of a split of these sizes: google-research, remote_sensing_representations",
        "the archive holds class folders; write down which split you take",
    ),
    _card(
        "fmow", "fMoW", 62, 76_863, 19_915, "validation (later years)", "wilds.stanford.edu, fmow v1.1",
        "sort images/rgb_img_<row>.png by `category` of rgb_metadata.csv into <split>/<category>/; train: `split` "
        "train before 2013 by `timestamp`; val: `split` val from 2013 to 2015",
    ),
    _card(
        "infographic", "Infographic", 345, 36_023, 15_582, "test", "ai.bu.edu/M3SDA (DomainNet, domain infograph)",
        "split by infograph_train.txt and infograph_test.txt; classes are the second level of the paths",
    ),
)  # fmt: skip
CARDS = {card.name: card for card in _CARDS}
"""Name -> card, in the order of the paper's Table 6."""


def check_against_card(task: str, *, num_classes: int, num_train: int, num_test: int) -> None:
    """Refuse a data set that bears a benchmark's name and does not match its card; other names pass.

    Raises:
        TaskError: the first number that differs.
    """
    card = CARDS.get(task)
    if card is None:
        return
    for what, found, expected in (
        ("classes", num_classes, card.num_classes),
        ("training images", num_train, card.num_train),
        ("test images", num_test, card.num_test),
    ):
        if expected is not None and found != expected:
            raise TaskError(
                f"task '{task}' is {card.title} with {expected:,} {what}, but this data set has {found:,}; "
                "complete it, or give the task another name so that it is not taken for the benchmark"
            )
