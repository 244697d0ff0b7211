"""What README says about the demo is what its committed tables say."""

from __future__ import annotations

from generate import demo


def test_readme_has_the_numbers_of_the_committed_tables() -> None:
    readme = (demo.ROOT / "README.md").read_text()
    assert readme == demo.rewrite(readme, demo.section()), "run `python docs/generate/demo.py docs/figures/demo`"
