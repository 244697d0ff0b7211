"""`aimscale doctor`'s findings on this machine: what works, what does not, and one sentence on what to do.

A check looks at one thing and never raises. Whatever may take its process down with it (a broken torch, a driver that
does not fit) is imported by a child process, `sweeps.doctor.imports`, while the other checks run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from aimscale.sweeps.doctor.imports import FACTS_LINE, IMPORTING_LINE
from aimscale.sweeps.table.views import data_size

IMPORT_TIMEOUT_S = 180
MIN_SHM_BYTES = 1_000_000_000
"""NCCL passes gradients between the cards of a machine in shared memory; containers get 64 MB unless told otherwise."""
MIN_MEMORY_BYTES = 3_000_000_000
"""The demo's two processes take 2.9 GB."""
MIN_OPEN_FILES = 1024
"""A training process keeps up to 128 shards of each source open, a loader worker as many again."""

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found about one thing."""

    name: str
    """The thing."""
    level: Level
    """`ok`; `warn`: works, but something may go wrong or be slow; `fail`: something needed does not work."""
    found: str
    """What there is."""
    advice: str = ""
    """One sentence on what to do; empty where nothing is to be done."""


def machine_checks(imported: Callable[[], Mapping[str, Any]]) -> Iterator[Check]:
    """Everything that does not depend on where runs are kept; `imported` waits for the child's facts."""
    yield check_python()
    yield check_compiler()
    yield check_cores()
    yield check_memory()
    yield check_threads(os.environ.get("OMP_NUM_THREADS"), len(os.sched_getaffinity(0)))
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield check_shared_memory(Path("/dev/shm"))
    facts = imported()
    yield check_packages(facts)
    yield check_decoders(facts)
    yield check_accelerator(facts)


def check_python() -> Check:
    """The interpreter against what `pyproject.toml` asks for."""
    wanted = importlib.metadata.metadata("aimscale")["Requires-Python"]
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if Requirement(f"python{wanted}").specifier.contains(platform.python_version(), prereleases=True):
        return Check(name="python", level="ok", found=found)
    return Check(name="python", level="fail", found=found, advice=f"Make a virtual environment with Python {wanted}.")


@contextlib.contextmanager
def importing() -> Iterator[Callable[[], Mapping[str, Any]]]:
    """Import everything heavy in a child process; the yielded function waits for it and returns its facts.

    A child that dies gives `{"error": ...}` with the module it was importing.
    """
    # Nothing here may look for a compiler or a card on its own account.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "aimscale.sweeps.doctor.imports"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )

    def facts() -> Mapping[str, Any]:
        try:
            out, err = child.communicate(timeout=IMPORT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            err = f"it did not end within {IMPORT_TIMEOUT_S} s"
        return read_facts(out, err, child.returncode)

    try:
        yield facts
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()


def read_facts(out: str, err: str, code: int) -> Mapping[str, Any]:
    """What the child printed, or the module that took it down."""
    last = ""
    for line in out.splitlines():
        if line.startswith(FACTS_LINE):
            facts: Mapping[str, Any] = json.loads(line.removeprefix(FACTS_LINE))
            return facts
        if line.startswith(IMPORTING_LINE):
            last = line.removeprefix(IMPORTING_LINE)
    how = f"signal {-code}" if code < 0 else f"code {code}"
    said = (err.strip().splitlines() or ["it gave no reason"])[-1]
    return {"error": f"the process that imported {last or 'nothing yet'} ended with {how}: {said}", "module": last}


def check_packages(facts: Mapping[str, Any]) -> Check:
    """Versions against `pyproject.toml`'s, and whether they import."""
    broken, names = [], []
    for requirement in map(Requirement, importlib.metadata.requires("aimscale") or []):
        if requirement.marker is not None:  # an extra
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            broken.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            broken.append(f"{requirement.name} is {version}, wanted {requirement.specifier}")
        if requirement.name in SHOWN:
            names.append(f"{requirement.name} {version}")
    broken += [f"{module} does not import ({why})" for module, why in facts.get("errors", {}).items()]
    if "error" in facts:
        broken.append(str(facts["error"]))
    if not broken:
        return Check(name="packages", level="ok", found=", ".join(names))
    again = "Run `pip install -e .` in aimscale's folder again"
    module = facts.get("module") or next(iter(facts.get("errors", {})), None)
    if module:
        again += f"; if that changes nothing, `pip install --force-reinstall --no-cache-dir {module}`"
    return Check(name="packages", level="fail", found="; ".join(broken), advice=again + ".")


SHOWN = ("torch", "torchvision", "deepspeed", "submitit", "webdataset", "timm", "numpy", "scipy", "pandas", "pydantic")
"""Packages whose versions a bug report needs."""


def check_decoders(facts: Mapping[str, Any]) -> Check:
    """Every image format that was decoded for real."""
    formats: Mapping[str, str | None] = facts.get("decoders", {})
    if not formats:
        return Check(name="decoders", level="fail", found="not tried", advice="Mend the packages first.")
    bad = {name: why for name, why in formats.items() if why}
    if not bad:
        return Check(name="decoders", level="ok", found=f"{', '.join(formats)} decode")
    return Check(
        name="decoders",
        level="fail" if "JPEG" in bad else "warn",
        found="; ".join(f"{name} does not decode ({why})" for name, why in bad.items()),
        advice="Run `pip install --force-reinstall simplejpeg torchvision pillow`: such images would be lost.",
    )


def check_accelerator(facts: Mapping[str, Any], cards: Callable[[], list[str]] | None = None) -> Check:
    """Cards that torch can compute on, beside those that the driver lists."""
    name = "accelerator"
    if "torch" not in facts:
        return Check(name=name, level="fail", found="torch does not import", advice="Mend the packages first.")
    torch, there = facts["torch"], (cards or driver_cards)()
    build = f"torch {torch['version']}, " + (f"CUDA {torch['cuda']}" if torch["cuda"] else "a CPU build")
    if not torch["cards"]:
        if not there:
            return Check(name=name, level="ok", found=f"no card; training runs on the CPU ({build})")
        advice = (
            "Update the NVIDIA driver, or install a torch built for its CUDA version (pytorch.org names the index)."
        )
        if not torch["cuda"]:
            advice = "Install a CUDA build: `pip install --force-reinstall torch torchvision` from PyPI or pytorch.org."
        elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            advice = "CUDA_VISIBLE_DEVICES is empty and hides the cards; unset it."
        found = f"{len(there)} x {there[0]}, which torch does not see ({build})"
        return Check(name=name, level="fail", found=found, advice=advice)
    first = torch["cards"][0]
    found = f"{len(torch['cards'])} x {first['name']}, {data_size(first['bytes'])} each ({build})"
    if torch["card_error"]:
        advice = "Install a torch whose build covers this card (pytorch.org names the index)."
        return Check(name=name, level="fail", found=f"{found}: {torch['card_error']}", advice=advice)
    if not torch["bf16"]:
        advice = "Set `optimiser.precision: fp32`: this card computes bf16 slowly or not at all."
        return Check(name=name, level="warn", found=f"{found}, without bf16", advice=advice)
    return Check(name=name, level="ok", found=f"{found}, bf16")


def driver_cards() -> list[str]:
    """Names of the NVIDIA cards that the driver knows, whatever torch sees."""
    if shutil.which("nvidia-smi") is None:
        return []
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()] if listed.returncode == 0 else []


def check_compiler() -> Check:
    """Compile and run a line of C; only `runtime.compile` (torch.compile) needs that once aimscale is installed."""
    name, need = "compiler", "without it `runtime.compile: true` fails; nothing else needs it"
    compilers = [shutil.which(word) for word in (os.environ.get("CC"), "cc", "gcc", "clang") if word]
    found = next(filter(None, compilers), None)
    if found is None:
        advice = f"Install gcc and g++ ({need})."
        return Check(name=name, level="warn", found="no C compiler on the PATH", advice=advice)
    try:
        _compile_and_run(found)
    except (OSError, subprocess.SubprocessError) as error:
        said = (str(getattr(error, "stderr", None) or error).strip().splitlines() or [""])[0]
        advice = f"Install the C library's headers, Debian's `build-essential` ({need})."
        return Check(name=name, level="warn", found=f"{found} cannot compile a program: {said}", advice=advice)
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        advice = f"Install Python's headers, Debian's `python3-dev` ({need})."
        return Check(name=name, level="warn", found=f"{found} works, but Python.h is missing", advice=advice)
    return Check(name=name, level="ok", found=f"{found} compiles, Python.h is there")


def _compile_and_run(compiler: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "a.c", Path(folder) / "a.out"
        source.write_text('#include <stdio.h>\nint main(void) { puts("works"); return 0; }\n')
        for words in ([compiler, str(source), "-o", str(program)], [str(program)]):
            subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)


def check_cores(root: Path = Path("/sys/fs/cgroup")) -> Check:
    """Cores this process may use, against the time a container grants them."""
    cores = len(os.sched_getaffinity(0))
    granted = cpu_quota(root)
    if granted is not None and granted < cores - 0.5:
        return Check(
            name="cores",
            level="warn",
            found=f"{cores} cores, of which the container may use {granted:g}",
            advice=f"Launch with `--slots {max(1, int(granted))}`: by default {cores} runs would start at a time.",
        )
    return Check(name="cores", level="ok", found=f"{cores} of {os.cpu_count()} cores")


def cpu_quota(root: Path) -> float | None:
    """Cores' worth of time that control groups (version 2, else 1) grant; None where there is no bound."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return int(quota) / int(period) if quota != "max" else None
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        return quota_us / int((root / "cpu/cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    return None


def check_memory(root: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> Check:
    """Memory available now, within the container's bound."""
    available = 1024 * next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    bound = None
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            bound = int((root / file).read_text())
            break
    inside = f", the container's bound is {data_size(bound)}" if bound is not None and bound < available else ""
    usable = min(available, bound) if bound is not None else available
    found = f"{data_size(available)} available{inside}"
    if usable < MIN_MEMORY_BYTES:
        advice = "Use --slots 1 and small rungs (`aimscale plan` prints the memory of each run), or free some memory."
        return Check(name="memory", level="warn", found=found, advice=advice)
    return Check(name="memory", level="ok", found=found)


def check_threads(value: str | None, cores: int) -> Check:
    """OMP_NUM_THREADS: threads of processes that wait for each other make two busy cores ten times slower."""
    name = "threads"
    if value is None:
        found = "OMP_NUM_THREADS is unset; launch sets it for each of its runs"
        if cores == 1:
            return Check(name=name, level="ok", found=found)
        advice = "Before you start several processes by hand (train, probe, fit), `export OMP_NUM_THREADS=1`."
        return Check(name=name, level="ok", found=found, advice=advice)
    if not value.isdigit() or int(value) < 1:
        return Check(
            name=name,
            level="warn",
            found=f"OMP_NUM_THREADS is '{value}'",
            advice="Set it to a whole number of threads, or unset it.",
        )
    if int(value) > cores:
        return Check(
            name=name,
            level="warn",
            found=f"OMP_NUM_THREADS is {value} on {cores} cores",
            advice=f"Set it to {cores} or less: threads that share a core wait for each other.",
        )
    return Check(name=name, level="ok", found=f"OMP_NUM_THREADS is {value}")


def check_open_files(limit: int) -> Check:
    """The soft limit of open files."""
    if limit == resource.RLIM_INFINITY or limit >= MIN_OPEN_FILES:
        shown = "no limit" if limit == resource.RLIM_INFINITY else str(limit)
        return Check(name="open files", level="ok", found=shown)
    advice = (
        f"`ulimit -n {4 * MIN_OPEN_FILES}` before a launch, and in `slurm.setup`: every source keeps 128 shards open."
    )
    return Check(name="open files", level="warn", found=f"at most {limit}", advice=advice)


def check_shared_memory(folder: Path) -> Check:
    """Room in /dev/shm, through which the cards of a machine talk. Loader workers need none of it."""
    name = "shared memory"
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        advice = "Mount a tmpfs there, or train on one card a machine."
        return Check(name=name, level="warn", found=f"{folder}: {error.strerror}", advice=advice)
    if free < MIN_SHM_BYTES:
        advice = "Start the container with `--shm-size 8g` or `--ipc host`, or train on one card a machine."
        return Check(name=name, level="warn", found=f"{data_size(free)} free in {folder}", advice=advice)
    return Check(name=name, level="ok", found=f"{data_size(free)} free in {folder}")
