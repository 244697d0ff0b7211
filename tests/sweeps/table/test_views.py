"""Numbers as people read them."""

import pytest

from aimscale.sweeps.table.views import data_size, number


@pytest.mark.parametrize(
    ("value", "words"), [(999_936, "1M"), (999_400, "999k"), (12_345, "12.3k"), (0.5, "0.5"), (None, "-")]
)
def test_three_digits_and_a_prefix(value: float | None, words: str) -> None:
    assert number(value) == words


def test_bytes_never_read_a_thousand_of_a_unit() -> None:
    assert data_size(999_900_000) == "1 GB"
    assert data_size(512) == "512 B"
