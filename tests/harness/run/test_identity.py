"""What names a run: fields that later versions add, paths, and what is measured leave the name alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from pydantic_core import PydanticUndefined

from aimscale.harness.run.config import (
    EvaluationConfig,
    ProbeSection,
    RunConfig,
    TrainingConfig,
    ValidationSection,
    parse,
    run_config,
)
from aimscale.harness.run.identity import (
    EVALUATION_DEFAULTS,
    PATHS,
    TRAINING_DEFAULTS,
    evaluation_digest,
    training_digest,
)
from aimscale.harness.run.strict import Section

FIELDS: dict[str, Any] = {
    "model": {"size": "w16-d2", "image_size": 16, "patch_size": 4},
    "data": {"sources": [{"path": "train", "fingerprint": "0123456789abcdef"}]},
    "budgets": [4096],
    "validation": {"path": "validation"},
    "schedule": {"warmup_images": 16},
}


def run(**changes: Any) -> RunConfig:
    return run_config({**FIELDS, **changes}, "the test")


def fields_with_defaults(kind: type[Section], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> default, as JSON has it, of every field that may be left out."""
    found: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        inner = next(
            (part for part in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is(part)), None
        )
        if field.default is not PydanticUndefined and not isinstance(field.default, Section):
            found[f"{prefix}{name}"] = list(field.default) if isinstance(field.default, tuple) else field.default
        if inner is not None:
            found |= fields_with_defaults(inner, f"{prefix}{name}.")
    return found


def _is(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def test_every_field_has_its_default_in_the_tables_so_that_later_ones_rename_nothing() -> None:
    """A failure here asks for a line in `harness/run/identity.py`: the value that does what was done before."""
    training = fields_with_defaults(TrainingConfig)
    of_sources = {name for name in training if name.startswith("data.sources.")}
    assert of_sources == {"data.sources.fingerprint", "data.sources.probability"}, "these always count"
    assert training.keys() - of_sources == TRAINING_DEFAULTS.keys()
    for kind, section in (("validation", ValidationSection), ("probe", ProbeSection)):
        assert fields_with_defaults(section).keys() == EVALUATION_DEFAULTS[kind].keys()
    assert set(EvaluationConfig.model_fields) == {"budgets", "validation", "probes"}


def test_the_name_of_a_run_never_changes_by_itself() -> None:
    assert run().run_id == "w16-d2_uall_s0_861c1e87"
    assert evaluation_digest("validation", {"num_images": None, "num_prefixes": 4, "path": "v"}) == "152a37f7"


def test_a_field_that_a_later_version_adds_renames_nothing_until_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    values = run().training.model_dump(mode="json")
    before = training_digest(values, None)
    monkeypatch.setitem(TRAINING_DEFAULTS, "model.registers", 0)
    values["model"]["registers"] = 0
    assert training_digest(values, None) == before
    values["model"]["registers"] = 4
    assert training_digest(values, None) != before


@pytest.mark.parametrize(
    "changes",
    [
        {"budgets": [4096, 8192]},
        {"validation": {"path": "elsewhere", "num_prefixes": 2}},
        {"probes": [{"task": "two", "train": "a", "test": "b"}]},
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
        {"schedule": {"warmup_images": 16, "decay_fraction": 0.1}},
        {"schedule": {"kind": "cosine", "warmup_images": 16}},
        {"schedule": {"kind": "cosine", "warmup_images": 16}, "budgets": [8192]},
    ],
)
def test_what_is_trained_names_another_run(changes: dict[str, Any]) -> None:
    assert run(**changes).run_id != run().run_id


def test_a_cosine_budget_is_part_of_what_is_trained() -> None:
    schedule = {"kind": "cosine", "warmup_images": 16}
    assert run(schedule=schedule).run_id != run(schedule=schedule, budgets=[8192]).run_id


def test_an_evaluation_is_named_by_its_settings_not_by_its_folders() -> None:
    def digest(**changes: Any) -> str:
        section = parse(ProbeSection, {"task": "two", "train": "a", "test": "b", **changes}, "the test")
        return evaluation_digest("probe", section.model_dump(mode="json"))

    assert digest(train="/mnt/a") == digest(holdout_fraction=0.2) == digest()
    assert len({digest(), digest(epochs=30), digest(task="three"), digest(holdout_fraction=0.1)}) == 4
    assert set(PATHS) <= {*ProbeSection.model_fields, *ValidationSection.model_fields}


def test_configurations_of_version_1_are_read() -> None:
    old = {"version": 1, "result": FIELDS, "runtime": {"num_workers": 2}}
    config = parse(RunConfig, yaml.safe_load(yaml.safe_dump(old)), "config.yaml")
    assert config.runtime.num_workers == 2
    assert config.run_id == run().run_id
    assert yaml.safe_load(config.to_yaml())["version"] == 2
    assert parse(RunConfig, yaml.safe_load(config.to_yaml()), "again") == config


Config = Callable[..., RunConfig]


def test_nothing_of_the_runtime_names_a_run(tiny_config: Config) -> None:
    assert tiny_config({"num_workers": 3, "zero_stage": 2}).run_id == tiny_config().run_id


def test_runs_of_version_1_keep_the_crops_and_the_precision_that_they_were_measured_with() -> None:
    task = {"task": "pets", "train": "train", "test": "test"}
    old = parse(RunConfig, {"version": 1, "result": {**FIELDS, "probes": [task]}}, "the test").evaluation
    new = run(probes=[task]).evaluation
    assert (old.validation.centre_crop, old.probes[0].centre_crop, old.probes[0].precision) == (1.0, 1.0, "fp32")
    assert (new.validation.centre_crop, new.probes[0].centre_crop, new.probes[0].precision) == (0.875, 0.875, "bf16")
