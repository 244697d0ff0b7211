"""The published tables of `tests/board` say where they come from, and hold numbers a law can be fitted to."""

from pathlib import Path

import pandas as pd
import pytest

TABLES = sorted((Path(__file__).parents[2] / "board").rglob("*.csv"))


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_a_table_has_its_provenance_and_sane_rows(path):
    notes = {}
    for line in path.read_text().splitlines():
        if not line.startswith("# "):
            break
        key, _, value = line[2:].partition(": ")
        notes[key] = value.strip()
    df = pd.read_csv(path, comment="#")

    assert all(notes.get(k) for k in ("source", "licence", "rows"))
    assert (df[["N", "D", "C", "loss"]] > 0).all(axis=None)
    assert not df.duplicated().any()
    ratio = df["C"] / (6.0 * df["N"] * df["D"])
    assert ratio.between(1 / 3, 3).all() or notes.get("compute")  # another count of FLOPs or of D explains itself
