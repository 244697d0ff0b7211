from __future__ import annotations

from pathlib import Path

import pytest

from aimscale.sweeps.doctor import check_slurm


def test_a_real_slurm_is_found(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_slurm()
    assert check.level == "ok", check.found
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
    check = check_slurm()
    assert (check.level, "SLURM_CONF" in check.advice) == ("warn", True)
