from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from aimscale.harness.data.random_access import make_key, permute, random_bits
from aimscale.harness.data.stream.order import Mixture, SourceOrder


def order(
    num_images: int, num_shards: int, *, unique: int | None = None, lanes: int = 100, key: int = 0
) -> SourceOrder:
    num_unique = num_images if unique is None else unique
    return SourceOrder(num_images=num_images, num_shards=num_shards, num_unique=num_unique, num_lanes=lanes, key=key)


def epoch(of: SourceOrder, number: int = 0) -> npt.NDArray[np.int64]:
    return of.numbers(np.arange(of.num_unique), np.full(of.num_unique, number))


def test_epochs_are_exact_and_subsets_nested_and_of_all_shards_alike() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        num_images = int(rng.integers(1, 400))
        num_shards = int(rng.integers(1, min(num_images, rng.choice([10, 400])) + 1))
        some, more = np.sort(rng.integers(1, num_images + 1, 2)).tolist()
        lanes = int(rng.integers(1, 20))
        subsets = []
        for unique in (some, more):
            orders = [order(num_images, num_shards, unique=unique, lanes=lanes, key=key) for key in (0, 1)]
            epochs = [np.sort(epoch(each, number)) for each in orders for number in (0, 3)]
            assert len(np.unique(epochs[0])) == unique
            assert all(np.array_equal(each, epochs[0]) for each in epochs)
            subsets.append(epochs[0])
            size = num_images // num_shards
            counts = np.bincount(epochs[0] // size, minlength=num_images // size)[: num_images // size]
            assert np.ptp(counts) <= 1, (num_images, num_shards, unique)
        assert np.isin(*subsets).all()


def test_two_billion_images_are_read_shard_by_shard_and_shards_come_one_at_a_time() -> None:
    pool, start = order(2 * 10**9 + 7, 200_000), 10**9
    shards = pool.numbers(np.arange(start, start + 300_000), np.full(300_000, 5)) // 10_000
    first = np.sort(np.unique(shards, return_index=True)[1])
    assert len(first) == pytest.approx(130, abs=1)
    assert (first[:100] < 2000).all(), "of a hundred shards side by side some are left waiting"
    assert (np.diff(first[100:]) > 8000).all(), "shards begin together"
    assert np.ptp(np.bincount(shards[:10_000])[np.unique(shards[:10_000])]) <= 200
    assert all(len(np.unique(shards[a : a + 100])) >= 99 for a in range(0, 300_000, 5000))
    assert len(np.unique(shards[::100])) >= 100, "rounds begin with the same shard"
    fewer = order(2 * 10**9 + 7, 200_000, unique=10**8 + 1)
    assert len(np.unique(fewer.numbers(np.arange(10_000), np.full(10_000, 5)) // 10_000)) <= 121
    shards, within = np.divmod(epoch(order(2 * 10**9 + 7, 200_000, unique=50)), 10_000)
    assert np.ptp(shards) > 150_000
    assert np.ptp(within) > 7500


def test_epochs_and_seeds_differ_in_the_order_of_shards_and_within_them() -> None:
    orders = [epoch(order(3000, 60, lanes=6, key=key), number) for key, number in ((0, 0), (0, 1), (1, 0))]
    sequences = [tuple(each[np.sort(np.unique(each // 50, return_index=True)[1])] // 50) for each in orders]
    assert len({*sequences}) == 3
    within = [tuple(each[each // 50 == 7]) for each in orders]
    assert len({*within}) == 3
    few = order(4000, 200, unique=390, lanes=10)  # one image of each shard, two of most
    first, second = (np.argsort(epoch(few, number)) for number in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2
    spans = [np.ptp(np.flatnonzero(orders[0] // 50 == shard)) for shard in range(60)]
    assert np.sort(spans)[:48].max() < 51 * 6, "more shards are read twice than lie at the ends of lanes"


def test_few_shards_are_shuffled_as_a_whole() -> None:
    subset = permute(np.arange(500), 1000, make_key("subset"))
    expected = subset[permute(np.arange(500), 500, random_bits(3, 2))]
    assert np.array_equal(epoch(order(1000, 1, unique=500, key=3), 2), expected)
    places = np.argsort(epoch(order(10_000, 100)))
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    means = places.reshape(100, 100).mean(1)
    assert means.std() == pytest.approx(10_000 / 12**0.5 / 10, rel=0.25)


def test_sources_are_mixed_in_exact_shares() -> None:
    mixture = Mixture([0.5, 0.3, 0.2])
    source_of, _ = mixture.locate(np.arange(10**9, 10**9 + 10_000))
    shares = np.stack([np.cumsum(source_of == number) / np.arange(1, 10_001) for number in range(3)])
    assert np.abs(shares[:, -1] - [0.5, 0.3, 0.2]).max() < 4e-4
    assert np.abs(shares[:, 99] - [0.5, 0.3, 0.2]).max() < 0.04
    source_of, rank = mixture.locate(np.arange(997))
    assert mixture.counts(997) == np.bincount(source_of).tolist()
    for number in range(3):
        assert rank[source_of == number].tolist() == list(range(mixture.counts(997)[number]))
