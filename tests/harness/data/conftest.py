"""Small data sets on disk, made once: smooth random pictures, some of them large."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.config import ResultConfig
from harness.data.pack import pack_folder


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(rng: np.random.Generator, height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    picture(rng, height, width).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 labelled PNGs of 32 px, three classes, in several shards."""
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(1)
    for label in ("ant", "bee", "cat"):
        (root / "images" / label).mkdir(parents=True)
        for number in range(20):
            picture(rng, 32, 32).save(root / "images" / label / f"{number}.png")
    pack_folder(root / "images", root / "packed", max_shard_bytes=60_000)
    return root / "packed"


@pytest.fixture(scope="session")
def large_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 unlabelled JPEGs of 70-200 px and one of 40 px."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(2)
    (root / "images").mkdir()
    for number in range(23):
        height, width = rng.integers(70, 200, 2)
        (root / "images" / f"{number}.jpg").write_bytes(jpeg(rng, int(height), int(width)))
    picture(rng, 40, 56).save(root / "images" / "small.png")
    pack_folder(root / "images", root / "packed")
    return root / "packed"


@pytest.fixture(scope="session")
def configure(small_set: Path, large_set: Path) -> Callable[..., ResultConfig]:
    """Configuration of a mixed stream; keywords override the data section, `seed` and `prefix`."""

    def make(*, seed: int = 0, prefix: str = "paired", **data: Any) -> ResultConfig:
        sources = [{"path": str(small_set), "probability": 0.8}, {"path": str(large_set), "probability": 0.2}]
        return ResultConfig.model_validate(
            {
                "model": {"size": "rung-32", "image_size": 32, "patch_size": 4},
                "data": {"sources": sources} | data,
                "objective": {"prefix": prefix},
                "optimiser": {"batch_size": 16},
                "budgets": [16],
                "seed": seed,
                "validation": {"path": "unused"},
            }
        )

    return make
