"""A task of real images: the 8x8 digits of scikit-learn, and a small model with random weights to probe on it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import saved
from PIL import Image
from sklearn.datasets import load_digits

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.harness.data.store.pack import PackedImage, write_dataset
from aimscale.harness.distributed.group import ALONE, Group
from aimscale.harness.probe.features.backbones import AimBackbone
from aimscale.harness.probe.features.extraction import SplitFeatures, extract_features
from aimscale.harness.probe.features.images import LabelledImages, open_task
from aimscale.harness.probe.protocol import probe_backbone
from aimscale.harness.run.config import ModelSection, ProbeSection, RuntimeConfig, run_config

DIGITS = tuple("0123456789")
FEWER = "98765430"
"""In another order; no image shows a 1 or a 2."""
GEOMETRY: dict[str, Any] = {"size": "rung-32", "image_size": 16, "patch_size": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What the tests of probes ask for again and again."""

    root: Path
    """600 training images, 400 test images, and splits for special cases."""
    model: AIM
    geometry: ModelSection

    def section(self, **changes: Any) -> ProbeSection:
        """The digits by three kinds of probe, with changes."""
        values: dict[str, Any] = {
            "task": "digits",
            "train": str(self.root / "train"),
            "test": str(self.root / "test"),
            "kinds": ("linear", "attentive", "knn"),
            "epochs": 5,
            "batch_size": 64,
            "lrs": (3e-3, 3e-2),
            "precision": "fp32",
            "centre_crop": 1.0,
        }
        return ProbeSection.model_validate(values | changes)

    def open(self) -> tuple[LabelledImages, LabelledImages]:
        """Training and test images."""
        return open_task(self.section(), self.geometry, RuntimeConfig(), 0.0)

    def probe(
        self, section: ProbeSection, backbone: Any = None, *, seed: int, max_bad_fraction: float = 0.01, **options: Any
    ) -> list[dict[str, Any]]:
        """Probe a backbone, or the model, which is left as it was found."""
        backbone = backbone or AimBackbone(lambda: copy.deepcopy(self.model).float())
        data = {"sources": [{"path": str(self.root / "train")}], "max_bad_fraction": max_bad_fraction}
        values = {"model": dict(self.geometry), "data": data, "budgets": [64], "seed": seed}
        values |= {"optimiser": {"batch_size": 8}, "schedule": {"warmup_images": 16}}
        config = run_config(values | {"validation": {"path": str(self.root / "test")}}, "the test")
        return probe_backbone(backbone, section, config, **options)

    def features(self, images: LabelledImages, group: Group = ALONE, **options: Any) -> SplitFeatures:
        """Features of the model."""
        backbone = AimBackbone(lambda: copy.deepcopy(self.model))
        return extract_features(backbone, images, group, precision="fp32", **options)


@pytest.fixture(scope="session")
def model() -> AIM:
    return AIM(model_config(**GEOMETRY))


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory, model: AIM) -> Task:
    root = tmp_path_factory.mktemp("digits")
    _write_digits(root / "train", slice(0, 600))
    _write_digits(root / "test", slice(600, 1000))
    _write_digits(root / "unlabelled", slice(0, 20), classes=None)
    _write_digits(root / "some", slice(0, 80))
    _write_digits(root / "few", slice(0, 12))
    _write_digits(root / "renamed", slice(0, 50), classes=tuple("abcdefghij"))
    _write_digits(root / "fewer", slice(600, 1000), classes=tuple(FEWER), digits=FEWER)
    return Task(root=root, model=model, geometry=ModelSection(**GEOMETRY))


def _write_digits(out: Path, rows: slice, classes: tuple[str, ...] | None = DIGITS, digits: str = "0123456789") -> None:
    """The images of some digits, whose classes are in the digits' order."""
    bunch = load_digits()

    def images() -> Any:
        for i in range(*rows.indices(len(bunch.images))):
            label = digits.find(str(bunch.target[i]))
            if label < 0:
                continue
            image = Image.fromarray((bunch.images[i] * 15).astype(np.uint8)).resize((16, 16))
            yield PackedImage(f"{i:06d}", "png", saved(image), label if classes else None)

    write_dataset(out, images(), classes=classes)
