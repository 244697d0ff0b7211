"""Images to indexed shards, and the training stream that reads them."""

from __future__ import annotations

from aimscale.aim.errors import UserError


class DataError(UserError):
    """Images, shards or index that cannot be used as they are."""
