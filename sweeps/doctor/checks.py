"""`aimscale doctor`: the machine, its packages and cards, the place where runs are kept, and the cluster.

A check looks at one thing and never raises. Whatever may take its process down with it (a broken torch, a driver that
does not fit) is imported by a child process, `sweeps.doctor.imports`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from aimscale.harness.run.files import locked
from aimscale.harness.run.provenance import package_versions
from aimscale.sweeps.doctor.imports import FACTS_LINE, IMPORTING_LINE
from aimscale.sweeps.engine.devices import listed_cards
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.table.views import data_size

IMPORT_TIMEOUT_S = 180
MIN_SHM_BYTES = 1_000_000_000
"""NCCL passes gradients between the cards of a machine in shared memory; containers get 64 MB unless told otherwise."""
MIN_MEMORY_BYTES = 3_000_000_000
"""The demo's two processes take 2.9 GB."""
CGROUP = Path("/sys/fs/cgroup")
MIN_FREE_BYTES = 1_000_000_000
LOW_FREE_BYTES = 20_000_000_000
MIN_FREE_FILES = 10_000
SLURM_COMMANDS = ("sbatch", "squeue", "sinfo", "scontrol", "scancel", "srun")
SLURM_TIMEOUT_S = 15
PARTITION = "%P %a: %D nodes, %G, time limit %l"
"""Name (of the default with a star), state, nodes, cards and time limit, for `sinfo`."""
LOCAL_TYPES = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs")
"""File systems that other machines do not see (unless one exports them)."""
LOCAL_LOCKS = ("nolock", "localflock", "local_lock=flock", "local_lock=all")
"""Mount options with which this machine's kernel alone knows of a lock."""
PREFIX = ".aimscale-doctor-"
Level = Literal["ok", "warn", "fail"]
"""`warn`: works, but something may go wrong or be slow; `fail`: something needed does not work."""


@dataclass(frozen=True)
class Check:
    """What was found about one thing."""

    name: str
    level: Level
    found: str
    advice: str = ""
    """One sentence on what to do where it is not ok."""


def checks(root: Path, on: Literal["local", "slurm"]) -> Iterator[Check]:
    """Look at everything; runs are to be kept under `root` and executed here or by Slurm."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")
    yield check_compiler()
    yield check_cores()
    yield check_memory()
    yield check_shared_memory(Path("/dev/shm"))
    facts = imported()
    yield check_packages(facts)
    yield check_accelerator(facts)
    absolute = Path(os.path.abspath(root))
    folder = next(each for each in (absolute, *absolute.parents) if each.is_dir())  # a launch makes the rest
    mount = mount_of(folder)
    yield (writable := check_writable(root, folder))
    if writable.level != "fail":
        yield check_space(root, folder)
        yield check_locks(folder, mount)
    yield (answers := check_slurm(needed=on == "slurm"))
    if answers.level == "ok" and shutil.which("sinfo"):
        yield check_shared(root, mount)


def imported() -> dict[str, Any]:
    """What a child process that imports everything heavy printed: `torch`, and `module` and `error` where it failed."""
    words = [sys.executable, "-m", "aimscale.sweeps.doctor.imports"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        out, said = child.communicate(timeout=IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        out, said = child.communicate()[0], f"no end within {IMPORT_TIMEOUT_S} s"
    facts: dict[str, Any] = {}
    module = "nothing yet"
    for line in out.splitlines():
        if line.startswith(FACTS_LINE):
            facts["torch"] = json.loads(line.removeprefix(FACTS_LINE))
        elif line.startswith(IMPORTING_LINE):
            module = line.removeprefix(IMPORTING_LINE)
    if code := child.returncode:
        how = f"signal {-code}" if code < 0 else f"code {code}"
        why = (said.strip().splitlines() or ["it gave no reason"])[-1]
        facts |= {"module": module, "error": f"the process that imported {module} ended with {how}: {why}"}
    return facts


def check_compiler() -> Check:
    """Compile an empty extension; only torch.compile, which runs on a card, needs that once aimscale is installed."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "gcc"
    words = [compiler, "-I", sysconfig.get_paths()["include"], "-x", "c", "-", "-c", "-o", os.devnull]
    code = "#include <stdio.h>\n#include <Python.h>\n"
    try:
        done = subprocess.run(words, input=code, capture_output=True, text=True, errors="replace", check=False)
        said = (done.stderr.strip().splitlines() or ["no reason given"])[0] if done.returncode else ""
    except OSError as error:
        said = str(error.strerror)
    if not said:
        return Check("compiler", "ok", f"{compiler} compiles, Python.h is there")
    advice = "Install gcc and python3-dev, or set `runtime.compile: false` for runs on a card; nothing else needs them."
    return Check("compiler", "warn", f"{compiler} cannot compile an extension: {said}", advice)


def check_cores(root: Path = CGROUP) -> Check:
    """Cores this process may use, against the time a container grants them."""
    cores = granted = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        quota, period = map(int, (root / "cpu.max").read_text().split())
        granted = round(quota / period)
    found = f"{cores} of {os.cpu_count()} cores"
    found += f", the container may use {granted}" if granted < cores else ""
    advice = f"Launch with `--slots {max(1, granted)}`: by default {cores} runs would start at a time."
    return Check("cores", "warn" if granted < cores else "ok", found, advice)


def check_memory(root: Path = CGROUP) -> Check:
    """Memory available now, within the container's bound."""
    bound = available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        bound = int((root / "memory.max").read_text())
    found = f"{data_size(available)} available"
    found += f", the container's bound is {data_size(bound)}" if bound < available else ""
    advice = "Use --slots 1 and small rungs (`aimscale plan` prints the memory of each run), or free some memory."
    return Check("memory", "ok" if min(available, bound) >= MIN_MEMORY_BYTES else "warn", found, advice)


def check_shared_memory(folder: Path) -> Check:
    """Room in /dev/shm, through which the cards of a machine talk. Loader workers need none of it."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    advice = "Start the container with `--shm-size 8g` or `--ipc host`, or train on one card per machine."
    level: Level = "ok" if free >= MIN_SHM_BYTES else "warn"
    return Check("shared memory", level, f"{data_size(free)} free in {folder}", advice)


def check_packages(facts: Mapping[str, Any]) -> Check:
    """Versions against `pyproject.toml`'s, and whether they import."""
    broken = [facts["error"]] if "error" in facts else []
    for needed in map(Requirement, importlib.metadata.requires("aimscale") or []):
        if needed.marker is not None:  # an extra
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not needed.specifier.contains(version, prereleases=True):
            broken.append(f"{needed.name} is {version}, wanted {needed.specifier}")
    advice = "Run `pip install -e .` in aimscale's folder again"
    if "module" in facts:
        advice += f"; if that changes nothing, `pip install --force-reinstall --no-cache-dir {facts['module']}`"
    found = "; ".join(broken) or ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return Check("packages", "fail" if broken else "ok", found, f"{advice}.")


def check_accelerator(facts: Mapping[str, Any]) -> Check:
    """Cards that torch can compute on, beside those that the driver lists."""
    if "torch" not in facts:
        return Check("accelerator", "fail", "torch does not import", "Mend the packages first.")
    torch, there = facts["torch"], listed_cards()
    level: Level = "fail"
    build = f"torch {torch['version']}, " + (f"CUDA {torch['cuda']}" if torch["cuda"] else "a CPU build")
    cards = [f"{card['name']}, {data_size(card['bytes'])} each" for card in torch["cards"]]
    found = f"{len(cards)} x {cards[0]} ({build})" if cards else f"no card; training runs on the CPU ({build})"
    if there and not cards:
        found = f"{len(there)} x {there[0]}, which torch does not see ({build})"
        advice = "Update the NVIDIA driver, or install a torch for its CUDA version (pytorch.org names the index)."
        if not torch["cuda"]:
            advice = "Install a CUDA build: `pip install --force-reinstall torch torchvision` from PyPI or pytorch.org."
        elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            advice = "CUDA_VISIBLE_DEVICES is empty and hides the cards; unset it."
    elif torch["card_error"]:
        found += f": {torch['card_error']}"
        advice = "Install a torch whose build covers this card (pytorch.org names the index)."
    else:
        level = "warn" if cards and not torch["bf16"] else "ok"
        found += (", bf16" if torch["bf16"] else ", without bf16") if cards else ""
        advice = "Set `optimiser.precision: fp32`: this card computes bf16 slowly or not at all."
    return Check("accelerator", level, found, advice)


def mount_of(path: Path) -> Any:
    """The mounted file system that a path is on, as `psutil` describes it; None where the kernel lists none."""
    around = [mount for mount in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(mount.mountpoint)]
    return max(reversed(around), key=lambda mount: len(mount.mountpoint), default=None)


def check_writable(root: Path, folder: Path) -> Check:
    """Make, fill and remove a file."""
    made = "" if folder == Path(os.path.abspath(root)) else f"; {root} will be made"
    level: Level = "ok"
    found = f"{folder} can be written{made}"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PREFIX) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        level, found = "fail", f"{folder} cannot be written ({error.strerror})"
    if root.exists() and not root.is_dir():
        level, found = "fail", f"{root} is no folder"
    return Check("sweep root", level, found, "Choose another --root, or ask for write access.")


def check_space(root: Path, folder: Path) -> Check:
    """Free space and inodes for this user."""
    usage, inodes = shutil.disk_usage(folder), os.statvfs(folder)
    few_files = inodes.f_files and inodes.f_favail < MIN_FREE_FILES
    found = f"{data_size(usage.free)} of {data_size(usage.total)} free"
    found += f", only {inodes.f_favail} more files" if few_files else ""
    level: Level = "warn" if few_files or usage.free < LOW_FREE_BYTES else "ok"
    advice = f"Free some space or choose another --root than {root}; `aimscale plan` prints what a sweep needs."
    return Check("disk", "fail" if usage.free < MIN_FREE_BYTES else level, found, advice)


def check_locks(folder: Path, mount: Any) -> Check:
    """Whether flock works and excludes: without it two launches could start a run twice."""
    kind = mount.fstype if mount else "unknown file system"
    local = [option for option in (mount.opts.split(",") if mount else ()) if option in LOCAL_LOCKS]
    level: Level = "warn" if local else "ok"
    found = f"flock works on this machine only ({kind} mounted with {local[0]})" if local else f"flock works ({kind})"
    try:
        with (
            tempfile.NamedTemporaryFile(dir=folder, prefix=PREFIX) as file,
            locked(Path(file.name)),
            locked(Path(file.name), wait=False) as again,
        ):
            if again:
                level, found = "fail", f"flock on {kind} excludes no other process"
    except OSError as error:
        level, found = "fail", f"no flock on {kind} ({error.strerror})"
    advice = "Mount it with locks (NFS: without `nolock` or `local_lock`; Lustre: with `flock`), or use another --root."
    return Check("locks", level, found, advice)


def check_slurm(*, needed: bool) -> Check:
    """Whether Slurm is here and answers, and its partitions."""
    bad: Level = "fail" if needed else "warn"
    missing = [command for command in SLURM_COMMANDS if shutil.which(command) is None]
    if len(missing) == len(SLURM_COMMANDS) and not needed:
        return Check("slurm", "ok", "not installed; sweeps run on this machine")
    if missing:
        advice = "Log in to a node that submits jobs, load the cluster's slurm module, or install `slurm-client`."
        return Check("slurm", bad, f"{', '.join(missing)} not on the PATH", advice)
    try:
        version = slurm.command("sinfo", "--version", timeout_s=SLURM_TIMEOUT_S).split()[-1]
        listed = slurm.command("sinfo", "--noheader", "-o", PARTITION, timeout_s=SLURM_TIMEOUT_S)
        slurm.command("squeue", "--noheader", "--me", timeout_s=SLURM_TIMEOUT_S)
    except slurm.SlurmError as error:
        advice = "Is slurmctld up (`scontrol ping`), and does SLURM_CONF name the right cluster?"
        return Check("slurm", bad, str(error), advice)
    partitions = listed.replace(", (null)", "").splitlines()
    level: Level = "ok" if any(" up:" in words for words in partitions) else bad
    found = f"{version}, partitions {'; '.join(partitions) or 'none'}"
    return Check("slurm", level, found, "Ask who runs the cluster: no partition takes jobs (`sinfo` says why).")


def check_shared(root: Path, mount: Any) -> Check:
    """Whether the cluster's nodes can see the runs."""
    try:
        nodes = slurm.node_names(None)
    except slurm.SlurmError as error:
        return Check("shared root", "warn", str(error), "Look at `sinfo --Node`.")
    others = sorted(set(nodes) - {socket.gethostname().split(".")[0]})
    advice = "Give a --root (and data paths) on the file system that all nodes share, at the same path."
    if not others or mount is None or mount.fstype not in LOCAL_TYPES:
        return Check("shared root", "ok", f"on {mount.fstype if mount else 'an unknown file system'}", advice)
    found = f"{root} lies on {mount.fstype}, which {others[0]} and {len(others) - 1} other nodes may not see"
    return Check("shared root", "warn", found, advice)
