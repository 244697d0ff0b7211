"""What a data set says of itself in `dataset.json`, read without opening it: no torch, no index, no images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aimscale.harness.data.errors import DataError
from aimscale.harness.run.config import UNINDEXED, RunConfig


def num_images(path: str) -> int | None:
    """Images of a data set; None where it is not made yet or cannot be read."""
    return _field(path, "num_samples", int)


def fingerprint(path: str) -> str | None:
    """16 hex digits of a data set's content; None where it is not made yet or cannot be read."""
    return _field(path, "fingerprint", str)


def with_fingerprints(config: RunConfig) -> RunConfig:
    """The run with the fingerprints of its data sources filled in where they are not given."""
    data = config.training.data
    sources = tuple(
        source.model_copy(update={"fingerprint": source.fingerprint or fingerprint(source.path)})
        for source in data.sources
    )
    training = config.training.model_copy(update={"data": data.model_copy(update={"sources": sources})})
    return config.model_copy(update={"training": training})


def _field(path: str, name: str, kind: Any) -> Any:
    if path.startswith(UNINDEXED):
        return None
    try:
        return kind(json.loads(_text(path))[name])
    except (OSError, ValueError, KeyError, TypeError, DataError):  # the last: no package for that kind of URL
        return None


def _text(path: str) -> str | bytes:
    if "://" not in path:
        return (Path(path) / "dataset.json").read_text()
    from aimscale.harness.data.store.shards import join, read_bytes  # fsspec is slow to import

    return read_bytes(join(path, "dataset.json"))
