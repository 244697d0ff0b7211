from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from aimscale.sweeps.cli import doctor as cli_doctor
from aimscale.sweeps.cli.main import verb
from aimscale.sweeps.doctor import checks as doctor
from aimscale.sweeps.doctor.checks import Check

GCC = shutil.which("gcc")
FACTS: dict[str, Any] = {"torch": {"version": "2.13.0", "cuda": "13.0", "cards": [], "card_error": None, "bf16": False}}
CARD = {"name": "NVIDIA H100", "bytes": 85_000_000_000}


def program(folder: Path, name: str, text: str) -> Path:
    """An executable shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def with_torch(**changes: Any) -> dict[str, Any]:
    return {**FACTS, "torch": {**FACTS["torch"], **changes}}


# The whole verb


@pytest.mark.slow
def test_this_machine_passes_and_nothing_is_left_behind(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "aimscale", "doctor", "--json", "--root", str(tmp_path / "runs")]
    out = subprocess.run(words, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr
    found = json.loads(out.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert found["version"] == 1
    assert found["ok"]
    assert {"python", "packages", "compiler", "accelerator", "locks", "disk", "slurm"} <= set(checks)
    assert "torch 2" in checks["packages"]["found"]
    assert "deepspeed 0" in checks["packages"]["found"]
    assert all(check["advice"] for check in found["checks"] if check["level"] != "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_named_with_what_to_do_and_gives_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("disk", "fail", "1 MB free", "Free some space."), Check("slurm", "warn", "does not answer", "Ask.")]
    monkeypatch.setattr(cli_doctor, "checks", lambda root, on: iter(checks))
    result = CliRunner().invoke(verb("doctor"), [])
    assert result.exit_code == 1
    assert "fail  disk          1 MB free\n                    -> Free some space." in result.stdout
    assert result.stdout.endswith("0 ok, 1 to look at, 1 failed\n")


def test_a_warning_alone_gives_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("slurm", "warn", "does not answer", "Ask.")]
    monkeypatch.setattr(cli_doctor, "checks", lambda root, on: iter(checks))
    result = CliRunner().invoke(verb("doctor"), ["--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["checks"][0]["advice"] == "Ask."


# Packages


def import_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str) -> Check:
    """What is said of packages where `import torch` executes this code instead."""
    (tmp_path / "torch.py").write_text(torch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return doctor.check_packages(doctor.imported())


def test_a_package_that_aborts_its_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = import_with(tmp_path, monkeypatch, "import os, sys; sys.stderr.write('libfoo is broken\\n'); os.abort()")
    assert check.level == "fail"
    assert "the process that imported torch ended with signal 6: libfoo is broken" in check.found
    assert "--no-cache-dir torch`" in check.advice


def test_a_package_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = import_with(tmp_path, monkeypatch, "raise OSError('libcudart.so.13: cannot open shared object file')")
    assert check.level == "fail"
    assert "imported torch ended with code 1: OSError: libcudart.so.13: cannot open shared object file" in check.found


def test_an_old_version_is_named_with_what_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "submitit-1.2.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: submitit\nVersion: 1.2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor.check_packages(FACTS)
    assert check.level == "fail"
    assert check.found == "submitit is 1.2.0, wanted >=1.5.2"
    assert "pip install -e ." in check.advice


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["no-such-thing>=1", 'other; extra == "dev"'])
    assert doctor.check_packages(FACTS).found == "no-such-thing is missing, wanted >=1"


# Accelerator


def test_a_card_that_torch_does_not_see_fails_with_the_build_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "nvidia-smi", "printf 'NVIDIA H100 80GB HBM3\\nNVIDIA H100 80GB HBM3\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cpu_build = doctor.check_accelerator(with_torch(cuda=None))
    assert cpu_build.level == "fail"
    assert cpu_build.found == "2 x NVIDIA H100 80GB HBM3, which torch does not see (torch 2.13.0, a CPU build)"
    assert "CUDA build" in cpu_build.advice
    assert "driver" in doctor.check_accelerator(with_torch()).advice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset it" in doctor.check_accelerator(with_torch()).advice


def test_a_machine_without_cards_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "echo 'could not communicate with the NVIDIA driver'; exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = doctor.check_accelerator(with_torch(cuda=None))
    assert (check.level, check.found) == ("ok", "no card; training runs on the CPU (torch 2.13.0, a CPU build)")


def test_cards_are_counted_and_a_kernel_that_does_not_run_fails() -> None:
    good = with_torch(cards=[CARD, CARD], bf16=True)
    assert doctor.check_accelerator(good).found == "2 x NVIDIA H100, 85 GB each (torch 2.13.0, CUDA 13.0), bf16"
    assert doctor.check_accelerator(with_torch(cards=[CARD])).level == "warn"
    bad = doctor.check_accelerator(with_torch(cards=[CARD], bf16=True, card_error="no kernel image is available"))
    assert bad.level == "fail"
    assert "no kernel image is available" in bad.found


# Machine


def test_a_missing_compiler_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    check = doctor.check_compiler()
    assert (check.level, check.found) == ("warn", "gcc cannot compile an extension: No such file or directory")
    assert "runtime.compile: false" in check.advice


@pytest.mark.skipif(GCC is None, reason="needs gcc")
def test_a_compiler_without_the_c_library_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(program(tmp_path, "cc", f'exec {GCC} -nostdinc "$@"')))
    check = doctor.check_compiler()
    assert check.level == "warn"
    assert "stdio.h" in check.found


def test_fewer_cores_than_counted_names_the_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    check = doctor.check_cores(tmp_path)
    assert (check.level, check.found) == ("warn", f"64 of {os.cpu_count()} cores, the container may use 4")
    assert "--slots 4" in check.advice
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor.check_cores(tmp_path).level == "ok"


def test_the_containers_bound_counts_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=65_500_000_000))
    assert doctor.check_memory(tmp_path).found == "65.5 GB available"
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.check_memory(tmp_path).level == "ok"
    (tmp_path / "memory.max").write_text("2000000000\n")
    check = doctor.check_memory(tmp_path)
    assert (check.level, check.found) == ("warn", "65.5 GB available, the container's bound is 2 GB")


def test_little_or_no_shared_memory_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_shared_memory(tmp_path / "none").level == "warn"
    usage = type(shutil.disk_usage(tmp_path))(64_000_000, 0, 64_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check = doctor.check_shared_memory(tmp_path)
    assert (check.level, check.found) == ("warn", f"64 MB free in {tmp_path}")
    assert "--shm-size" in check.advice


# Storage


def checks_of_storage(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    monkeypatch.setattr(doctor, "imported", dict)
    return {check.name: check for check in doctor.checks(root, "local")}


def test_a_root_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checks_of_storage(Path("/proc/runs"), monkeypatch)
    assert found["sweep root"].level == "fail"
    assert "/proc cannot be written" in found["sweep root"].found
    assert "--root" in found["sweep root"].advice
    assert "locks" not in found


def test_a_file_in_the_place_of_the_root_fails(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    check = doctor.check_writable(tmp_path / "runs", tmp_path)
    assert (check.level, check.found) == ("fail", f"{tmp_path / 'runs'} is no folder")


def test_a_root_to_be_made_is_looked_at_where_it_would_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "a" / "b"
    found = checks_of_storage(root, monkeypatch)
    assert found["sweep root"].found == f"{tmp_path} can be written; {root} will be made"
    assert found["locks"].level == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(GCC is None, reason="needs gcc")
@pytest.mark.parametrize(
    ("body", "said"), [("errno = ENOLCK; return -1;", "no flock on "), ("return 0;", "excludes no other process")]
)
def test_a_file_system_without_working_flock_fails(tmp_path: Path, body: str, said: str) -> None:
    """As NFS without a lock daemon answers, and as a mount does that pretends to lock."""
    (tmp_path / "flock.c").write_text(f"#include <errno.h>\nint flock(int fd, int op) {{ {body} }}\n")
    library = tmp_path / "flock.so"
    subprocess.run([str(GCC), "-shared", "-fPIC", str(tmp_path / "flock.c"), "-o", str(library)], check=True)
    code = (
        "import dataclasses, json, pathlib, sys; from aimscale.sweeps.doctor.checks import *\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "print(json.dumps(dataclasses.asdict(check_locks(folder, mount_of(folder)))))"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    env = os.environ | {"LD_PRELOAD": str(library)}
    found = json.loads(subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout)
    assert found["level"] == "fail"
    assert said in found["found"]
    assert "another --root" in found["advice"]


def mount(point: Path, kind: str, options: str = "rw") -> SimpleNamespace:
    return SimpleNamespace(mountpoint=str(point), fstype=kind, opts=options)


def test_locks_that_hold_on_one_machine_only_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nfs = mount(tmp_path, "nfs4", "rw,relatime,vers=4.2,local_lock=all")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [mount(tmp_path, "ext4"), nfs, mount(Path("/"), "ext4")])
    assert doctor.mount_of(tmp_path / "runs") is nfs
    check = doctor.check_locks(tmp_path, nfs)
    assert (check.level, check.found) == ("warn", "flock works on this machine only (nfs4 mounted with local_lock=all)")


@pytest.mark.parametrize(("free", "level"), [(5e8, "fail"), (5e9, "warn"), (5e10, "ok")])
def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, level: str) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10**12, 0, int(free))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check = doctor.check_space(tmp_path, tmp_path)
    assert check.level == level


# Slurm


def slurm_at(folder: Path, monkeypatch: pytest.MonkeyPatch, sinfo: str) -> None:
    for name in doctor.SLURM_COMMANDS:
        program(folder, name, sinfo if name == "sinfo" else "exit 0")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_no_slurm_is_a_failure_only_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_slurm(needed=False).level == "ok"
    needed = doctor.check_slurm(needed=True)
    assert (needed.level, needed.found) == ("fail", "sbatch, squeue, sinfo, scontrol, scancel, srun not on the PATH")


def test_half_a_slurm_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "sinfo", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.check_slurm(needed=False)
    assert (check.level, check.found) == ("warn", "sbatch, squeue, scontrol, scancel, srun not on the PATH")


def test_a_slurm_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = "echo 'slurm_load_partitions: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    slurm_at(tmp_path, monkeypatch, f'[ "$1" = --version ] && {{ echo slurm 24.11.5; exit 0; }}; {refusal}')
    check = doctor.check_slurm(needed=True)
    assert check.level == "fail"
    assert "Unable to contact slurm controller" in check.found
    assert "scontrol ping" in check.advice
    monkeypatch.setattr(doctor, "SLURM_TIMEOUT_S", 0.2)
    program(tmp_path, "sinfo", "exec sleep 20")
    check = doctor.check_slurm(needed=False)
    assert check.level == "warn"
    assert "did not answer within" in check.found


def test_partitions_are_listed_and_one_must_be_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = '[ "$1" = --version ] && { echo slurm 24.11.5; exit 0; }'
    lines = "gpu* up: 16 nodes, gpu:h100:8, time limit 1-00:00:00\\ncpu down: 4 nodes, (null), time limit infinite"
    slurm_at(tmp_path, monkeypatch, f"{version}; printf '{lines}\\n'")
    check = doctor.check_slurm(needed=True)
    assert check.level == "ok"
    assert check.found == (
        "24.11.5, partitions gpu* up: 16 nodes, gpu:h100:8, time limit 1-00:00:00; "
        "cpu down: 4 nodes, time limit infinite"
    )
    program(tmp_path, "sinfo", f"{version}; echo 'gpu* down: 16 nodes, gpu:h100:8, time limit 1-00:00:00'")
    assert doctor.check_slurm(needed=True).level == "fail"


def test_a_root_that_the_nodes_may_not_see_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_at(tmp_path, monkeypatch, "echo far1; echo far2")
    local = mount(Path("/"), "ext4")
    check = doctor.check_shared(tmp_path, local)
    assert check.level == "warn"
    assert "lies on ext4, which far1 and 1 other nodes may not see" in check.found
    shared = mount(Path("/"), "nfs4")
    assert doctor.check_shared(tmp_path, shared).level == "ok"
