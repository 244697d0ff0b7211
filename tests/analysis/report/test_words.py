"""What the report says in words about loss and accuracy."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from aimscale.analysis.accuracy.correlation import correlate
from aimscale.analysis.report.words import accuracy_in_words
from aimscale.analysis.words import accuracy_of, kind_name


def found(slope_within: float, slope_between: float, noise: float):
    """Correlations of four sizes with five budgets each: one slope within a size, another between them."""
    rng = np.random.default_rng(0)
    table = []
    for size in range(4):
        for budget in range(5):
            loss = 0.5 - 0.03 * budget - 0.01 * size
            top1 = 0.5 - slope_within * 0.03 * budget - slope_between * 0.01 * size + noise * rng.standard_normal()
            table.append({"run_id": f"r{size}", "size": f"s{size}", "val_loss": loss, "top1": top1})
    options = {"x": "val_loss", "y": "top1", "methods": ("pearson",)}
    return sum((correlate(pd.DataFrame(table), **options, within=within) for within in (None, "size")), ())


def test_within_a_size_is_said_where_over_all_sizes_nothing_is_shown():
    hidden, clear = found(-1, 20, 0.002), found(-1, -1, 0.002)
    assert hidden[0].low < 0 < hidden[0].high
    (line,) = accuracy_in_words(SimpleNamespace(correlations={("linear", "cats"): hidden, ("knn", "cats"): clear}))
    assert "not shown" in line
    assert "linear-probe accuracy on cats" in line
    assert "within a size lower" in line
    (line,) = accuracy_in_words(SimpleNamespace(correlations={("linear", "cats"): clear}))
    assert f"{clear[0].value:.2f} [{clear[0].low:.2f}, {clear[0].high:.2f}]" in line
    assert "not shown" not in line


def test_lora_is_never_called_a_probe():
    assert "not frozen" in accuracy_of("lora")
    assert (accuracy_of("knn"), kind_name("knn")) == ("knn-probe accuracy", "knn")
