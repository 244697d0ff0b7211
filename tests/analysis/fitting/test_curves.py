"""Learning curves: the default extrapolates better than M4 as released."""

from functools import cache

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit

INET_10_M4 = (0.0306, 0.0186, 0.0232, 0.0040, 0.0144, 0.0072)
"""log-RMSE on the held-out x of M4 by the released code (Alabdulmohsin et al. 2022), six models on inet_10."""
M4_NMT, M4_LM = 0.0208, 0.00094
M4_VISION_36 = 0.02362
"""Mean of M4 as released over the 36 vision curves of the file; 0.0415 over all 72."""


def score(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Root mean square error of the logarithm, the benchmark's score."""
    return float(np.sqrt(np.mean(np.log(np.asarray(predicted) / np.asarray(measured)) ** 2)))


@pytest.fixture
def curves(measurements):
    @cache
    def read(name: str) -> list[tuple[str, str, pd.DataFrame, pd.DataFrame]]:
        df = measurements(f"revisiting_neural_scaling_laws/{name}.csv")
        df.columns = pd.Index(["domain", "task", "model", "x", "y", "train"])
        out = []
        for (domain, task, model), group in df.groupby(["domain", "task", "model"]):
            group = group.drop_duplicates("x", keep="last").sort_values("x")
            key = task if domain == "IC" else domain
            out.append((key, model, group[group["train"] == 1], group[group["train"] == 0]))
        return out

    return read


def ours(train: pd.DataFrame, test: pd.DataFrame) -> float:
    """The mean on the logarithm of the power law with offset and M4, the end of the curve counting most."""
    options = {"y": "y", "objective": "log_lsq", "weights": (train["x"] / train["x"].max()).to_numpy() ** 1.5}
    fits = [fit(law, train, resamples=0, **options) for law in ("power_offset:x", "sigmoidal:x")]
    logs = [np.log(each.predict(test)["value"].to_numpy()) for each in fits]
    return score(np.exp(np.mean(logs, axis=0)), test["y"])


def test_the_default_beats_m4_on_language(curves):
    scores = {"NMT": [], "LM": []}
    for key, _, train, test in curves("language"):
        if key in scores:
            scores[key].append(ours(train, test))
    assert np.mean(scores["NMT"]) < M4_NMT
    assert np.mean(scores["LM"]) < M4_LM


def test_the_default_beats_m4_on_vision(curves):
    scores = {(key, model): ours(train, test) for key, model, train, test in curves("vision_inet_c")}
    assert len(scores) == 36
    assert np.mean(list(scores.values())) < M4_VISION_36
    assert np.mean([v for (key, _), v in scores.items() if key == "inet_10"]) < np.mean(INET_10_M4)
