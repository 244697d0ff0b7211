"""`aimscale demo` on two of its sizes and a hundredth of its images: pack, train, probe, collect, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import say

from aimscale.analysis import probe_frame, read_table
from aimscale.harness.data.store import bundled
from aimscale.sweeps.planning import sweepfile
from aimscale.sweeps.state import planned_sweep


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_ends_at_a_report_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sweepfile.load_sweep

    def small(name: str, root: Path) -> sweepfile.Sweep:
        sweep = whole(name, root)
        base: dict[str, Any] = {**sweep.file.base, "schedule": {"warmup_images": 64}}
        sizes = ["w12-d1-h3", "w16-d2", "w20-d1", "w24-d2"]
        return sweep.with_fields(sizes=sizes, budgets=[960, 1920, 2880], exclude=[], base=base)

    monkeypatch.setattr(planned_sweep, "load_sweep", small)
    monkeypatch.setattr(bundled, "_CROPS", {"pretrain": 100, "train": 30, "validation": 20, "test": 30})
    said = say("demo", "--root", tmp_path, "--devices", 1)
    report = tmp_path / "demo/report.html"
    first, *_, last = said.splitlines()
    assert first.startswith("4 tiny models see up to 2,880 crops of photographs")
    assert last == f"report: {report}"
    assert said.count("\nso far, 3 of 4 sizes: ") == 1
    assert "raw pixels" in said
    assert "\nstarted " not in said
    assert report.exists()
    probes = probe_frame(read_table(tmp_path / "demo/results.parquet"))
    assert {*zip(probes["task"], probes["kind"], strict=True)} == {("photographs", "knn")}
    assert len(probes) == 12
    baselines = pd.read_parquet(tmp_path / "demo/baselines.parquet")
    assert sorted(baselines["size"]) == ["random-w24-d2", "raw-pixels"]
    trained = sorted(tmp_path.glob("demo/runs/*/metrics.jsonl"))
    before = [path.stat().st_mtime_ns for path in trained]
    assert "raw pixels" in say("demo", "--root", tmp_path)
    assert [path.stat().st_mtime_ns for path in trained] == before
