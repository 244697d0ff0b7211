"""A real Slurm on this machine, for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "slurm"


@contextlib.contextmanager
def running_slurm(port: int, *, num_nodes: int = 2, gpus_per_node: int = 0) -> Iterator[Path]:
    """Start a Slurm with ports from `port` on; yield its folder, which holds `slurm.conf`."""
    if shutil.which("slurmctld") is None or shutil.which("munged") is None or os.geteuid() != 0:
        pytest.skip("needs slurm-wlm and munge, and root")
    folder = Path(tempfile.mkdtemp(prefix="aimscale-slurm-", dir="/var/tmp"))
    try:
        environment = os.environ | {"SLURM_TEST_PORT": str(port)}
        subprocess.run(
            [SCRIPTS / "start_slurm.sh", folder, str(num_nodes), str(gpus_per_node)], check=True, env=environment
        )
        yield folder
    finally:
        subprocess.run([SCRIPTS / "stop_slurm.sh", str(folder)], check=False)
