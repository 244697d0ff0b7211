"""The studies' tables give the numbers that are kept beside them, and their pages say these."""

from __future__ import annotations

import pytest
from generate import studies

from aimscale.analysis.publication.verification import compare_numbers


@pytest.mark.slow
@pytest.mark.parametrize("study", ["cifar", "fashion"])
def test_a_studys_tables_give_its_numbers(study: str) -> None:
    num, differences = compare_numbers(studies.record(study)["numbers"], studies.recomputed(study))
    assert not differences, f"{differences[:5]}: run `python docs/generate/studies.py renew {study}`"
    assert num > 1000


@pytest.mark.parametrize("study", studies.PROBED)
def test_a_studys_page_has_its_numbers(study: str) -> None:
    page = studies.page_of(study).read_text()
    assert page == studies.rewrite(study), "run `python docs/generate/studies.py`"
    said = " ".join(page.replace("**", "").split())
    missing = [each for each in studies.sentences(study) if each not in said]
    assert not missing, missing
