"""The generated pages name everything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import typer.main
import yaml
from generate import command_reference, config_reference

from aimscale.harness.run.config import Section
from aimscale.sweeps.cli.main import VERBS, app
from aimscale.sweeps.planning.sections import SlurmSection

ROOT = Path(__file__).parents[2]


def all_sections(kind: type[Section] = Section) -> Iterator[type[Section]]:
    for each in kind.__subclasses__():
        yield each
        yield from all_sections(each)


def tables(page: str) -> dict[str, dict[str, list[str]]]:
    """Return heading -> first cell -> all cells of that row."""
    found: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").strip("`")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.setdefault(heading, {})[cells[0].strip("`")] = cells
    return found


def test_every_field_of_every_section_is_listed_with_its_meaning() -> None:
    page = config_reference.markdown()
    listed = {schema["title"] for _, schema in config_reference.sections()}
    ours = {
        kind.__name__: kind
        for kind in all_sections()
        if kind.__module__
        in (
            "aimscale.harness.run.config",
            "aimscale.harness.run.evaluation",
            "aimscale.harness.run.init",
            "aimscale.harness.run.program",
            "aimscale.sweeps.planning.recipes",
            "aimscale.sweeps.planning.sections",
            "aimscale.sweeps.planning.sweepfile",
            "aimscale.sweeps.planning.trainer",
        )
    }
    assert ours.keys() - listed == {"RunConfig", "ProgramConfig", "ProgramSection"}  # which nobody writes
    found = tables(page)
    tops = {
        "": ["The sweep file", "A run: what is trained", "A run: what is measured"],
        "runtime": ["A run: how it is executed"],
    }
    for place, schema in config_reference.sections():
        kind = ours[schema["title"]]
        headings = [heading for heading in tops.get(place, [place]) if heading in found]
        fields: set[str] = set()
        for heading in headings:
            fields |= set(found[heading])
        assert set(kind.model_fields) <= fields, f"{place or kind.__name__} lacks {set(kind.model_fields) - fields}"
        for name, field in kind.model_fields.items():
            assert field.description, f"{kind.__name__}.{name} has no line of documentation"


def test_the_yaml_of_the_pages_is_read_and_says_what_exists() -> None:
    """This includes manifests for other schedulers: their commands and options must exist."""
    blocks = [
        yaml.safe_load(text)
        for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md")
        for text in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    sections = [block["slurm"] for block in blocks if isinstance(block, dict) and "slurm" in block]
    assert len([SlurmSection.model_validate(section) for section in sections]) >= 4
    (job,) = [block["spec"]["template"]["spec"] for block in blocks if isinstance(block, dict) and "kind" in block]
    (task,) = [block for block in blocks if isinstance(block, dict) and "num_nodes" in block]
    (container,) = job["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in job["volumes"]}
    group = typer.main.get_command(app)
    worker = group.get_command(group.make_context("aimscale", [], resilient_parsing=True), "launch")  # type: ignore[attr-defined]
    for command in (container["command"], task["run"].split()):
        assert command[:2] == ["aimscale", "launch"]
        given = worker.make_context("launch", command[2:]).params
        assert (given["sweep"], given["on"]) == ("/shared/mysweep.yaml", None)


def test_the_image_is_built_from_all_packages() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    linked = {link.readlink().name for link in (ROOT / "src/aimscale").iterdir() if link.is_symlink()}
    assert all((ROOT / source).exists() for source in sources)
    assert {"src", "pyproject.toml", "README.md", *linked} <= sources  # README is the package's long description


def test_every_verb_and_option_is_listed_with_its_values() -> None:
    page = command_reference.markdown()
    group = typer.main.get_command(app)
    context = group.make_context("aimscale", [], resilient_parsing=True)
    sections = {part.split("`", 1)[0]: part for part in page.split("# `")[1:]}
    for verb in VERBS:
        command = group.get_command(context, verb)  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None) or {"": command}
        for name, each in inner.items():
            section = sections[f"aimscale {verb} {name}".strip()]
            missing = [option for param in each.params for option in param.opts if f"{option}" not in section]
            assert set(missing) <= {"--help", "-h"}, f"{verb} {name} lacks {missing}"
    assert "`--on <local|slurm>`: Where runs " in sections["aimscale launch"]
    assert "**Commands**" not in page  # typer cuts their lines
