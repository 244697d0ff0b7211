"""Which tables are planned by budgets of compute."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis.table.groups import isoflop_budgets

BOARD = Path(__file__).parents[2] / "board"


@pytest.mark.parametrize(("sizes", "budgets"), [(4, 4), (5, 4), (8, 3), (3, 8)])
def test_rows_on_the_diagonals_of_a_grid_are_no_budgets(sizes, budgets):
    n, d = (a.ravel() for a in np.meshgrid(1e6 * 2.0 ** np.arange(sizes), 1e8 * 2.0 ** np.arange(budgets)))
    assert isoflop_budgets(pd.DataFrame({"N": n, "D": d, "C": 6 * n * d})) is None
    flops = 6e14 * 2.0 ** np.arange(budgets)  # the same sizes at equal compute: D stands on that lattice, too
    n, c = (a.ravel() for a in np.meshgrid(1e6 * 2.0 ** np.arange(sizes), flops))
    found = isoflop_budgets(pd.DataFrame({"N": n, "D": c / 6 / n, "C": c}, index=np.arange(len(n))[::-1]))
    np.testing.assert_allclose(found, c)


@pytest.mark.parametrize(
    ("name", "number"),
    [("llama3-isoflop", 10), ("marin-comma", 7), ("porian-rw-5-tuned", 12), ("own-cifar-isoflop", 4)]
    + [(name, None) for name in ("own-cifar", "own-photographs", "gadre-rpj-rpj", "olmo-piqa", "data-constrained-all")],
)
def test_iso_flop_designs_among_real_tables(name, number):
    df = pd.read_csv(BOARD / f"{name}.csv", comment="#")[["N", "D", "C"]].astype(float)
    found = isoflop_budgets(df)
    assert (None if found is None else found.nunique()) == number
