"""The page of the run directory names every field that the code writes."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest
from pages import ROOT

from aimscale.harness.run import directory
from aimscale.harness.run.directory import RunDir, Status
from aimscale.harness.run.expected import Expected, ExpectedPoint
from aimscale.harness.run.lock import Holder
from aimscale.harness.step.checkpoint import Manifest
from aimscale.harness.validation import ValidationLosses

PAGE = (ROOT / "docs" / "run-directory.md").read_text()
NAMED = set(re.findall(r"`([\w.-]+?)/?`", PAGE))


@pytest.mark.parametrize("kind", [Status, Manifest, Expected, ExpectedPoint, Holder, ValidationLosses])
def test_every_field_is_named(kind: type) -> None:
    assert {field.name for field in dataclasses.fields(kind)} <= NAMED


def test_states_reasons_exit_codes_and_files_are_those_of_the_code() -> None:
    for words in (directory.State, directory.ReasonClass):
        assert all(re.search(rf"\b{word}\b", PAGE) for word in typing.get_args(words))
    codes = {value for name, value in vars(directory).items() if name.startswith("EXIT_")}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)} == codes
    paths = [path for path in vars(RunDir("run")).values() if path.name != "run"]
    assert {path.name for path in paths} <= NAMED
