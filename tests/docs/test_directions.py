"""The CIFAR-10 study's table of single changes is what its committed tables say."""

from __future__ import annotations

from generate import directions


def test_the_page_has_the_numbers_of_the_committed_tables() -> None:
    page = directions.PAGE.read_text()
    assert page == directions.rewrite(page), "run `python docs/generate/directions.py`"
    assert page.count("\n| ") > len(directions.CHANGES)
    assert all(words in directions.table() for words, _, _ in directions.CHANGES)
