"""`aimscale doctor` on this machine: interpreter, compiler, cores, memory, packages, cards.

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from aimscale.sweeps.doctor.checks import Check
from aimscale.sweeps.doctor.imports import FACTS_LINE, IMPORTING_LINE
from aimscale.sweeps.table.views import data_size

IMPORT_TIMEOUT_S = 180
MIN_SHM_BYTES = 1_000_000_000
"""NCCL passes gradients between the cards of a machine in shared memory; containers get 64 MB unless told otherwise."""
MIN_MEMORY_BYTES = 3_000_000_000
"""The demo's two processes take 2.9 GB."""
MIN_OPEN_FILES = 1024
"""A training process keeps up to 128 shards of each source open, a loader worker as many again."""
SHOWN = ("torch", "torchvision", "deepspeed", "submitit", "webdataset", "timm", "numpy", "scipy", "pandas", "pydantic")
"""Packages whose versions a bug report needs."""
CGROUP = Path("/sys/fs/cgroup")


def machine_checks(imported: Callable[[], Mapping[str, Any]]) -> Iterator[Check]:
    """Everything that does not depend on where runs are kept; `imported` waits for the child's facts."""
    yield check_python()
    yield check_compiler()
    yield check_cores()
    yield check_memory()
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield check_shared_memory(Path("/dev/shm"))
    facts = imported()
    yield check_packages(facts)
    yield check_accelerator(facts)


@contextlib.contextmanager
def importing() -> Iterator[Callable[[], Mapping[str, Any]]]:
    """Import everything heavy in a child process; the yielded function waits for it and returns its facts.

    A child that dies gives `{"error": ..., "module": ...}` with the module it was importing.
    """
    words = [sys.executable, "-m", "aimscale.sweeps.doctor.imports"]
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def facts() -> Mapping[str, Any]:
        try:
            out, err = child.communicate(timeout=IMPORT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()[0], f"it did not end within {IMPORT_TIMEOUT_S} s"
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


def check_python() -> Check:
    """The interpreter against what `pyproject.toml` asks for."""
    wanted = importlib.metadata.metadata("aimscale")["Requires-Python"]
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if Requirement(f"python{wanted}").specifier.contains(platform.python_version(), prereleases=True):
        return Check("python", "ok", found)
    return Check("python", "fail", found, f"Make a virtual environment with Python {wanted}.")


def check_compiler() -> Check:
    """Compile an empty extension; only torch.compile, which runs on a card, needs that once aimscale is installed."""
    need = "without it runs on a card need `runtime.compile: false`; nothing else needs it"
    found = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)
    if found is None:
        return Check("compiler", "warn", "no C compiler on the PATH", f"Install gcc and g++ ({need}).")
    words = [found, "-I", sysconfig.get_paths()["include"], "-x", "c", "-", "-c", "-o", "/dev/null"]
    code = "#include <stdio.h>\n#include <Python.h>\n"
    done = subprocess.run(words, input=code, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return Check("compiler", "ok", f"{found} compiles, Python.h is there")
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
    advice = f"Install Debian's `build-essential` and `python3-dev`, or the like ({need})."
    return Check("compiler", "warn", f"{found} cannot compile an extension: {said}", advice)


def check_cores(root: Path = CGROUP) -> Check:
    """Cores this process may use, against the time a container grants them."""
    cores, granted = len(os.sched_getaffinity(0)), None
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        quota, period = map(int, (root / "cpu.max").read_text().split())
        granted = quota / period
    if granted is None or granted >= cores - 0.5:
        return Check("cores", "ok", f"{cores} of {os.cpu_count()} cores")
    advice = f"Launch with `--slots {max(1, int(granted))}`: by default {cores} runs would start at a time."
    return Check("cores", "warn", f"{cores} cores, of which the container may use {granted:g}", advice)


def check_memory(root: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> Check:
    """Memory available now, within the container's bound."""
    available = 1024 * next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    bound = available
    with contextlib.suppress(OSError, ValueError):
        bound = int((root / "memory.max").read_text())
    inside = f", the container's bound is {data_size(bound)}" if bound < available else ""
    found = f"{data_size(available)} available{inside}"
    if min(available, bound) >= MIN_MEMORY_BYTES:
        return Check("memory", "ok", found)
    advice = "Use --slots 1 and small rungs (`aimscale plan` prints the memory of each run), or free some memory."
    return Check("memory", "warn", found, advice)


def check_open_files(limit: int) -> Check:
    """The soft limit of open files."""
    if limit == resource.RLIM_INFINITY or limit >= MIN_OPEN_FILES:
        return Check("open files", "ok", "no limit" if limit == resource.RLIM_INFINITY else str(limit))
    advice = f"`ulimit -n {4 * MIN_OPEN_FILES}` before a launch, and in `slurm.setup`: a source keeps 128 shards open."
    return Check("open files", "warn", f"at most {limit}", advice)


def check_shared_memory(folder: Path) -> Check:
    """Room in /dev/shm, through which the cards of a machine talk. Loader workers need none of it."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    found = f"{data_size(free)} free in {folder}"
    if free >= MIN_SHM_BYTES:
        return Check("shared memory", "ok", found)
    advice = "Start the container with `--shm-size 8g` or `--ipc host`, or train on one card per machine."
    return Check("shared memory", "warn", found, advice)


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
    broken += [facts["error"]] if "error" in facts else []
    if not broken:
        return Check("packages", "ok", ", ".join(names))
    advice = "Run `pip install -e .` in aimscale's folder again"
    if module := facts.get("module") or next(iter(facts.get("errors", {})), None):
        advice += f"; if that changes nothing, `pip install --force-reinstall --no-cache-dir {module}`"
    return Check("packages", "fail", "; ".join(broken), f"{advice}.")


def check_accelerator(facts: Mapping[str, Any]) -> Check:
    """Cards that torch can compute on, beside those that the driver lists."""
    name = "accelerator"
    if "torch" not in facts:
        return Check(name, "fail", "torch does not import", "Mend the packages first.")
    torch, there = facts["torch"], driver_cards()
    build = f"torch {torch['version']}, " + (f"CUDA {torch['cuda']}" if torch["cuda"] else "a CPU build")
    if not torch["cards"] and not there:
        return Check(name, "ok", f"no card; training runs on the CPU ({build})")
    if not torch["cards"]:
        advice = "Update the NVIDIA driver, or install a torch for its CUDA version (pytorch.org names the index)."
        if not torch["cuda"]:
            advice = "Install a CUDA build: `pip install --force-reinstall torch torchvision` from PyPI or pytorch.org."
        elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            advice = "CUDA_VISIBLE_DEVICES is empty and hides the cards; unset it."
        return Check(name, "fail", f"{len(there)} x {there[0]}, which torch does not see ({build})", advice)
    first = torch["cards"][0]
    found = f"{len(torch['cards'])} x {first['name']}, {data_size(first['bytes'])} each ({build})"
    if torch["card_error"]:
        advice = "Install a torch whose build covers this card (pytorch.org names the index)."
        return Check(name, "fail", f"{found}: {torch['card_error']}", advice)
    if not torch["bf16"]:
        advice = "Set `optimiser.precision: fp32`: this card computes bf16 slowly or not at all."
        return Check(name, "warn", f"{found}, without bf16", advice)
    return Check(name, "ok", f"{found}, bf16")


def driver_cards() -> list[str]:
    """Names of the NVIDIA cards that the driver knows, whatever torch sees."""
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]
