"""Exponents of N*(C) by approaches 1 and 2 hold the truth, however many budgets a grid is interpolated to."""

import pytest

from aimscale.analysis.coverage.designs import Design
from aimscale.analysis.coverage.frontiers import envelope_coverage, interpolated_coverage, isoflop_coverage


@pytest.mark.parametrize(
    ("study", "isoflop"), [(envelope_coverage, False), (isoflop_coverage, True), (interpolated_coverage, False)]
)
def test_exponents_cover(study, isoflop):
    design = Design(sizes=7, budgets=5, seeds=1, errors="size", isoflop=isoflop)
    found = study(design, 30).table().set_index("interval")
    assert (found["coverage"] >= 0.83).all()
    widths = found["width"].dropna()
    assert (widths < 2).all()  # resampling curves gives 4.4 times the spread
