from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

START = Path(__file__).parents[1] / "slurm" / "start_slurm.sh"


@pytest.fixture
def slurm_conf() -> Iterator[Path]:
    """The configuration of a running Slurm of two nodes, apart from that of tests/slurm."""
    if shutil.which("slurmctld") is None or shutil.which("munged") is None or os.geteuid() != 0:
        pytest.skip("needs slurm-wlm and munge, and root")
    folder = Path(tempfile.mkdtemp(prefix="aimscale-docs-slurm-", dir="/var/tmp"))
    environment = os.environ | {"SLURM_TEST_PORT": "27200"}
    try:
        subprocess.run([START, str(folder), "2"], check=True, env=environment)
        yield folder / "slurm.conf"
    finally:
        subprocess.run([START.with_name("stop_slurm.sh"), str(folder)], check=False)
