"""What README says about the demo, and a page about the CIFAR-10 study, is what the committed tables say."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from generate import demo, directions

from aimscale.analysis.report.page import write_report


def test_readme_has_the_numbers_of_the_committed_tables() -> None:
    readme = (demo.ROOT / "README.md").read_text()
    assert readme == demo.rewrite(readme, demo.section()), "run `python docs/generate/demo.py docs/figures/demo`"


def test_the_page_of_directions_has_the_numbers_of_the_committed_tables() -> None:
    page = directions.PAGE.read_text()
    assert page == directions.rewrite(page), "run `python docs/generate/directions.py`"


@pytest.mark.slow
def test_no_sentence_of_its_report_has_a_number_that_is_none(tmp_path: Path) -> None:
    """Fourteen points, two of the largest size, do not identify some refits once the largest scale is left out."""
    table = pd.read_parquet(demo.ROOT / "docs/figures/demo/results.parquet")
    is_largest = table.params_total == table.params_total.max()
    table = table[(table.images_seen < 163_840) | (~is_largest & (table.images_seen > 163_840))]
    table.to_parquet(tmp_path / "results.parquet")
    page = write_report([tmp_path / "results.parquet"], tmp_path / "report.html").read_text()
    words = re.sub(r"<[^>]+>", "", page)
    assert "is no test" in words
    assert not re.search(r"\bnan\b", words)
