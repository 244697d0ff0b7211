from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import running_slurm


@pytest.fixture
def slurm_conf() -> Iterator[Path]:
    """The configuration of a running Slurm, apart from that of tests/slurm."""
    with running_slurm(27200) as folder:
        yield folder / "slurm.conf"
