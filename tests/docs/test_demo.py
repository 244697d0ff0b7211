"""What the pages say about the demo is what the committed tables say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from generate import demo

from aimscale.analysis import probe_frame, read_table


@pytest.mark.parametrize("page", demo.PAGES, ids=lambda page: page.stem)
def test_pages_have_the_numbers_of_the_committed_tables(page: Path) -> None:
    told = demo.rewrite(page.read_text(), demo.PAGES[page]())
    assert page.read_text() == told, "run `python docs/generate/demo.py docs/figures/demo`"


def test_the_demo_shows_what_its_pages_promise() -> None:
    seeds = pd.read_csv(demo.TABLES / demo.SEEDS)
    first = demo.seed_row(demo.TABLES)
    assert first["alpha"] == pytest.approx(seeds["alpha"][0], abs=1e-3)
    assert (seeds["N"] < seeds["N_line"] / 1.5).all()
    assert (seeds["D"] < seeds["D_line"]).all()
    assert (seeds["N_tests"] & seeds["D_tests"]).mean() >= 0.8
    assert (seeds["r"] <= -0.85).all()
    assert (seeds["least"] > seeds["pixels"]).all()
    baselines = probe_frame(read_table(demo.TABLES / "baselines.parquet"))
    assert (baselines["top1"] < first["least"]).all(), "random weights and raw pixels lie below every run"
