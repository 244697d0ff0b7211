"""GitHub reads its forms and workflows: YAML without keys that it would refuse."""

from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / ".github"
FIELDS = {"label", "description", "render"}


def read(path: Path) -> dict[Any, Any]:
    values = yaml.safe_load(path.read_text())
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("path", sorted(FOLDER.glob("ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.name)
def test_an_issue_form_has_only_known_fields(path: Path) -> None:
    form = read(path)
    assert form.keys() == {"name", "description", "body"}
    for part in form["body"]:
        assert part.keys() == {"type", "attributes", "validations"}
        assert {"label"} <= part["attributes"].keys() <= FIELDS


@pytest.mark.parametrize("path", sorted(FOLDER.glob("workflows/*.yml")), ids=lambda path: path.name)
def test_a_workflows_jobs_have_a_limit_and_steps_that_do_one_thing(path: Path) -> None:
    for job in read(path)["jobs"].values():
        assert {"runs-on", "timeout-minutes", "steps"} <= job.keys()
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
