from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_real_slurm_is_found_with_its_partitions(cluster: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "aimscale", "doctor", "--json", "--on", "slurm", "--root", str(tmp_path)]
    out = subprocess.run(words, capture_output=True, text=True, check=False)
    checks = {check["name"]: check for check in json.loads(out.stdout)["checks"]}
    assert out.returncode == 0, out.stdout
    assert checks["slurm"]["level"] == "ok"
    assert "main* up: 2 nodes" in checks["slurm"]["found"]
    assert "urgent up: 2 nodes" in checks["slurm"]["found"]
    assert checks["shared root"]["level"] in ("ok", "warn")


def test_a_configuration_of_no_cluster_fails_with_slurms_own_words(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "aimscale", "doctor", "--on", "slurm", "--root", str(tmp_path)]
    env = os.environ | {"SLURM_CONF": str(tmp_path / "none.conf")}
    out = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert out.returncode == 1
    assert "fail  slurm         " in out.stdout
    assert "SLURM_CONF" in out.stdout
