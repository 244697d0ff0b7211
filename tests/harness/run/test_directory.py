"""The run directory: atomic files, the lock, and what may take it over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from aimscale.aim.errors import UserError
from aimscale.harness.run.config import ConfigError, RunConfig
from aimscale.harness.run.directory import RunDir, RunDirError, Status

Config = Callable[..., RunConfig]


def test_create_keeps_a_run_and_refuses_another(tmp_path: Path, tiny_config: Config) -> None:
    config = tiny_config()
    run = RunDir.create(tmp_path / "run", config)
    assert run.load_config() == config
    run.write_status(state="running", images_done=8)
    RunDir.create(tmp_path / "run", config)
    assert run.read_status().images_done == 8
    with pytest.raises(RunDirError, match=r"w16-d2_uall_s0_.*w16-d2_uall_s1"):
        RunDir.create(tmp_path / "run", tiny_config(seed=1))
    with pytest.raises(ConfigError, match=str(tmp_path)):
        RunDir(tmp_path).load_config()


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text(), inner),
)
FIELDS = [field.name for field in dataclasses.fields(Status)] + ["rows", "starts", "host", "pid", "token"]
CONTENT = strategies.one_of(
    strategies.binary(),
    JSON.map(lambda value: json.dumps(value).encode()),
    strategies.dictionaries(strategies.sampled_from(FIELDS), JSON).map(lambda value: json.dumps(value).encode()),
)


@pytest.mark.parametrize("name", ["status.json", "results.json", "lock"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENT)
def test_whatever_a_file_of_a_run_holds_is_read_or_named_in_one_sentence(
    tmp_path: Path, name: str, content: bytes
) -> None:
    run = RunDir(tmp_path)
    read: dict[str, Callable[[], object]] = {
        "status.json": run.read_status,
        "results.json": run.read_rows,
        "lock": run.is_held,
    }
    (tmp_path / name).write_bytes(content)
    said = ""
    try:
        read[name]()
    except UserError as error:
        said = str(error)
    assert not said or (str(tmp_path / name) in said and "\n" not in said)
