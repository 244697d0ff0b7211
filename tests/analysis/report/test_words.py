"""What the report says in words about loss and accuracy."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from aimscale.analysis.accuracy.correlation import correlate
from aimscale.analysis.report.words import accuracy_in_words


def rows(slope_within: float, slope_between: float, noise: float, seed: int = 0) -> pd.DataFrame:
    """Accuracy over loss of four sizes with five budgets each: one slope within a size, another between them."""
    rng = np.random.default_rng(seed)
    table = []
    for size in range(4):
        for budget in range(5):
            loss = 0.5 - 0.03 * budget - 0.01 * size
            top1 = 0.5 - slope_within * 0.03 * budget - slope_between * 0.01 * size + noise * rng.standard_normal()
            table.append({"run_id": f"r{size}", "size": f"s{size}", "val_loss": loss, "top1": top1})
    return pd.DataFrame(table)


def found(table: pd.DataFrame):
    return (
        *correlate(table, x="val_loss", y="top1", methods=("pearson",)),
        *correlate(table, x="val_loss", y="top1", methods=("pearson",), within="size"),
    )


def test_within_a_size_is_said_where_over_all_sizes_nothing_is_shown_and_other_probes_have_their_line():
    hidden, clear = found(rows(-1, 20, 0.002)), found(rows(-1, -1, 0.002))
    lines = list(accuracy_in_words(SimpleNamespace(correlations={("linear", "cats"): hidden, ("knn", "cats"): clear})))
    assert hidden[0].low < 0 < hidden[0].high
    assert lines[0].startswith(
        "Validation loss is not shown to go with linear-probe accuracy on cats over all sizes; within a size lower"
    )
    assert lines[1] == f"Pearson of the other probes: knn-probe accuracy on cats {clear[0].value:.2f} " + (
        f"[{clear[0].low:.2f}, {clear[0].high:.2f}]."
    )
    alone = list(accuracy_in_words(SimpleNamespace(correlations={("linear", "cats"): clear})))
    assert len(alone) == 1
    assert alone[0].startswith("Lower validation loss goes with higher linear-probe accuracy on cats: Pearson")
