"""The paper's fifteen benchmarks as cards: what a data set must be before its accuracy compares with the paper's.

A probe whose task bears one of these names is checked against the card, so that a subset, another split or another
class list cannot pass for the benchmark. Any other name is a task of one's own and is not checked. Sizes and classes:
AIMv2 (arXiv 2411.14402), Table B1; iWildCam from WILDS (arXiv 2012.07421), because that table leaves it out. How splits
follow from a WILDS set's metadata is what the loaders of the `wilds` package (2.0) do. Where the data come from and how
to lay them out: `docs/evaluation.md`.
"""

from __future__ import annotations

from typing import NamedTuple

from aimscale.aim.errors import UserError


class ProbeError(UserError):
    """A task or a model that cannot be probed as asked."""


class TaskCard(NamedTuple):
    """One benchmark."""

    name: str
    """The task's name in configurations and tables."""
    title: str
    """The paper's column heading (Table 6)."""
    num_classes: int
    num_train: int
    num_test: int | None
    """Images of the split that is scored; None where the paper does not say which it is."""


_CARDS = (
    TaskCard("imagenet-1k", "IN-1k", 1000, 1_281_167, 50_000),
    TaskCard("inat18", "iNAT-18", 8142, 437_513, 24_426),
    TaskCard("cifar10", "CIFAR-10", 10, 50_000, 10_000),
    TaskCard("cifar100", "CIFAR-100", 100, 50_000, 10_000),
    TaskCard("food101", "Food101", 101, 75_750, 25_250),
    TaskCard("dtd", "DTD", 47, 3_760, 1_880),
    TaskCard("pets", "Pets", 37, 3_680, 3_669),
    TaskCard("cars", "Cars", 196, 8_144, 8_041),
    TaskCard("iwildcam", "iWildCam", 182, 129_809, None),
    TaskCard("camelyon17", "Camelyon17", 2, 302_436, 34_904),
    TaskCard("pcam", "PCAM", 2, 262_144, 32_768),
    TaskCard("rxrx1", "RxRx1", 1139, 40_612, 9_854),
    TaskCard("eurosat", "EuroSAT", 10, 16_200, 5_400),
    TaskCard("fmow", "fMoW", 62, 76_863, 19_915),
    TaskCard("infographic", "Infographic", 345, 36_023, 15_582),
)
CARDS = {card.name: card for card in _CARDS}
"""Name -> card, in the order of the paper's Table 6."""


def check_against_card(task: str, *, num_classes: int, num_train: int, num_test: int) -> None:
    """Refuse a data set that bears a benchmark's name and does not match its card; other names pass.

    Raises:
        ProbeError: the first number that differs.
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
            raise ProbeError(
                f"task '{task}' is {card.title} with {expected:,} {what}, but this data set has {found:,}; "
                "complete it, or give the task another name so that it is not taken for the benchmark"
            )
