"""A running run's end is forecast from its own loss and the shape of the finished curves."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.forecasts.ending import endings


def curves(rng, share: float, num_finished: int = 6) -> tuple[pd.DataFrame, float]:
    """Finished curves and one that is cut at a share of its training; and where that one ends."""
    progress = np.linspace(0.01, 1, 100)
    rows, end = [], 0.0
    for i in range(num_finished + 1):
        fall = (0.4 + 0.02 * rng.standard_normal()) * progress**-0.3
        loss = (1 - 0.05 * i + fall) * np.exp(0.004 * rng.standard_normal(100))
        keep = progress <= (share if i == num_finished else 1.0)
        rows.append(pd.DataFrame({"run": f"r{i}", "progress": progress[keep], "loss": loss[keep]}))
        end = float(np.exp(np.mean(np.log(loss[progress > 0.9]))))
    return pd.concat(rows), end


def test_the_interval_holds_the_end_about_as_often_as_it_says_and_narrows():
    rng = np.random.default_rng(0)
    inside, widths = [], {0.3: [], 0.8: []}
    for share in widths:
        for _ in range(100):
            table, end = curves(rng, share)
            (found,) = endings(table)
            inside.append(found.low <= end <= found.high)
            widths[share].append(found.high / found.low)
            assert found.progress == pytest.approx(share, abs=0.011)
    assert 0.9 <= np.mean(inside) <= 0.99
    assert np.median(widths[0.8]) < np.median(widths[0.3]) < 1.2
    assert "will end at a training loss of" in found.sentence()


def test_too_few_finished_runs_are_refused():
    table, _ = curves(np.random.default_rng(0), 0.5, num_finished=2)
    with pytest.raises(AnalysisError, match="2 runs are finished"):
        endings(table)
