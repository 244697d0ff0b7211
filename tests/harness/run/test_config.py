"""What makes a run's identity, and how fields that came later leave the names of earlier runs alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from aimscale.harness.run.config import (
    ConfigError,
    ResultConfig,
    RunConfig,
    RuntimeConfig,
    canonical_json,
    fingerprint,
    parse,
)

Config = Callable[..., RunConfig]


def result(**changes: object) -> ResultConfig:
    values = {
        "model": {"size": "w16-d2", "image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": "train"}]},
        "budgets": [4096],
        "validation": {"path": "validation"},
        "schedule": {"warmup_images": 16},
        **changes,
    }
    return parse(ResultConfig, values, "the test")


def test_the_name_of_a_run_never_changes_by_itself() -> None:
    """A new result field must leave the canonical JSON of runs that do not set it as it was."""
    assert fingerprint(result()) == "0bd5c8dd"


def test_rolling_back_is_part_of_a_runs_identity_where_it_is_set() -> None:
    plain, rolling = result(), result(roll_back={"every_images": 64})
    assert "roll_back" not in canonical_json(plain)
    assert "roll_back" not in yaml.safe_load(RunConfig(result=plain).to_yaml())["result"]
    assert fingerprint(rolling) not in (fingerprint(plain), fingerprint(result(roll_back={"every_images": 32})))
    for each in (plain, rolling):
        config = RunConfig(result=each)
        assert parse(RunConfig, yaml.safe_load(config.to_yaml()), "again") == config


@pytest.mark.parametrize("old", [{"max_roll_backs": 0}, {"max_roll_backs": 0, "offload_optimiser": False}])
def test_the_runtime_of_earlier_runs_is_read(old: dict, tiny_config: Config) -> None:
    assert parse(RuntimeConfig, old, "an old file").max_skipped_steps == 20
    assert tiny_config(old).run_id == tiny_config().run_id, "nothing of the runtime changes it"


def test_a_moved_field_says_where_it_went() -> None:
    with pytest.raises(ConfigError, match="max_roll_backs changes results; set roll_back among the result fields"):
        parse(RuntimeConfig, {"max_roll_backs": 2}, "config.yaml")
    with pytest.raises(ConfigError, match=r"unknown key 'roll_back\.every_image'; did you mean 'every_images'"):
        result(roll_back={"every_image": 3})
