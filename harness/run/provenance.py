"""Where a result came from: code, command, packages, hardware, one entry per start of a run in `results.json`."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import process_started
from aimscale.harness.run.snapshot import SOURCE, git

PACKAGES = ("aimscale", "torch", "torchvision", "deepspeed", "numpy", "safetensors", "webdataset", "pandas")


@functools.cache
def git_commit() -> tuple[str | None, bool | None]:
    """Commit of the source tree this code runs from and whether it has uncommitted changes; nulls outside git.

    A launcher that copied the code (`harness.run.snapshot`) says in the environment what it copied.
    """
    if "AIMSCALE_GIT_COMMIT" in os.environ:
        return os.environ["AIMSCALE_GIT_COMMIT"], os.environ.get("AIMSCALE_GIT_DIRTY") == "1"
    try:
        commit = git(SOURCE, "rev-parse", "HEAD").strip()
        return commit, bool(git(SOURCE, "status", "--porcelain", "--untracked-files=no").strip())
    except UserError:
        return None, None


def package_versions() -> dict[str, str]:
    """Versions of the packages a result depends on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str:
    """Model name of the processor (Linux), or else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def process_age_s() -> float:
    """Seconds since this process was started, imports included (Linux)."""
    ticks = int(process_started(os.getpid()) or 0)
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - ticks / os.sysconf("SC_CLK_TCK")


def record_start(run: RunDir, facts: dict[str, Any]) -> None:
    """Add this start to `results.json`.

    Args:
        facts: what the caller knows: device, world size, ZeRO stage, measured peaks.

    Raises:
        UserError: the file is damaged.
    """
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
    """Whether the run's weights came from elsewhere (`aimscale weights import`)."""
    try:
        return any("imported" in start for start in run.read_starts())
    except UserError:
        return False
