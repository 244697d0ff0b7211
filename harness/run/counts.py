"""Numbers as people write them: `4k`, `500M`."""

from __future__ import annotations

import re
from typing import Any

_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([kKMB]?)")
_UNIT = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}


def count(value: Any) -> Any:
    """Turn `4k`, `500M`, `2B`, `1e6` or `4096` into an integer; what is no count is left for the caller to report."""
    if isinstance(value, bool):
        raise ValueError("must be a count such as 4096, 4k or 500M")
    if isinstance(value, str) and (match := _COUNT.fullmatch(value.strip().replace("_", ""))):
        value = round(float(match[1]) * _UNIT[match[2]], 6)
    return int(value) if isinstance(value, float) and value.is_integer() else value
