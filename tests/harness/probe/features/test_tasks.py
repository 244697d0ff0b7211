"""The published benchmarks, and which averages of blocks are tried."""

from __future__ import annotations

import pytest

from aimscale.analysis.published import TASKS
from aimscale.harness.data.store.benchmarks import BENCHMARKS
from aimscale.harness.probe.features.tasks import ProbeError, block_sets, check_benchmark


def test_the_papers_fifteen_come_first_in_its_order_and_under_the_names_that_compare_knows() -> None:
    assert tuple(BENCHMARKS)[: len(TASKS)] == TASKS


def test_a_subset_cannot_pass_for_the_benchmark() -> None:
    check_benchmark("cifar10", num_classes=10, num_train=50_000, num_test=10_000)
    check_benchmark("my-cifar10", num_classes=10, num_train=500, num_test=100)
    check_benchmark("iwildcam", num_classes=182, num_train=129_809, num_test=8_154)
    with pytest.raises(ProbeError, match=r"cifar10.*50,000.*49,999"):
        check_benchmark("cifar10", num_classes=10, num_train=49_999, num_test=10_000)
    with pytest.raises(ProbeError, match=r"cifar10.* 10 .*100"):
        check_benchmark("cifar10", num_classes=100, num_train=50_000, num_test=10_000)


def test_block_sets_hold_the_fixed_one_singles_and_the_published_best() -> None:
    sets, last = block_sets(24)
    assert last == (18, 19, 20, 21, 22, 23)
    assert (12, 13, 14, 15, 16, 17) in sets
    assert {(block,) for block in range(24)} <= set(sets)
    assert block_sets(2) == ([(0,), (1,)], (1,))
