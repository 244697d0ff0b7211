"""The pages keep to one word for one thing and to the width of the site, and no verb asks for too much."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from generate import command_reference, config_reference
from pages import IN_DOCS, PAGES

from aimscale.sweeps.cli.main import app

MOST_COLUMNS_OF_CODE = 107
"""What the site shows of a block without scrolling in a window of 1280 pixels."""
MOST_OPTIONS_OF_A_VERB = 15
"""As CONTRIBUTING says."""
NOT_OUR_WORDS = {
    r"(?<!model )cards?": "GPU, cost, task or file",
    r"trunk": "backbone, or stable phase",
    r"(room|floor)s? of (the )?(packages?|harness|sweeps|analysis|imports)|import floors": "package, layer",
    r"(is|are) not shown to": "no significant difference",
    r"hangs on": "depends on",
    r"would have been seen": "minimum detectable effect",
}
"""What is not said -> what is."""


def text_of(page: str) -> str:
    """Return the text of a page without blocks and comments; links are replaced by their words."""
    page = re.sub(r"^( *)(`{3,}|:{3,}).*?^\1\2", "", page, flags=re.S | re.M)
    page = re.sub(r"<!--.*?-->", "", page, flags=re.S)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", page)


@pytest.mark.parametrize("page", IN_DOCS, ids=lambda page: page.stem)
def test_commands_and_files_fit_the_width_of_the_site(page: Path) -> None:
    blocks = re.findall(r"^```(?:bash|python|yaml)\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    assert [line for block in blocks for line in block.splitlines() if len(line) > MOST_COLUMNS_OF_CODE] == []


def uses(text: str) -> list[str]:
    """Return the words of the text that the glossary replaces, each with its replacement."""
    plain = re.sub(r"`[^`\n]*`", "", text_of(text))
    found = [(said, ours) for said, ours in NOT_OUR_WORDS.items() if re.search(rf"\b({said})\b", plain, flags=re.I)]
    return [f"{said}: say {ours}" for said, ours in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_uses_the_words_of_the_glossary(page: Path) -> None:
    assert uses(page.read_text()) == []


def test_so_do_help_and_fields() -> None:
    assert uses(command_reference.markdown()) == []
    assert uses(config_reference.markdown()) == []


def test_no_verb_asks_for_too_much() -> None:
    group = typer.main.get_command(app)
    context = group.make_context("aimscale", [], resilient_parsing=True)
    verbs = {name: group.get_command(context, name) for name in group.list_commands(context)}  # type: ignore[attr-defined]
    commands = [
        (f"{name} {inner}", each)
        for name, verb in verbs.items()
        for inner, each in (getattr(verb, "commands", None) or {"": verb}).items()
    ]
    options = {
        name: sum(param.param_type_name == "option" and "--help" not in param.opts for param in each.params)
        for name, each in commands
    }
    assert max(options.values()) <= MOST_OPTIONS_OF_A_VERB, options
