"""Checks of this machine: python, packages, GPUs, memory, the disk for runs, file locks, and Slurm.

Each check covers one thing and never raises. Imports that may crash the process (a broken torch, an incompatible
driver) happen in a child process, `python -m aimscale.sweeps.doctor`, which prints a line of JSON before each import.
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
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from packaging.requirements import Requirement
from rich.filesize import decimal

from aimscale.aim.errors import UserError
from aimscale.harness.device.gpu_specs import gpus_here
from aimscale.harness.device.memory import free_host_bytes
from aimscale.harness.run.lock import hold_lock, is_held
from aimscale.harness.run.provenance import package_versions
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
        yield check_packages({}, trains=False)
    else:
        facts = import_packages()
        yield check_packages(facts)
        yield check_accelerator(facts)
    yield Check("memory", "ok", f"{decimal(free_host_bytes())} free, by the host and the limits on this process")
    absolute = Path(os.path.abspath(root))
    folder = next(each for each in (absolute, *absolute.parents) if each.is_dir())  # a launch creates the others
    yield (disk := check_disk(root, folder))
    if disk.level != "fail":
        yield check_locks(folder)
    yield check_slurm()


def import_packages() -> dict[str, Any]:
    """Import `MODULES` in a child process and return what it printed.

    The keys are `torch` (facts), the last `module`, and `error` if an import crashed.
    """
    words = [sys.executable, "-m", "aimscale.sweeps.doctor"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        stdout, stderr = child.communicate(timeout=IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        stdout, stderr = child.communicate()[0], f"no end within {IMPORT_TIMEOUT_S} s"
    facts: dict[str, Any] = {"module": "nothing"}
    for line in stdout.splitlines():
        if line.startswith(('{"module"', '{"torch"')):  # packages may print, too
            facts |= json.loads(line)
    if code := child.returncode:
        how = f"signal {-code}" if code < 0 else f"code {code}"
        why = (stderr.strip().splitlines() or ["it gave no reason"])[-1]
        facts["error"] = f"the process that imported {facts['module']} ended with {how}: {why}"
    return facts


def check_packages(facts: Mapping[str, Any], *, trains: bool = True) -> Check:
    """Check that packages import and have the versions that `pyproject.toml` requires.

    Args:
        facts: what `import_packages` found.
        trains: whether the packages of the extra `train` are wanted, too; without torch nothing can be trained here.
    """
    extra = {"extra": "train" if trains else ""}
    stated = map(Requirement, importlib.metadata.requires("aimscale") or [])
    needed = [each for each in stated if each.marker is None or each.marker.evaluate(extra)]
    broken = [facts["error"]] if "error" in facts else []
    for each in needed:
        version = "missing"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(each.name)
        if version == "missing" or not each.specifier.contains(version, prereleases=True):
            broken.append(f"{each.name} is {version}, wanted {each.specifier}")
    found = "; ".join(broken) or ", ".join(f"{name} {version}" for name, version in package_versions().items())
    again = f"`pip install --force-reinstall --no-cache-dir {facts.get('module')}`"
    if not trains and not broken:
        return Check(
            "packages",
            "warn",
            f"{found}; no torch",
            "Tables can be analysed. To train: `pip install 'aimscale[train]'`.",
        )
    advice = f"Install aimscale again (`pip install -e '.[train]'` in its folder); if an import still fails, {again}."
    return Check("packages", "fail" if broken else "ok", found, advice)


def check_accelerator(facts: Mapping[str, Any]) -> Check:
    """Check that torch can compute on the GPUs that the driver lists."""
    level: Level = "fail"
    advice = "Install a torch for this GPU and its driver's CUDA version (pytorch.org names the index)."
    torch, driver_gpus = facts.get("torch"), gpus_here()
    if torch is None:
        found, advice = "torch does not import", "Fix the packages first."
    elif driver_gpus and not torch["gpus"]:
        found = f"{len(driver_gpus)} x {driver_gpus[0][0]}, which torch does not see ({torch['build']})"
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            advice = "CUDA_VISIBLE_DEVICES is empty and hides the GPUs; unset it."
    elif not torch["gpus"]:
        level, found = "ok", f"no GPU; training runs on the CPU ({torch['build']})"
    else:
        found = f"{len(torch['gpus'])} x {torch['gpus'][0]} each ({torch['build']})"
        if torch["gpu_error"]:
            found += f": {torch['gpu_error']}"
        else:
            level, found = "ok" if torch["bf16"] else "warn", f"{found}, bf16: {torch['bf16']}"
            advice = "Set `optimiser.precision: fp32`: this GPU computes bf16 slowly or not at all."
    return Check("accelerator", level, found, advice)


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
    found = f"{decimal(usage.free)} of {decimal(usage.total)} free in {folder}"
    return Check("disk", level, found, "Free some space or choose another --root; `aimscale plan` says what is needed.")


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
    around = [each for each in mounts if folder.resolve().is_relative_to(each[1].replace(r"\040", " "))]
    options = sorted(around, key=lambda each: len(each[1]))[-1][3].split(",") if around else []
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


def command(
    root: Annotated[Path, typer.Option(help="Where sweeps are to be kept.")] = Path("aimscale-runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at this machine, its disk and its Slurm: what works, and what to do about the rest.

    Takes seconds and leaves nothing behind. Exits with 1 when something needed fails.
    """
    checks = []
    for check in run_checks(root):
        checks.append(check)
        if not as_json:
            level = typer.style(f"{check.level:<4}", fg=COLOURS[check.level])
            advice = f"\n      -> {check.advice}" if check.advice and check.level != "ok" else ""
            typer.echo(f"{level}  {check.name:<11} {check.found}{advice}")
    counts = Counter(check.level for check in checks)
    if as_json:
        typer.echo(json.dumps({"version": 1, "ok": not counts["fail"], "checks": [*map(asdict, checks)]}, indent=1))
    else:
        typer.echo(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")
        if not counts["fail"]:
            trains = any(check.name == "accelerator" for check in checks)
            typer.echo(f"next: aimscale {'demo' if trains else 'fit --help'}")
    raise typer.Exit(1 if counts["fail"] else 0)


def torch_facts() -> dict[str, Any]:
    """Return build and GPUs of torch as text; `gpu_error` if a kernel does not run on the first GPU."""
    import torch

    gpus, gpu_error, bf16 = [], None, False
    if torch.cuda.is_available():
        try:
            found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
            gpus = [f"{gpu.name}, {decimal(gpu.total_memory)}" for gpu in found]
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
        except RuntimeError as error:
            gpu_error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    build = f"torch {torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'a CPU build'}"
    return {"build": build, "gpus": gpus, "gpu_error": gpu_error, "bf16": bf16}


if __name__ == "__main__":
    for name in MODULES:
        print(json.dumps({"module": name}), flush=True)
        importlib.import_module(name)
        if name == "torch":
            print(json.dumps({"torch": torch_facts()}), flush=True)
