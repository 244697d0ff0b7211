"""The studies are published, and their pages say what the published folders do."""

from __future__ import annotations

import pytest
from generate import studies

from aimscale.analysis.publication.verification import verify


@pytest.mark.parametrize("study", studies.PROBED)
def test_the_published_study_verifies(study: str) -> None:
    found = verify(studies.PUBLISHED / study)
    assert found.is_verified, found.summary()
    assert found.num_numbers > 1000


@pytest.mark.parametrize("study", studies.PROBED)
def test_a_studys_page_has_the_numbers_of_its_published_folder(study: str) -> None:
    page = studies.page_of(study).read_text()
    assert page == studies.rewrite(study), "run `python docs/generate/studies.py`"
    said = " ".join(page.replace("**", "").split())
    missing = [each for each in studies.sentences(study) if each not in said]
    assert not missing, missing
