"""Where the page forecasts, what it holds out and which law splits compute: on an iso-FLOP table with probes."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import laws
from aimscale.analysis.report.study import next_scales, study_tables
from aimscale.analysis.report.verdict import verdict

TRUE_LAW = laws.COUPLED.centred(laws.base.Columns({"N": np.array([1e6]), "D": np.array([2e7])}))
LOSS = {"E": 0.2, "K": 2.5, "alpha": 0.5, "beta": 0.45, "c": 0.6, "w": 1.1}
ERROR = {"E": 0.1, "A": 20.0, "B": 3.0, "alpha": 0.40, "beta": 0.30}


@pytest.fixture(scope="module")
def study():
    """Six sizes about 20 D per N at six budgets of compute; the loss follows the coupled law, a probe another."""
    flops, ratios = (a.ravel() for a in np.meshgrid(np.geomspace(1e12, 1e15, 6), np.geomspace(0.2, 5, 6)))
    n = np.sqrt(flops / 120) * ratios
    d = flops / 6 / n
    rng, at = np.random.default_rng(0), {"N": n, "D": d}
    loss = TRUE_LAW.value(at, LOSS)
    error = laws.CHINCHILLA.value(at, ERROR) * np.exp(1e-3 * rng.standard_normal(len(n)))
    probes = [[{"task": "pets", "kind": "linear", "top1": 1 - e, "chance": 0.03}] for e in error]
    frame = pd.DataFrame(
        {"params_total": n, "images_seen": d, "flops_train": flops * 1.01 ** rng.uniform(-1, 1, len(n))}
    )
    frame = frame.assign(val_loss=loss * np.exp(1e-3 * rng.standard_normal(len(n))), probes=probes)
    return study_tables([], frame, {})


def test_an_iso_flop_table_is_held_out_and_forecast_by_compute(study):
    top = study.budgets.max()
    assert top == pytest.approx(1e15, rel=0.01)
    [test] = study.get("law").heldout
    assert (test.variable, test.num_test) == ("C", 6)
    places = next_scales(study)
    np.testing.assert_allclose([6 * at["N"] * at["D"] for at in places], [2 * top, 10 * top], rtol=0.02)
    best = study.get("compute-optimal frontier").frontiers[-1].at(2 * top).iloc[0]
    assert places[0]["N"] == pytest.approx(best["N"])
    assert study.get("next runs").target["N"] == pytest.approx(best["N"])
    truth = TRUE_LAW.value({v: np.array([at[v] for at in places]) for v in ("N", "D")}, LOSS)
    found = study.get("forecast").table[study.get("forecast").table["quantity"] == "val_loss"]
    assert ((found["pi_lo"] < truth) & (truth < found["pi_hi"])).all()


def test_the_split_is_by_the_law_that_forecasts_and_names_the_best_size_for_features(study):
    assert study.get("compute-optimal frontier").frontiers[-1].law is study.get("law")
    assert study.get("law").law.name == study.get("forecaster").law.name == "coupled"
    gap = study.get("best size by", "pets:linear")
    assert gap.ratio_interval.low < gap.ratio < gap.ratio_interval.high
    by_question = {line.question: line.answer for line in verdict(study)}
    assert "by approach 3 on the coupled law" in by_question["Best split"]
    assert "better than the chinchilla law" in by_question["The law"]
    assert f"{gap.ratio:.2g} {gap.ratio_interval.words('.2g')} times as large" in by_question["Best split"]
    assert study.get("forecast").table["distance"].max() == pytest.approx(10, rel=0.05)


def test_a_grid_is_held_out_by_its_sides(grid):
    study = study_tables([], grid, {})
    assert study.budgets is None
    assert [test.variable for test in study.get("law").heldout] == ["N", "D"]
    top = grid[["params_total", "images_seen"]].max()
    assert [at["N"] / top["params_total"] for at in next_scales(study)] == pytest.approx([2.0, 10.0])
    assert [at["D"] / top["images_seen"] for at in next_scales(study)] == pytest.approx([2.0, 10.0])
