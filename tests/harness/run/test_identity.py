"""What names a run: fields that later versions add, paths, and what is measured leave the name alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aimscale.harness.run.config import ProbeSection, RunConfig, TrainingConfig, ValidationSection, parse, run_config
from aimscale.harness.run.section import is_measurement

FIELDS: dict[str, Any] = {
    "model": {"size": "w16-d2", "image_size": 16, "patch_size": 4},
    "data": {"sources": [{"path": "train", "fingerprint": "0123456789abcdef"}]},
    "budgets": [4096],
    "validation": {"path": "validation"},
    "schedule": {"warmup_images": 16},
}


def run(**changes: Any) -> RunConfig:
    return run_config({**FIELDS, **changes}, "the test")


def test_the_name_of_a_run_never_changes_by_itself() -> None:
    assert run().run_id == "w16-d2_uall_s0_861c1e87"
    assert ValidationSection(path="v").digest == ValidationSection(path="v", every_images=9).digest == "152a37f7"


def test_a_field_that_a_later_version_adds_renames_nothing_until_it_is_set() -> None:
    class Later(TrainingConfig):
        registers: int = 0

    def name(**fields: Any) -> str:
        training = Later.model_validate({**run().training.model_dump(), **fields})
        return run().model_copy(update={"training": training}).run_id

    assert name() == run().run_id
    assert name(registers=4) != run().run_id


@pytest.mark.parametrize(
    "changes",
    [
        {"budgets": [4096, 8192]},
        {"validation": {"path": "elsewhere", "num_prefixes": 2, "every_images": 64}},
        {"probes": [{"task": "two", "train": "a", "test": "b", "every_images": None}]},  # as older files have it
        {"data": {"sources": [{"path": "/another/mount", "fingerprint": "0123456789abcdef"}]}},
        {"model": {"size": "w16-d2", "image_size": 16, "patch_size": 4, "head_rule": "proportional"}},
    ],
)
def test_what_is_measured_where_data_lie_and_spelt_out_defaults_name_no_other_run(changes: dict[str, Any]) -> None:
    assert run(**changes).run_id == run().run_id


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"data": {"sources": [{"path": "train", "fingerprint": "another"}]}},
        {"data": {"sources": [{"path": "train"}]}},
        {"data": {**FIELDS["data"], "shuffle_shards": 99}},
        {"schedule": {"warmup_images": 16, "decay_fraction": 0.1}},
        {"schedule": {"kind": "cosine", "warmup_images": 16}},
        {"schedule": {"kind": "cosine", "warmup_images": 16}, "budgets": [8192]},
    ],
)
def test_what_is_trained_names_another_run(changes: dict[str, Any]) -> None:
    assert run(**changes).run_id != run().run_id


def test_an_evaluation_is_named_by_its_settings_and_the_content_of_its_data() -> None:
    def name(data: str | None = "1", **changes: Any) -> str:
        section = parse(ProbeSection, {"task": "two", "train": "a", "test": "b", **changes}, "the test")
        return section.evaluation_id(data, "2")

    assert name(train="/mnt/a") == name(batch_size=256) == name(kinds=["knn"]) == name()
    assert len({name(), name(epochs=30), name(task="three"), name(batch_size=128), name("3")}) == 5
    assert name(None) == f"{name().partition('-')[0]}-*"


Config = Callable[..., RunConfig]


def test_nothing_of_the_runtime_names_a_run(tiny_config: Config) -> None:
    assert tiny_config({"num_workers": 3, "zero_stage": 2}).run_id == tiny_config().run_id


@pytest.mark.parametrize(
    ("found", "wanted", "is_same"),
    [
        ("ab.cd.12", "ab.cd.12", True),
        ("ab.cd.12", "ab.*.12", True),
        ("ab.*.12", "ab.cd.12", False),
        ("ab.cd.12", "ab.*.34", False),
        ("ab.cd", "ab.*.12", False),
        ("ab-cd-12", "ab-*", False),
        (None, "ab-*", False),
        ("ab[1]-cd", "ab[1]-cd", True),
    ],
)
def test_a_measurement_is_known_by_its_fields(found: str | None, wanted: str, is_same: bool) -> None:
    assert is_measurement(found, wanted) == is_same
