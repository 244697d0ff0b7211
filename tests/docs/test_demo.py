"""What README says about the demo, and a page about the CIFAR-10 study, is what the committed tables say."""

from __future__ import annotations

from generate import demo, directions


def test_readme_has_the_numbers_of_the_committed_tables() -> None:
    readme = (demo.ROOT / "README.md").read_text()
    assert readme == demo.rewrite(readme, demo.section()), "run `python docs/generate/demo.py docs/figures/demo`"


def test_the_page_of_directions_has_the_numbers_of_the_committed_tables() -> None:
    page = directions.PAGE.read_text()
    assert page == directions.rewrite(page), "run `python docs/generate/directions.py`"
