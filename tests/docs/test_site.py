"""The pages' links lead somewhere, and what they say of commands and files is true (.ci/run builds the site)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer
import typer.main
import yaml
from generate import board, config_reference, table_reference
from packaging.version import Version
from pages import BUILT, PAGES, ROOT

from aimscale.analysis.laws import LAWS
from aimscale.analysis.report.sections import SECTIONS
from aimscale.sweeps.cli.main import HIDDEN, VERBS, app

KINDS_OF_CHANGES = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")  # keepachangelog.com


def without_blocks(text: str) -> str:
    return re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.S | re.M)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", without_blocks(text))


def anchors(page: Path) -> set[str]:
    """Return GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page.read_text()), flags=re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere_from_the_repository_too(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        parts = urlsplit(target)
        if parts.scheme:
            assert parts.scheme in ("https", "http", "mailto"), target
            assert re.fullmatch(r"[\w.-]+\.[a-z]{2,}", parts.netloc), f"{page.name}: {target} is no address"
            continue
        file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        assert file not in BUILT, f"{page.name} links to {target}, which is not in the repository"
        if parts.fragment:
            assert parts.fragment in anchors(file), f"{page.name}: {file.name} has no heading #{parts.fragment}"


def mistakes_in_commands(text: str) -> list[str]:
    """Return the verbs, commands and options of `aimscale` in code spans and blocks that do not exist."""
    blocks = re.findall(r"^(`{3,})\w*\n(.*?)^\1", text, flags=re.S | re.M)
    lines = [line for _, block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = [*lines, *re.findall(r"`([^`]+)`", without_blocks(text))]
    mistakes = []
    for span in spans:
        for command in re.findall(r"(?:^|[&;(|] ?|until )aimscale ([a-z][^#&|;)]*)", " ".join(span.split())):
            words = command.split()
            if words[0] not in VERBS | HIDDEN:
                mistakes.append(f"there is no verb '{words[0]}' ({command})")
                continue
            try:
                known = flags_of(words)
            except KeyError as error:
                mistakes.append(f"aimscale {words[0]} has no command {error}")
                continue
            used = {word.split("=")[0].rstrip(".,:)") for word in words if re.match(r"--?[a-z]", word)}
            mistakes += [f"aimscale {words[0]} has no {flag} ({command})" for flag in sorted(used - known)]
    return mistakes


def flags_of(words: list[str]) -> set[str]:
    """Return the options of a verb, or of a command inside a verb; of all its commands if none is named.

    Raises:
        KeyError: the verb has no such command.
    """
    group = typer.main.get_command(app)
    command = group.get_command(typer.Context(group), words[0])  # type: ignore[attr-defined]
    inner = getattr(command, "commands", None)
    if inner is None:
        chosen = [command]
    else:
        chosen = list(inner.values()) if len(words) == 1 or words[1].startswith("-") else [inner[words[1]]]
    params = [param for each in chosen for param in each.params]
    return {"--help", "-h", *(flag for param in params for flag in (*param.opts, *param.secondary_opts))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_mentioned_exist(page: Path) -> None:
    """This includes commands that no test runs, and those inside sentences."""
    assert mistakes_in_commands(page.read_text()) == []


def test_changelog_citation_and_package_say_one_release() -> None:
    """What is cited is the newest release; the package is that one, or says `.dev0` while changes are unreleased."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    headings = re.findall(r"^## (.+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    unreleased, version = headings[0] == "Unreleased", Version(project["version"])
    assert headings[unreleased].startswith(f"{cited['version']} ({cited['date-released']})")
    assert version.is_devrelease == unreleased
    assert (version > Version(cited["version"])) if unreleased else (project["version"] == cited["version"])
    assert cited["repository-code"] == project["urls"]["Repository"]


def test_the_changelog_has_a_line_for_each_change_under_what_it_is() -> None:
    releases = re.split(r"^## .+\n", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1:]
    for release in releases:
        parts = re.findall(r"^### (.+)\n\n((?:- .+\n(?:  .+\n)*)+)$", release, flags=re.M)
        assert [name for name, _ in parts] == [kind for kind in KINDS_OF_CHANGES if f"### {kind}\n" in release]
        assert parts, release


@pytest.mark.parametrize(("page", "told"), [("configuration", config_reference), ("columns", table_reference)])
def test_pages_of_fields_and_columns_are_those_of_the_code(page: str, told: Any) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert text == told.markdown(), f"run `python docs/generate/{Path(told.__file__).name}`"


def test_the_page_on_forecasts_shows_the_record_of_today() -> None:
    assert board.page_with_record() == board.PAGE.read_text()


def test_the_page_on_laws_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/analysis.md").read_text(), flags=re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named >= LAWS.keys(), "add a row to the table of laws"


def test_the_page_on_reports_names_every_section() -> None:
    page = (ROOT / "docs/reading-the-report.md").read_text()
    for _, heading, _ in SECTIONS.values():
        assert heading in page
