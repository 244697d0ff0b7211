"""Commands as a user types them; what they raise reaches the test."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from aimscale.sweeps.cli.main import load_verb, main


def say(name: str, *words: object) -> str:
    """What a verb prints to stdout."""
    result = CliRunner().invoke(load_verb(name), [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def answer(name: str, *words: object) -> Any:
    """What a verb prints with `--json`."""
    return json.loads(say(name, *words, "--json"))


def refused(*words: object) -> str:
    """The one sentence with which a command ends, with code 2."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    said = told.getvalue()
    assert (ended.value.code, said.count("\n")) == (2, 1), said
    return said
