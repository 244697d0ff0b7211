"""Words of prose."""

from __future__ import annotations

import pytest

from aimscale.analysis.display import accuracy_of, capital


@pytest.mark.parametrize(
    ("kind", "heading"), [("knn", "k-NN accuracy"), ("linear", "Linear-probe accuracy"), ("other", "Other accuracy")]
)
def test_a_heading_begins_with_a_capital_but_for_k_nn(kind: str, heading: str) -> None:
    assert capital(accuracy_of(kind)) == heading
