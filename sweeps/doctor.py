"""Checks of this machine: python, packages, GPUs, memory, the disk for runs, file locks, and Slurm.

Each check covers one thing and never raises. Imports that may crash the process (a broken torch, an incompatible
driver) happen in a child process, `python -m aimscale.sweeps.doctor`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from packaging.requirements import Requirement
from rich.filesize import decimal

from aimscale.aim.errors import UserError
from aimscale.harness.device.memory import free_host_bytes
from aimscale.harness.device.speed import gpus_here
from aimscale.harness.run.lock import hold_lock, is_held
from aimscale.harness.run.provenance import package_versions
from aimscale.sweeps.planning import DEFAULT_ROOT
from aimscale.sweeps.slurm import commands as slurm

IMPORT_TIMEOUT_S, SLURM_TIMEOUT_S = 180, 15
MIN_FREE_BYTES, LOW_FREE_BYTES = 1_000_000_000, 20_000_000_000
SLURM_COMMANDS = ("sbatch", "squeue", "sinfo", "scontrol", "scancel", "srun")
MODULES = ("torch", "torchvision", "deepspeed", "simplejpeg", "webdataset", "timm", "pyarrow", "pandas")
"""Packages with compiled parts, or that import such packages."""
MOUNTS = Path("/proc/mounts")
LOCAL_LOCKS = ("localflock", "nolock", "local_lock=all", "local_lock=flock")
"""Mount options of Lustre and NFS with which a lock excludes processes of the same host only."""
Level = Literal["ok", "warn", "fail"]
"""Level of a result. `warn`: works, but may fail or be slow; `fail`: a required part does not work."""
COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    level: Level
    found: str
    advice: str = ""
    """Advice in one sentence, for results that are not ok."""


def run_checks(root: Path) -> Iterator[Check]:
    """Run all checks; `root` is the folder for runs."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")
    if importlib.util.find_spec("torch") is None:
        yield check_packages("", trains=False)
    else:
        accelerator, error = import_packages()
        yield check_packages(error)
        yield accelerator or Check("accelerator", "fail", "torch does not import", "Fix the packages first.")
    yield Check("memory", "ok", f"{decimal(free_host_bytes())} free, by the host and the limits on this process")
    absolute = Path(os.path.abspath(root))
    folder = next(each for each in (absolute, *absolute.parents) if each.is_dir())  # a launch creates the others
    yield (disk := check_disk(root, folder))
    if disk.level != "fail":
        yield check_locks(folder)
    yield check_slurm()


def import_packages() -> tuple[Check | None, str]:
    """Import `MODULES` in a child process.

    Returns:
        The check of the accelerator, or None if torch does not import; and the error of an import that crashed.
    """
    words = [sys.executable, "-m", "aimscale.sweeps.doctor"]
    try:
        done = subprocess.run(words, capture_output=True, timeout=IMPORT_TIMEOUT_S, check=False)
        output, code, errors = done.stdout, done.returncode, done.stderr.decode(errors="replace").strip()
    except subprocess.TimeoutExpired as error:
        output, code, errors = error.stdout or b"", -signal.SIGKILL, f"no end within {IMPORT_TIMEOUT_S} s"
    module, accelerator = "nothing", None
    for line in output.decode(errors="replace").splitlines():  # packages may print, too
        if line.startswith('{"module"'):
            module = json.loads(line)["module"]
        elif line.startswith('{"name"'):
            accelerator = Check(**json.loads(line))
    how = f"signal {-code}" if code < 0 else f"code {code}"
    last_line = (errors.splitlines() or ["it gave no reason"])[-1]
    return accelerator, f"the process that imported {module} ended with {how}: {last_line}" if code else ""


def check_packages(error: str, *, trains: bool = True) -> Check:
    """Check that packages import and have the versions that `pyproject.toml` requires, to train if `trains`."""
    extra = {"extra": "train" if trains else ""}
    stated = map(Requirement, importlib.metadata.requires("aimscale") or [])
    broken = [error] if error else []
    for requirement in (
        requirement for requirement in stated if requirement.marker is None or requirement.marker.evaluate(extra)
    ):
        version = "missing"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(requirement.name)
        if version == "missing" or not requirement.specifier.contains(version, prereleases=True):
            broken.append(f"{requirement.name} is {version}, wanted {requirement.specifier}")
    if broken:
        advice = "Install aimscale again (`pip install -e '.[train]'` in its folder); if an import still fails, "
        advice += "`pip install --force-reinstall --no-cache-dir` that package."
        return Check("packages", "fail", "; ".join(broken), advice)
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    if trains:
        return Check("packages", "ok", versions)
    advice = "Tables can be analysed. To train: `pip install 'aimscale[train]'`."
    return Check("packages", "warn", f"{versions}; no torch", advice)


def check_accelerator() -> Check:
    """Check that torch can compute on the GPUs that the driver lists."""
    import torch

    advice = "Install a torch for this GPU and its driver's CUDA version (pytorch.org names the index)."
    build = f"torch {torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'a CPU build'}"
    if not torch.cuda.is_available():
        if not (gpus := gpus_here()):
            return Check("accelerator", "ok", f"no GPU; training runs on the CPU ({build})")
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            advice = "CUDA_VISIBLE_DEVICES is empty and hides the GPUs; unset it."
        return Check("accelerator", "fail", f"{len(gpus)} x {gpus[0][0]}, which torch does not see ({build})", advice)
    description = f"{torch.cuda.device_count()} GPUs"
    try:
        gpu = torch.cuda.get_device_properties(0)
        description = f"{torch.cuda.device_count()} x {gpu.name}, {decimal(gpu.total_memory)} each ({build})"
        torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    except RuntimeError as error:
        return Check("accelerator", "fail", f"{description}: {(str(error).splitlines() or [''])[0]}", advice)
    advice = "Set `optimiser.precision: fp32`: this GPU computes bf16 slowly or not at all."
    return Check("accelerator", "ok" if has_bf16 else "warn", f"{description}, bf16: {has_bf16}", advice)


def check_disk(root: Path, folder: Path) -> Check:
    """Check that the folder for runs is writable and has free space."""
    advice = "Choose another --root, or ask for write access."
    if root.exists() and not root.is_dir():
        return Check("disk", "fail", f"{root} is no folder", advice)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return Check("disk", "fail", f"{folder} cannot be written ({error.strerror})", advice)
    usage = shutil.disk_usage(folder)
    level: Level = "fail" if usage.free < MIN_FREE_BYTES else "warn" if usage.free < LOW_FREE_BYTES else "ok"
    free = f"{decimal(usage.free)} of {decimal(usage.total)} free in {folder}"
    return Check("disk", level, free, "Free some space or choose another --root; `aimscale plan` says what is needed.")


def check_locks(folder: Path) -> Check:
    """Check that flock excludes other processes, on other hosts as well; else two launches could start a run twice."""
    advice = "Mount it with locks (NFS: without `nolock` or `local_lock`; Lustre: with `flock`), or use another --root."
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place, hold_lock(path := Path(place) / "lock"):
            if not is_held(path):
                return Check("locks", "fail", f"flock in {folder} excludes no other process", advice)
    except (OSError, UserError) as error:
        return Check("locks", "fail", f"no flock in {folder} ({error})", advice)
    if option := _local_lock_option(folder):
        return Check("locks", "warn", f"flock excludes processes of this host only (mounted with {option})", advice)
    return Check("locks", "ok", "flock works")


def _local_lock_option(folder: Path) -> str | None:
    """Return the option of a folder's mount that keeps locks from other hosts, or None."""
    mounts = [line.split() for line in MOUNTS.read_text().splitlines()] if MOUNTS.exists() else []
    around = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1].replace(r"\040", " "))]
    options = sorted(around, key=lambda mount: len(mount[1]))[-1][3].split(",") if around else []
    return next((option for option in options if option in LOCAL_LOCKS), None)


def check_slurm() -> Check:
    """Check that Slurm is installed and answers."""
    missing = [command for command in SLURM_COMMANDS if shutil.which(command) is None]
    if len(missing) == len(SLURM_COMMANDS):
        return Check("slurm", "ok", "not installed; sweeps run on this machine")
    if missing:
        advice = "Log in to a node that submits jobs, load the cluster's slurm module, or install `slurm-client`."
        return Check("slurm", "warn", f"{', '.join(missing)} not on the PATH", advice)
    try:
        version = slurm.command("sinfo", "--version", timeout_s=SLURM_TIMEOUT_S).split()[-1]
        slurm.command("squeue", "--noheader", "--me", timeout_s=SLURM_TIMEOUT_S)
    except slurm.SlurmError as error:
        advice = "Is slurmctld up (`scontrol ping`), and does SLURM_CONF name the right cluster?"
        return Check("slurm", "warn", str(error), advice)
    return Check("slurm", "ok", f"{version} answers")


def command(root: Annotated[Path, typer.Option(help="Where sweeps are to be kept.")] = DEFAULT_ROOT) -> None:
    """Look at this machine, its disk and its Slurm: what works, and what to do about the rest.

    Takes seconds and leaves nothing behind. Exits with 1 when something needed fails.
    """
    counts: Counter[Level] = Counter()
    names = set()
    for check in run_checks(root):
        counts[check.level] += 1
        names.add(check.name)
        level = typer.style(f"{check.level:<4}", fg=COLOURS[check.level])
        advice = f"\n      -> {check.advice}" if check.advice and check.level != "ok" else ""
        typer.echo(f"{level}  {check.name:<11} {check.found}{advice}")
    typer.echo(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")
    if counts["fail"]:
        raise typer.Exit(1)
    typer.echo(f"next: aimscale {'demo' if 'accelerator' in names else 'fit --help'}")


if __name__ == "__main__":
    for name in MODULES:
        print(json.dumps({"module": name}), flush=True)
        importlib.import_module(name)
        if name == "torch":
            print(json.dumps(asdict(check_accelerator())), flush=True)
