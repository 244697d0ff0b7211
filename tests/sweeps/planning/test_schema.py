"""The schema that editors check sweep files by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from commands import say

from aimscale.harness.run.config import read_yaml
from aimscale.sweeps.planning.schema import sweep_schema
from aimscale.sweeps.planning.sweepfile import PRESETS

ROOT = Path(__file__).parents[3]
PAGES = [
    text for path in sorted(ROOT.glob("docs/*.md")) for text in re.findall(r"```yaml\n(.*?)```", path.read_text(), re.S)
]
FILES = [text for text in PAGES if re.search(r"^name: ", text, re.M) and "sizes:" in text]
PLAIN: dict[str, Any] = {"name": "s", "sizes": ["rung-32"], "budgets": ["4k", 8000]}


def wrong(document: dict[str, Any]) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(sweep_schema()).iter_errors(document)]


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_valid(path: Path) -> None:
    assert wrong(read_yaml(path)) == []


def test_every_sweep_file_of_the_pages_is_valid(tmp_path: Path) -> None:
    assert len(FILES) > 5
    for text in FILES:
        (tmp_path / "sweep.yaml").write_text(text)
        assert wrong(read_yaml(tmp_path / "sweep.yaml")) == [], text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"szes": []}, "szes"),
        ({"base": {"optimizer": {}}}, "optimizer"),
        ({"base": {"optimiser": {"lr_peek": 1}}}, "lr_peek"),
        ({"budgets": ["4q"]}, "4q"),
        ({"base": {"runtime": {"zero": 7}}}, "zero"),
    ],
)
def test_a_mistake_is_named(changes: dict[str, Any], named: str) -> None:
    assert wrong(PLAIN) == []
    assert any(named in message for message in wrong({**PLAIN, **changes}))


def test_a_trainers_own_values_stand_in_base() -> None:
    trainer = {"command": "python t.py {width}", "sizes": {"a": {"width": 3}}, "params": "width"}
    assert wrong({**PLAIN, "trainer": trainer, "base": {"rate": 0.1}}) == []


def test_the_command_prints_it() -> None:
    assert '"$schema"' in say("plan", "--schema")
