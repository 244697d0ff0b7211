"""Images to indexed shards, and the training stream that reads them."""

from __future__ import annotations

from collections.abc import Callable

from aimscale.aim.errors import UserError

MIN_IMAGES = 1000
"""Minimum number of images over which the share of undecodable ones met is taken: the first is no reason to stop."""


class DataError(UserError):
    """Images, shards or index that cannot be used as they are."""


def refuse_bad(images: str, num_bad: int, num_images: int, max_bad_fraction: float, last: Callable[[], str]) -> None:
    """Raise DataError if more of some images than `max_bad_fraction` are undecodable; `last` names one."""
    if num_bad > max_bad_fraction * max(num_images, MIN_IMAGES):
        raise DataError(
            f"{num_bad} of {images} cannot be decoded, last {last()}; repair the shard and index it again, or raise "
            f"data.max_bad_fraction ({max_bad_fraction:g})"
        )
