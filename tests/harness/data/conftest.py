"""Small data sets on disk, made once: smooth random pictures, some of them large."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import smooth

from aimscale.harness.data.store import index
from aimscale.harness.data.store.listing import list_folder
from aimscale.harness.data.store.pack import pack_images
from aimscale.harness.run.config import RunConfig, run_config


@pytest.fixture(autouse=True)
def nothing_decoded_before() -> None:
    """What another test decoded is read again."""
    index._PIXEL_CACHES.clear()


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 labelled PNGs of 32 px, three classes, in several shards."""
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(1)
    for label in ("ant", "bee", "cat"):
        (root / "images" / label).mkdir(parents=True)
        for number in range(20):
            smooth(rng, 32, 32).save(root / "images" / label / f"{number}.png")
    pack_images(list_folder(root / "images"), root / "packed", max_shard_bytes=60_000)
    return root / "packed"


@pytest.fixture(scope="session")
def large_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 unlabelled JPEGs of 70-200 px and one of 40 px."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(2)
    (root / "images").mkdir()
    for number in range(23):
        height, width = rng.integers(70, 200, 2)
        smooth(rng, int(height), int(width)).save(root / "images" / f"{number}.jpg", quality=90)
    smooth(rng, 40, 56).save(root / "images" / "small.png")
    pack_images(list_folder(root / "images"), root / "packed")
    return root / "packed"


@pytest.fixture(scope="session")
def held_out_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 PNGs of 32 px that no other set holds."""
    root = tmp_path_factory.mktemp("held_out")
    rng = np.random.default_rng(3)
    (root / "images").mkdir()
    for number in range(10):
        smooth(rng, 32, 32).save(root / "images" / f"{number}.png")
    pack_images(list_folder(root / "images"), root / "packed")
    return root / "packed"


@pytest.fixture(scope="session")
def configure(small_set: Path, large_set: Path, held_out_set: Path) -> Callable[..., RunConfig]:
    """Configuration of a mixed stream, or of one at `path`; keywords override the data section, `seed`, the objective
    and `validation`."""

    def make(
        *,
        seed: int = 0,
        prefix: str = "paired",
        masked: float | None = None,
        validation: Path | None = None,
        path: Path | str | None = None,
        **data: Any,
    ) -> RunConfig:
        sources = [{"path": str(small_set), "probability": 0.8}, {"path": str(large_set), "probability": 0.2}]
        sources = sources if path is None else [{"path": str(path)}]
        return run_config(
            {
                "model": {"size": "rung-32", "image_size": 32, "patch_size": 4},
                "data": {"sources": sources} | data,
                "objective": {"prefix": prefix, "masked": masked},
                "optimiser": {"batch_size": 16},
                "budgets": [16],
                "seed": seed,
                "validation": {"path": str(held_out_set if validation is None else validation)},
            },
            "the test",
        )

    return make
