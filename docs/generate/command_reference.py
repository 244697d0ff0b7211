"""Every verb and option of `aimscale`, as Markdown, from the functions behind them.

    python docs/generate/command_reference.py > docs/commands.md

The site's build calls `markdown()`; a test compares the committed page with it. It reads signatures, not typer's
commands, whose attributes change between versions.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from typer.models import ArgumentInfo, OptionInfo

from aimscale.sweeps.cli.main import VERBS

INTRODUCTION = """\
# Commands

Every verb and option, written by `python docs/generate/command_reference.py`; `aimscale VERB --help` prints
the same. SWEEP is a sweep file, a preset (`demo`, `aim-paper`, `data-scaling`, `isoflop`) or the name of a launched
sweep. [Completion](installation.md#shell-completion) offers verbs, options and sweeps as you type.

A user's mistake is one sentence on stderr and exit code 2. `train` exits with 0 when finished, 3 when training
diverged, 75 when it saved after a signal and wants to be started again, 1 on a crash; `launch` with 1 when a run failed
and 130 when it was interrupted; `doctor` with 1 when something needed fails.
"""


def markdown() -> str:
    """The page."""
    parts = [INTRODUCTION]
    for verb, (_, line) in VERBS.items():
        functions = verb_functions(verb)
        if list(functions) == [verb]:
            parts += _section(f"aimscale {verb}", functions[verb], 2)
            continue
        parts.append(f"## `aimscale {verb}`\n\n{line}\n")
        for name, function in functions.items():
            parts += _section(f"aimscale {verb} {name}", function, 3)
    return "\n".join(parts).rstrip() + "\n"


def verb_functions(verb: str) -> dict[str, Callable[..., Any]]:
    """Command -> function of one verb; the verb itself is the only key where it has no commands of its own."""
    app = importlib.import_module(VERBS[verb][0]).app
    commands = app.registered_commands
    if len(commands) == 1 and app.registered_callback is None:
        return {verb: commands[0].callback}
    return {command.name or command.callback.__name__.replace("_", "-"): command.callback for command in commands}


def parameters(function: Callable[..., Any]) -> Iterator[tuple[str, Any, Any, ArgumentInfo | OptionInfo]]:
    """(name, type, default, typer's description) of what a command takes."""
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if get_origin(hints[name]) is Annotated:
            kind, *extras = get_args(hints[name])
            info = next(extra for extra in extras if isinstance(extra, (ArgumentInfo, OptionInfo)))
            if not info.hidden:
                yield name, kind, parameter.default, info


def _section(name: str, function: Callable[..., Any], level: int) -> Iterator[str]:
    described = list(parameters(function))
    arguments = [
        _argument(each, kind, default) for each, kind, default, info in described if isinstance(info, ArgumentInfo)
    ]
    options = ["[OPTIONS]"] if any(isinstance(info, OptionInfo) for *_, info in described) else []
    yield f"{'#' * level} `{name}`\n\n{inspect.getdoc(function)}\n"
    yield f"```text\n{' '.join([name, *options, *arguments])}\n```\n"
    rows = [_row(*each) for each in described]
    if rows:
        yield "| option | value | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _argument(name: str, kind: Any, default: Any) -> str:
    many = "..." if get_origin(_without_none(kind)) is list else ""
    return f"{name.upper()}{many}" if default is inspect.Parameter.empty else f"[{name.upper()}{many}]"


def _row(name: str, kind: Any, default: Any, info: ArgumentInfo | OptionInfo) -> str:
    meaning = " ".join((info.help or "").split()).replace("|", "\\|")
    shown = f"`{_argument(name, kind, default)}`" if isinstance(info, ArgumentInfo) else _flags(name, kind, info)
    value = f"`{info.metavar}`" if info.metavar else _words(kind, info)
    if default is inspect.Parameter.empty:
        return f"| {shown} | {value} | *required* | {meaning} |"
    is_plain = default is None or isinstance(default, bool) or default in ((), [])
    return f"| {shown} | {value} | {'' if is_plain else f'`{_plain(default)}`'} | {meaning} |"


def _flags(name: str, kind: Any, info: OptionInfo) -> str:
    # Inside Annotated, typer takes the first name for the default.
    first = (info.default,) if isinstance(info.default, str) else ()
    given = (*first, *(info.param_decls or ()))
    flags = given or (f"--{name.replace('_', '-')}",)
    if kind is bool and not given:
        flags = (*flags, f"--no-{name.replace('_', '-')}")
    return ", ".join(f"`{flag}`" for flag in flags if flag.startswith("-"))


def _plain(default: Any) -> str:
    if isinstance(default, enum.Enum):
        return str(default.value)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _words(kind: Any, info: ArgumentInfo | OptionInfo) -> str:
    """What may be given, in words."""
    kind = _without_none(kind)
    if get_origin(kind) is list:
        again = ", several" if isinstance(info, ArgumentInfo) else ", may be repeated"
        return _words(get_args(kind)[0], info) + again
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return " or ".join(f"`{choice.value}`" for choice in kind)
    words = {int: "integer", float: "number", str: "text", Path: "path", bool: ""}[kind]
    low = f" ≥ {info.min:g}" if info.min is not None else ""
    return re.sub(" +", " ", words + low + (f" ≤ {info.max:g}" if info.max is not None else ""))


def main() -> None:
    """Print the page."""
    print(markdown(), end="")


if __name__ == "__main__":
    main()
