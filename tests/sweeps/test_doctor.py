from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aimscale.sweeps import doctor
from aimscale.sweeps.cli.main import load_verb
from aimscale.sweeps.doctor import Check

GCC = shutil.which("gcc")


@pytest.mark.slow
def test_this_machine_passes_and_nothing_is_left_behind(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "aimscale", "doctor", "--root", str(tmp_path / "runs")]
    out = subprocess.run(words, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr
    found = [line.split()[:2] for line in out.stdout.splitlines() if line.startswith(("ok ", "warn "))]
    names = ["python", "packages", "accelerator", "memory", "disk", "locks", "slurm"]
    assert [name for _, name in found] == names
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("level", "code"), [("fail", 1), ("warn", 0)])
def test_a_failure_alone_gives_code_1_and_each_comes_with_what_to_do(
    level: Any, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda root: iter([Check("disk", level, "1 MB free", "Free some.")]))
    result = CliRunner().invoke(load_verb("doctor"), [])
    assert result.exit_code == code
    assert "-> Free some." in result.stdout


@pytest.mark.parametrize(
    ("torch", "end"),
    [
        ("import os, sys; sys.stderr.write('libfoo is broken\\n'); os.abort()", "signal 6: libfoo is broken"),
        ("raise OSError('libcudart.so.13: cannot open')", "code 1: OSError: libcudart.so.13: cannot open"),
    ],
)
def test_a_package_that_takes_its_process_down_is_named(
    torch: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(torch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    accelerator, error = doctor.import_packages()
    assert accelerator is None
    check = doctor.check_packages(error)
    assert (check.level, check.found.endswith(f"imported torch ended with {end}")) == ("fail", True)


def test_an_old_package_is_named_with_what_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "webdataset-0.2.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor.check_packages("")
    assert (check.level, check.found) == ("fail", "webdataset is 0.2.0, wanted >=1.0")


def test_gpus_that_torch_does_not_see_fail(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program("nvidia-smi", "printf 'NVIDIA H100 80GB HBM3, 81559\\nNVIDIA H100 80GB HBM3, 81559\\n'")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check = doctor.check_accelerator()
    assert (check.level, check.found.startswith("2 x NVIDIA H100 80GB HBM3")) == ("fail", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" in doctor.check_accelerator().advice
    program("nvidia-smi", "echo 'could not communicate with the NVIDIA driver'; exit 9")
    assert doctor.check_accelerator().level == "ok"


def checks_of_storage(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    monkeypatch.setattr(doctor, "import_packages", lambda: (None, ""))
    return {check.name: check for check in doctor.run_checks(root)}


def test_a_root_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checks_of_storage(Path("/proc/runs"), monkeypatch)
    assert (found["disk"].level, "/proc" in found["disk"].found, "locks" in found) == ("fail", True, False)
    (tmp_path / "runs").write_text("")
    assert doctor.check_disk(tmp_path / "runs", tmp_path).level == "fail"


@pytest.mark.skipif(GCC is None, reason="needs gcc")
@pytest.mark.parametrize("body", ["errno = ENOLCK; return -1;", "return 0;"])
def test_a_file_system_without_working_flock_fails(tmp_path: Path, body: str) -> None:
    """NFS without a lock daemon answers like this, and so does a mount that only pretends to lock."""
    (tmp_path / "flock.c").write_text(f"#include <errno.h>\nint flock(int fd, int op) {{ {body} }}\n")
    library = tmp_path / "flock.so"
    subprocess.run([str(GCC), "-shared", "-fPIC", str(tmp_path / "flock.c"), "-o", str(library)], check=True)
    code = (
        "import pathlib, sys; from aimscale.sweeps.doctor import *; print(check_locks(pathlib.Path(sys.argv[1])).level)"
    )
    env = os.environ | {"LD_PRELOAD": str(library)}
    words = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout == "fail\n"


@pytest.mark.parametrize(
    ("kind", "options", "level"),
    [
        ("lustre", "rw,localflock", "warn"),
        ("lustre", "rw,flock", "ok"),
        ("nfs4", "rw,vers=4.2,local_lock=none", "ok"),
        ("nfs", "rw,vers=3,nolock,local_lock=all", "warn"),
    ],
)
def test_locks_that_other_hosts_do_not_see_are_named(
    kind: str, options: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my runs").mkdir()
    place = str(tmp_path / "my runs").replace(" ", "\\040")
    (tmp_path / "mounts").write_text(f"/dev/sda / ext4 rw 0 0\nhost:/x {place} {kind} {options} 0 0\n")
    monkeypatch.setattr(doctor, "MOUNTS", tmp_path / "mounts")
    check = doctor.check_locks(tmp_path / "my runs")
    assert check.level == level
    assert ("this host" in check.found) == (level == "warn")
    assert doctor.check_locks(tmp_path).level == "ok"


def test_no_slurm_is_fine_and_half_a_slurm_names_what_is_missing(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "commands"))
    assert doctor.check_slurm().level == "ok"
    program("sinfo", "exit 0")
    check = doctor.check_slurm()
    assert (check.level, check.found) == ("warn", "sbatch, squeue, scontrol, scancel, srun not on the PATH")


def test_a_slurm_answers_or_does_not(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.SLURM_COMMANDS:
        program(name, "exit 0")
    program("sinfo", "echo slurm 23.11.4")
    assert (doctor.check_slurm().level, doctor.check_slurm().found) == ("ok", "23.11.4 answers")
    program("sinfo", "echo 'sinfo: error: DNS failed\nsinfo: fatal: No configuration' >&2; exit 1")
    assert doctor.check_slurm().found == "sinfo failed: No configuration"
    program("sinfo", "echo 'Unable to contact slurm controller' >&2; exit 1")
    check = doctor.check_slurm()
    assert (check.level, "Unable to contact slurm controller" in check.found) == ("warn", True)
    monkeypatch.setattr(doctor, "SLURM_TIMEOUT_S", 0.2)
    program("sinfo", "exec sleep 20")
    assert doctor.check_slurm().level == "warn"
