"""`aimscale demo` on two of its sizes and a fiftieth of its images: pack, train, probe, collect, report."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import say

from aimscale.analysis import probe_frame, read_table
from aimscale.analysis.report import page
from aimscale.sweeps.plan import sweepfile


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_ends_at_a_report_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sweepfile.load_sweep

    def small(name: str, root: Path) -> sweepfile.Sweep:
        sweep = whole(name, root)
        probes = [probe | {"epochs": 1} for probe in sweep.file.base["probes"]]
        base: dict[str, Any] = {**sweep.file.base, "schedule": {"warmup_images": 64}, "probes": probes}
        return sweep.with_fields(sizes=["w16-d2", "w24-d2"], budgets=[960, 1920], exclude=[], base=base)

    monkeypatch.setattr(sweepfile, "load_sweep", small)
    monkeypatch.setattr(page, "write_report", functools.partial(page.write_report))
    assert "4 of 4 rows have results" in say("demo", "--root", tmp_path)
    assert (tmp_path / "demo/report.html").exists()
    probes = probe_frame(read_table(tmp_path / "demo/results.parquet"))
    expected = {(task, kind) for task in ("photographs", "digits") for kind in ("linear", "knn")}
    assert {*zip(probes["task"], probes["kind"], strict=True)} == expected
    assert len(probes) == 4 * len(expected)
    baselines = pd.read_parquet(tmp_path / "demo/baselines.parquet")
    assert sorted(baselines["size"]) == ["random-w24-d2", "raw-pixels"]
    assert "skipped   2 finished" in say("demo", "--root", tmp_path)
