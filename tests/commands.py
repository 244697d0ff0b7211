"""Helpers that call commands as a user types them, where exceptions reach the test, and that wait."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from aimscale.sweeps.cli.main import load_verb, main


def say(name: str, *words: object) -> str:
    """Run a verb and return what it prints to stdout."""
    result = CliRunner().invoke(load_verb(name), [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def answer(name: str, *words: object) -> Any:
    """Run a verb with `--json` and return the parsed output."""
    return json.loads(say(name, *words, "--json"))


def refused(*words: object) -> str:
    """Run a command that must fail with exit code 2, and return its error sentence."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    said = told.getvalue()
    assert (ended.value.code, said.count("\n")) == (2, 1), said
    return said


def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds; pytest ends a test that waits in vain."""
    while not condition():
        time.sleep(0.05)
