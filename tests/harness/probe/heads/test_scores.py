"""Intervals of accuracies."""

from __future__ import annotations

import pytest

from aimscale.harness.probe.heads.scores import wilson_interval


def test_wilson_interval_of_published_examples() -> None:
    # Newcombe, Statistics in Medicine 17:857 (1998), table I
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)
