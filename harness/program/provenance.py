"""Provenance of a program: the commit of its folder and the packages of its interpreter, or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.run.program import ProgramSection
from aimscale.harness.run.provenance import git, package_versions

INTERPRETER = re.compile(r"python[\d.]*")
PACKAGES_TIMEOUT_S = 60
_LIST = (
    "import importlib.metadata as m, json, platform; "
    "print(json.dumps([platform.python_version(), {d.name: d.version for d in m.distributions() if d.name}]))"
)


def start_facts(program: ProgramSection, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what is recorded of a start in place of aimscale's own code and packages."""
    commit, is_dirty = folder_commit(program.directory)
    python, packages = _packages(program, environment)
    return {
        "argv": list(program.words),
        "git_commit": commit,
        "git_dirty": is_dirty,
        "packages": packages,
        "python": python,
        "supervisor": {"aimscale": package_versions().get("aimscale")},
    }


def folder_commit(directory: str) -> tuple[str | None, bool | None]:
    """Return the commit of a folder and whether files that git knows were changed since; nulls outside of git."""
    try:
        commit = git(Path(directory), "rev-parse", "HEAD").strip()
        return commit, bool(git(Path(directory), "status", "--porcelain", "--untracked-files=no").strip())
    except UserError:
        return None, None


def _packages(program: ProgramSection, environment: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
    """Return version and packages of the Python that the command starts with, if it is one."""
    first = program.words[0]
    interpreter = shutil.which(first, path=environment.get("PATH")) if os.sep not in first else first
    if interpreter is None or not INTERPRETER.fullmatch(os.path.basename(first)):
        return None, {}
    command = [interpreter, "-c", _LIST]
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, timeout=PACKAGES_TIMEOUT_S, env=environment, cwd=program.directory
        )
        python, packages = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None, {}
    return python, dict(sorted(packages.items()))
