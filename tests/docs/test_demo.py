"""What the pages say about the demo and the CIFAR-10 study is what the committed tables say."""

from __future__ import annotations

from pathlib import Path

import pytest
from generate import demo, directions


@pytest.mark.parametrize("page", demo.PAGES, ids=lambda page: page.stem)
def test_pages_have_the_numbers_of_the_committed_tables(page: Path) -> None:
    told = demo.rewrite(page.read_text(), demo.PAGES[page]())
    assert page.read_text() == told, "run `python docs/generate/demo.py docs/figures/demo`"


def test_the_page_of_directions_has_the_numbers_of_the_committed_tables() -> None:
    page = directions.PAGE.read_text()
    assert page == directions.rewrite(page), "run `python docs/generate/directions.py`"
