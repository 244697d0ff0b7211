"""Pin the code of queued jobs: a copy of the packages as they are at launch, which later edits do not reach."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from aimscale.aim.errors import UserError

ROOT = "src/aimscale"
"""Folder of the top package in a source tree; there the rooms are links to the folders beside it."""
PACKAGES = ("aim", "harness", "sweeps", "analysis", ROOT)
SOURCE = Path(__file__).resolve().parents[2]
"""The source tree, where this is one."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where jobs find their code."""

    path: Path
    """Folder that holds the packages."""
    commit: str
    dirty: bool
    """Whether it holds changes that are not committed."""


def find_snapshot(sweep_dir: Path, *, allow_dirty: bool, source: Path = SOURCE) -> Snapshot | None:
    """Name the snapshot that a launch from `source` would use; none for an installed release. Nothing is written.

    Raises:
        UserError: there are uncommitted changes, and `allow_dirty` is not set.
    """
    if not (source / ".git").exists():
        return None
    commit = git(source, "rev-parse", "HEAD").strip()
    changes = git(source, "status", "--porcelain", "--", *PACKAGES)
    if changes and not allow_dirty:
        num = len(changes.splitlines())
        raise UserError(
            f"{source} has {num} uncommitted changes ({changes.splitlines()[0].strip()}, ...); commit them, or use "
            f"--allow-dirty, which copies them and records that"
        )
    name = f"{commit[:12]}-dirty-{_content_hash(source)}" if changes else commit[:12]
    return Snapshot(path=sweep_dir / "code" / name, commit=commit, dirty=bool(changes))


def make_snapshot(snapshot: Snapshot, source: Path = SOURCE) -> None:
    """Copy the packages into the snapshot's folder, once."""
    if snapshot.path.exists():
        return
    aside = snapshot.path.with_name(f".{snapshot.path.name}.{uuid.uuid4().hex[:8]}")
    for name in _files(source):
        target = aside / "aimscale" / name.removeprefix(f"{ROOT}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target)
    try:
        os.rename(aside, snapshot.path)
    except OSError:  # another launch was quicker
        shutil.rmtree(aside)


def _files(source: Path) -> list[str]:
    """Tracked files and untracked ones that git does not ignore, of the packages."""
    listed = git(source, "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *PACKAGES)
    return sorted(name for name in listed.split("\0") if name and (source / name).is_file())


def _content_hash(source: Path) -> str:
    digest = hashlib.sha256()
    for name in _files(source):
        digest.update(name.encode() + b"\0" + (source / name).read_bytes())
    return digest.hexdigest()[:8]


def git(source: Path, *words: str) -> str:
    """What a command of git prints in a folder.

    Raises:
        UserError: it fails, or there is no git.
    """
    try:
        return subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"cannot ask git about {source} ({error}); the code of queued jobs could not be pinned"
        ) from error
