"""`aimscale doctor` where runs are kept, and on the cluster: disk, locks, Slurm."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from aimscale.harness.run.files import locked
from aimscale.sweeps.doctor.checks import Check, Level
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.table.views import data_size

MIN_FREE_BYTES = 1_000_000_000
LOW_FREE_BYTES = 20_000_000_000
MIN_FREE_FILES = 10_000
SLURM_COMMANDS = ("sbatch", "squeue", "sinfo", "scontrol", "scancel", "srun")
SLURM_TIMEOUT_S = 15
LOCAL_TYPES = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs")
"""File systems that other machines do not see (unless one exports them)."""
LOCAL_LOCKS = ("nolock", "localflock", "local_lock=flock", "local_lock=all")
"""Mount options with which this machine's kernel alone knows of a lock."""
PREFIX = ".aimscale-doctor-"


class Mount(NamedTuple):
    """The mounted file system of a path."""

    point: Path
    """Where it is mounted."""
    kind: str
    """Its type, e.g. ext4, nfs4, lustre."""
    options: tuple[str, ...]
    """Its mount options."""


def storage_checks(root: Path, on: Literal["local", "slurm"]) -> Iterator[Check]:
    """Can runs be kept under `root`, and can Slurm execute them?"""
    absolute = Path(os.path.abspath(root))
    folder = next(each for each in (absolute, *absolute.parents) if each.is_dir())  # a launch makes the rest
    mount = mount_of(folder)
    writable = check_writable(root, folder)
    yield writable
    if writable.level != "fail":
        yield check_space(root, folder)
        yield check_locks(folder, mount)
    slurm_check = check_slurm(needed=on == "slurm")
    yield slurm_check
    if slurm_check.level == "ok" and shutil.which("sinfo"):
        yield check_shared(root, mount)


def mount_of(path: Path, mounts: Path = Path("/proc/self/mounts")) -> Mount | None:
    """The file system of a path by the kernel's table; None where there is no such table."""
    found = None
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, point, kind, options, *_ = line.split()
        point = point.encode().decode("unicode_escape")  # spaces are written \040
        if path.resolve().is_relative_to(point) and (found is None or len(point) >= len(str(found.point))):
            found = Mount(point=Path(point), kind=kind, options=tuple(options.split(",")))
    return found


def check_writable(root: Path, folder: Path) -> Check:
    """Make, fill and remove a file."""
    name = "sweep root"
    if root.exists() and not root.is_dir():
        return Check(name, "fail", f"{root} is no folder", "Choose another --root.")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PREFIX) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        found = f"{folder} cannot be written ({error.strerror})"
        return Check(name, "fail", found, "Choose another --root, or ask for write access.")
    made = "" if folder == Path(os.path.abspath(root)) else f"; {root} will be made"
    return Check(name, "ok", f"{folder} can be written{made}")


def check_space(root: Path, folder: Path) -> Check:
    """Free space and inodes for this user."""
    usage, inodes = shutil.disk_usage(folder), os.statvfs(folder)
    found = f"{data_size(usage.free)} of {data_size(usage.total)} free"
    advice = f"Free some space or choose another --root than {root}; `aimscale plan` prints what a sweep needs."
    if usage.free < MIN_FREE_BYTES:
        return Check("disk", "fail", found, advice)
    if inodes.f_files and inodes.f_favail < MIN_FREE_FILES:
        return Check("disk", "warn", f"{found}, only {inodes.f_favail} more files", advice)
    return Check("disk", "warn", found, advice) if usage.free < LOW_FREE_BYTES else Check("disk", "ok", found)


def check_locks(folder: Path, mount: Mount | None) -> Check:
    """Whether flock works and excludes: without it two launches could start a run twice."""
    kind = mount.kind if mount else "unknown file system"
    advice = "Mount it with locks (NFS: without `nolock` or `local_lock`; Lustre: with `flock`), or use another --root."
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PREFIX) as file:
            with locked(Path(file.name)), locked(Path(file.name), wait=False) as again:
                excludes = not again
            if not excludes:
                return Check("locks", "fail", f"flock on {kind} excludes nobody", advice)
    except OSError as error:
        return Check("locks", "fail", f"no flock on {kind} ({error.strerror})", advice)
    local = [option for option in (mount.options if mount else ()) if option in LOCAL_LOCKS]
    if local:
        return Check("locks", "warn", f"flock works on this machine only ({kind} mounted with {local[0]})", advice)
    return Check("locks", "ok", f"flock works ({kind})")


def check_slurm(*, needed: bool) -> Check:
    """Whether Slurm is here and answers, and its partitions."""
    name = "slurm"
    bad: Level = "fail" if needed else "warn"
    missing = [command for command in SLURM_COMMANDS if shutil.which(command) is None]
    if len(missing) == len(SLURM_COMMANDS):
        if not needed:
            return Check(name, "ok", "not installed; sweeps run on this machine")
        return Check(
            name, "fail", "not installed", "Log in to a node that submits jobs, or load the cluster's slurm module."
        )
    if missing:
        found = f"{', '.join(missing)} not on the PATH"
        return Check(name, bad, found, "Install the rest of Slurm's client commands (Debian's `slurm-client`).")
    try:
        version = slurm.command("sinfo", "--version", timeout_s=SLURM_TIMEOUT_S).split()[-1]
        listed = slurm.command("sinfo", "--noheader", "-o", "%P|%a|%D|%G|%l", timeout_s=SLURM_TIMEOUT_S)
        slurm.command("squeue", "--noheader", "--me", timeout_s=SLURM_TIMEOUT_S)
    except slurm.SlurmError as error:
        return Check(
            name, bad, str(error), "Is slurmctld up (`scontrol ping`), and does SLURM_CONF name the right cluster?"
        )
    partitions = [_partition(line) for line in listed.splitlines() if "|" in line]
    if not any(" up" in words for words in partitions):
        found = f"{version}, no partition is up: {'; '.join(partitions) or 'there is none'}"
        return Check(name, bad, found, "Ask who runs the cluster: no partition takes jobs (`sinfo` says why).")
    return Check(name, "ok", f"{version}, partitions {'; '.join(partitions)}")


def _partition(line: str) -> str:
    """A line of `sinfo -o %P|%a|%D|%G|%l` in words; the default partition has a star."""
    name, state, nodes, gres, limit = (part.strip() for part in line.split("|"))
    cards = "" if gres in ("(null)", "") else f", {gres}"
    return f"{name} {state}: {nodes} nodes{cards}, time limit {limit}"


def check_shared(root: Path, mount: Mount | None) -> Check:
    """Whether the cluster's nodes can see the runs."""
    name = "shared root"
    try:
        listed = slurm.command("sinfo", "--noheader", "--Node", "-o", "%N", timeout_s=SLURM_TIMEOUT_S)
    except slurm.SlurmError as error:
        return Check(name, "warn", str(error), "Look at `sinfo --Node`.")
    others = sorted(set(listed.split()) - {socket.gethostname().split(".")[0]})
    if not others or mount is None or mount.kind not in LOCAL_TYPES:
        return Check(name, "ok", f"on {mount.kind if mount else 'an unknown file system'}")
    found = f"{root} lies on {mount.kind}, which {others[0]} and {len(others) - 1} other nodes may not see"
    return Check(
        name, "warn", found, "Give a --root (and data paths) on the file system that all nodes share, at the same path."
    )
