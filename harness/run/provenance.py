"""Provenance of results: code, command, packages and hardware, one entry per start of a run in `results.json`.

The code of queued jobs is pinned: a copy of the packages as they are at launch, which later edits do not reach.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import RunDir

PACKAGES = ("aimscale", "torch", "torchvision", "deepspeed", "numpy", "safetensors", "webdataset", "pandas")
ROOT = "src/aimscale"
"""Folder of the top package in a source tree; there the packages are links to the folders beside it."""
ROOMS = ("aim", "harness", "sweeps", "analysis", ROOT)
SOURCE = Path(__file__).resolve().parents[2]
"""Root of the source tree, if the code runs from one."""
GIT_TIMEOUT_S = 60


@functools.cache
def git_commit() -> tuple[str | None, bool | None]:
    """Return the commit of this source tree, and whether it has uncommitted changes: as the environment says in a
    `Snapshot` or an image, else by git; nulls outside."""
    if commit := os.environ.get("AIMSCALE_GIT_COMMIT"):  # empty in an image that was built without one
        return commit, os.environ.get("AIMSCALE_GIT_DIRTY") == "1"
    try:
        commit = git(SOURCE, "rev-parse", "HEAD").strip()
        return commit, bool(git(SOURCE, "status", "--porcelain", "--untracked-files=no").strip())
    except UserError:
        return None, None


def package_versions() -> dict[str, str]:
    """Return the versions of the packages a result depends on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str:
    """Return the model name of the processor (Linux), or else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def process_age_s() -> float:
    """Return the seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


def record_start(run: RunDir, facts: dict[str, Any]) -> None:
    """Add this start to `results.json`, with what the caller knows: device, world size, ZeRO stage, measured peaks."""
    commit, is_dirty = git_commit()
    run.record_start(
        {
            "time": time.time(),
            "argv": sys.argv,
            "git_commit": commit,
            "git_dirty": is_dirty,
            "packages": package_versions(),
            "python": platform.python_version(),
            "host": socket.gethostname(),
            "cpu": cpu_name(),
            "num_cpus": os.cpu_count(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            **facts,
        }
    )


def is_imported(run: RunDir) -> bool:
    """Return whether the run's weights came from elsewhere (`aimscale weights import`)."""
    try:
        return any("imported" in start for start in run.read_starts())
    except UserError:
        return False


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Pinned copy of the code, which jobs run."""

    path: Path
    """Folder that holds the packages."""
    commit: str
    dirty: bool
    """Whether it holds uncommitted changes."""


def find_snapshot(sweep_dir: Path, *, allow_dirty: bool, source: Path = SOURCE) -> Snapshot | None:
    """Name the snapshot that a launch from `source` would use; None for an installed release. Nothing is written."""
    if not (source / ".git").exists():
        return None
    commit = git(source, "rev-parse", "HEAD").strip()
    changes = git(source, "status", "--porcelain", "--", *ROOMS)
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
    partial = snapshot.path.with_name(f".{snapshot.path.name}.{uuid.uuid4().hex[:8]}")
    for name in _files(source):
        target = partial / "aimscale" / name.removeprefix(f"{ROOT}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target)
    try:
        os.rename(partial, snapshot.path)
    except OSError:  # another launch was faster
        shutil.rmtree(partial)


def _files(source: Path) -> list[str]:
    """List the packages' tracked files, and the untracked ones that git does not ignore."""
    listed = git(source, "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *ROOMS)
    return sorted(name for name in listed.split("\0") if name and (source / name).is_file())


def _content_hash(source: Path) -> str:
    digest = hashlib.sha256()
    for name in _files(source):
        digest.update(name.encode() + b"\0" + (source / name).read_bytes())
    return digest.hexdigest()[:8]


def git(source: Path, *words: str) -> str:
    """Return the output of a git command in a folder."""
    try:
        command = ["git", "-C", str(source), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"cannot ask git about {source} ({error}); the code of queued jobs could not be pinned"
        ) from error
