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

CARDS: dict[str, TaskCard] = {
    card.name: card
    for card in (
        TaskCard(
            name="imagenet-1k",
            title="IN-1k",
            num_classes=1000,
            num_train=1_281_167,
            num_test=50_000,
            test_split="validation",
            source="image-net.org, ILSVRC 2012 (registration)",
            folders="train/<wnid>/ as in the archive; sort the validation images into val/<wnid>/ by the devkit's list",
        ),
        TaskCard(
            name="inat18",
            title="iNAT-18",
            num_classes=8142,
            num_train=437_513,
            num_test=24_426,
            test_split="validation",
            source="github.com/visipedia/inat_comp, 2018",
            folders="sort by `category_id` of train2018.json and val2018.json into <split>/<category id, four digits>/",
        ),
        TaskCard(
            name="cifar10",
            title="CIFAR-10",
            num_classes=10,
            num_train=50_000,
            num_test=10_000,
            test_split="test",
            source="cs.toronto.edu/~kriz/cifar.html",
            folders=_TORCHVISION.format("CIFAR10"),
        ),
        TaskCard(
            name="cifar100",
            title="CIFAR-100",
            num_classes=100,
            num_train=50_000,
            num_test=10_000,
            test_split="test",
            source="cs.toronto.edu/~kriz/cifar.html (the 100 fine labels)",
            folders=_TORCHVISION.format("CIFAR100"),
        ),
        TaskCard(
            name="food101",
            title="Food101",
            num_classes=101,
            num_train=75_750,
            num_test=25_250,
            test_split="test",
            source="data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
            folders="images/ holds class folders; split them by meta/train.txt and meta/test.txt",
        ),
        TaskCard(
            name="dtd",
            title="DTD",
            num_classes=47,
            num_train=3_760,
            num_test=1_880,
            test_split="test1",
            source="robots.ox.ac.uk/~vgg/data/dtd",
            folders="images/ holds class folders; train1 and val1 together are the training split (1,880 + 1,880)",
        ),
        TaskCard(
            name="pets",
            title="Pets",
            num_classes=37,
            num_train=3_680,
            num_test=3_669,
            test_split="test",
            source="robots.ox.ac.uk/~vgg/data/pets",
            folders="the class is the file name up to its last underscore; split by annotations/*.txt",
        ),
        TaskCard(
            name="cars",
            title="Cars",
            num_classes=196,
            num_train=8_144,
            num_test=8_041,
            test_split="test",
            source="Stanford Cars (ai.stanford.edu/~jkrause/cars; the original link is dead, mirrors exist)",
            folders=_TORCHVISION.format("StanfordCars"),
        ),
        TaskCard(
            name="iwildcam",
            title="iWildCam",
            num_classes=182,
            num_train=129_809,
            num_test=None,
            test_split="not stated in the paper; say which WILDS split was used",
            source="wilds.stanford.edu, iwildcam v2.0",
            folders="sort by column `y` of metadata.csv within each `split` (train, val, test, id_val, id_test) into "
            "<split>/<y, three digits>/",
        ),
        TaskCard(
            name="camelyon17",
            title="Camelyon17",
            num_classes=2,
            num_train=302_436,
            num_test=34_904,
            test_split="validation (another hospital)",
            source="wilds.stanford.edu, camelyon17 v1.0",
            folders="sort by `tumor` of metadata.csv into <split>/<0 or 1>/; train: `split` 0 of the centers 0, 3, 4; "
            "val: center 1 (center 2 is the test hospital)",
        ),
        TaskCard(
            name="pcam",
            title="PCAM",
            num_classes=2,
            num_train=262_144,
            num_test=32_768,
            test_split="test",
            source="github.com/basveeling/pcam",
            folders=_TORCHVISION.format("PCAM"),
        ),
        TaskCard(
            name="rxrx1",
            title="RxRx1",
            num_classes=1139,
            num_train=40_612,
            num_test=9_854,
            test_split="validation (other experiments)",
            source="wilds.stanford.edu, rxrx1 v1.0",
            folders="sort by `sirna_id` of metadata.csv within each `dataset` into <split>/<id, four digits>/; train: "
            "`site` 1 alone (site 2 of the same experiments is the in-distribution test)",
        ),
        TaskCard(
            name="eurosat",
            title="EuroSAT",
            num_classes=10,
            num_train=16_200,
            num_test=5_400,
            test_split="60 / 20 / 20 split of the RGB images; the paper does not list its files",
            source="github.com/phelber/EuroSAT; lists of a split of these sizes: google-research, "
            "remote_sensing_representations",
            folders="the archive holds class folders; write down which split you take",
        ),
        TaskCard(
            name="fmow",
            title="fMoW",
            num_classes=62,
            num_train=76_863,
            num_test=19_915,
            test_split="validation (later years)",
            source="wilds.stanford.edu, fmow v1.1",
            folders="sort images/rgb_img_<row>.png by `category` of rgb_metadata.csv into <split>/<category>/; train: "
            "`split` train before 2013 by `timestamp`; val: `split` val from 2013 to 2015",
        ),
        TaskCard(
            name="infographic",
            title="Infographic",
            num_classes=345,
            num_train=36_023,
            num_test=15_582,
            test_split="test",
            source="ai.bu.edu/M3SDA (DomainNet, domain infograph)",
            folders="split by infograph_train.txt and infograph_test.txt; classes are the second level of the paths",
        ),
    )
}
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
