"""The error that means "the user can fix this", and how options are named to whoever reads."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from contextvars import ContextVar


class AnalysisError(Exception):
    """A mistake in a table or in an option; the message says what, where and what to do about it."""

    exit_code = 2


_IS_COMMAND = ContextVar("is_command", default=False)
_PYTHON = {
    "columns": 'columns={{"{}": "{}"}}', "fix": 'fixed={{"{}": {}}}',
    "ignore": 'ignore=["{}"]', "measure": 'measures=["{}"]', "out": 'out="{}"', "where": 'where=["{}"]',
}  # fmt: skip
"""Option -> the argument that it is in Python, with its value."""


@contextlib.contextmanager
def in_command() -> Iterator[None]:
    """Name options as the command does, within; elsewhere they read as Python's arguments."""
    token = _IS_COMMAND.set(True)
    try:
        yield
    finally:
        _IS_COMMAND.reset(token)


def option(name: str, value: str = "") -> str:
    """Name an option as its reader types it: `--fix E=0` in a command, `fixed={"E": 0}` in Python."""
    if _IS_COMMAND.get():
        return f"--{name} {shlex.quote(value)}" if value else f"--{name}"
    form, (key, _, right) = _PYTHON[name], value.partition("=")
    return form.format(*((key, right) if "{{" in form else (value,))) if value else form.partition("=")[0]
