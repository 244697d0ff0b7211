"""The data sets that a run trains on, opened and checked against its configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import I64, make_key
from aimscale.harness.data.store.dataset_info import DatasetInfo, require_usable
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.store.overlap import refuse_overlap
from aimscale.harness.data.store.remote import is_url
from aimscale.harness.data.stream.order import Mixture, SourceOrder

if TYPE_CHECKING:
    from aimscale.harness.run.config import DataSection, RunConfig, SourceSection

_SHARDS_AHEAD = 8  # shards that are fetched before they are needed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Data set of the mixture."""

    dataset: ShardDataset
    order: SourceOrder
    """Order of its usable images."""
    positions_ahead: int
    """Distance, in positions, at which shards are fetched ahead; 0 for local ones."""

    def sample_numbers(self, slots: I64, epochs: I64) -> I64:
        """Return the sample numbers at `slots` (0..U-1) of `epochs`."""
        return self.dataset.usable(self.order.numbers(slots, epochs))


def open_sources(config: RunConfig, cache_dir: str | None, cache_gb: float) -> list[Source]:
    """Open the sources of a run, in the order of its configuration.

    Raises:
        DataError: a data set cannot be opened, is not the one that the run was planned with, lacks images, has too many
            undecodable ones, or shares an image with the validation set.
    """
    training = config.training
    datasets = [open_dataset(source.path, cache_dir=cache_dir, cache_gb=cache_gb) for source in training.data.sources]
    for source, dataset in zip(training.data.sources, datasets, strict=True):
        require_fingerprint(source, dataset.info)
    held_out = open_dataset(config.evaluation.validation.path, cache_dir=cache_dir, cache_gb=cache_gb)
    refuse_overlap(datasets, held_out)
    counts = unique_per_source(training.data, [dataset.info for dataset in datasets])
    found: list[Source] = []
    for number, (source, dataset, num_unique) in enumerate(zip(training.data.sources, datasets, counts, strict=True)):
        info = dataset.info
        order = SourceOrder(
            num_images=info.num_usable,
            num_shards=info.num_shards,
            num_unique=num_unique,
            num_lanes=math.ceil(training.data.shuffle_shards * source.probability),
            key=make_key("epoch", training.seed, number),
        )
        ahead = math.ceil(_SHARDS_AHEAD * info.num_usable / info.num_shards / source.probability)
        is_remote = is_url(dataset.location)
        found.append(Source(dataset=dataset, order=order, positions_ahead=ahead if is_remote else 0))
    return found


def require_fingerprint(source: SourceSection, info: DatasetInfo) -> None:
    """Raise DataError if a data set is not the one that a run was planned with."""
    if source.fingerprint not in (None, info.fingerprint):
        raise DataError(
            f"{source.path} holds other images (fingerprint {info.fingerprint}) than those this run trains "
            f"on ({source.fingerprint}); put those back, or launch the sweep again to train a new run on these"
        )


def unique_per_source(data: DataSection, infos: Sequence[DatasetInfo]) -> list[int]:
    """Return U of every source, given the infos of their data sets."""
    for source, info in zip(data.sources, infos, strict=True):
        require_usable(source.path, info, data.max_bad_fraction)
    if data.unique_images is None:
        return [info.num_usable for info in infos]
    counts = Mixture([source.probability for source in data.sources]).counts(data.unique_images)
    for source, info, count in zip(data.sources, infos, counts, strict=True):
        if not 1 <= count <= info.num_usable:
            raise DataError(
                f"unique_images {data.unique_images} takes {count} images of {source.path}, which has "
                f"{info.num_usable} usable ones; {'lower' if count else 'raise'} data.unique_images or change the "
                "probabilities"
            )
    return counts
