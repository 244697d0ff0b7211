"""Trajectories: levels of a schedule without a law, a ratio that follows one, and intervals that hold."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import AnalysisError, trajectory
from aimscale.analysis.plots.style import INK, ShownFigure

SIZES, AT = (20e3, 45e3, 100e3, 220e3), np.arange(1, 31) * 2048


def runs(sizes, seeds, rng, *, own=0.004, point=0.004):
    """Losses of runs with a plateau, a decay at each of two budgets, and errors of runs and of single points."""
    rows = []
    for n in sizes:
        for seed in range(seeds):
            level, run = 20 * n**-0.55 * (AT / AT[-1]) ** 0.1, own * rng.standard_normal()
            plateau = 0.2 / (1 + np.exp((AT - 20_000) / 3000))
            loss = 0.4 + level + plateau + 8 * AT**-0.5
            during = loss * np.exp(run + point * rng.standard_normal(len(AT)))
            shared = {"run_id": f"{n}-{seed}", "params_total": n}
            rows += [
                shared | {"images_seen": at, "is_budget": False, "val_loss": each}
                for at, each in zip(AT, during, strict=True)
            ]
            for budget in (AT[14], AT[29]):
                decayed = 0.97 * loss[budget == AT][0] * np.exp(run + point * rng.standard_normal())
                rows.append(shared | {"images_seen": budget, "is_budget": True, "val_loss": decayed})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("seeds", "times"), [(1, 3.0), (3, 3.0), (3, 10.0)])
def test_intervals_hold_one_run_beyond_the_largest(seeds, times):
    rng, inside, ends = np.random.default_rng(0), [], []
    for _ in range(25):
        found = trajectory(runs(SIZES, seeds, rng), times * SIZES[-1])
        new = runs((times * SIZES[-1],), 1, rng)
        both = new.merge(found.table, on=["images_seen", "is_budget"])
        inside.append(both["val_loss"].between(both["low"], both["high"]).mean())
        ends.append(float((both["high"] / both["low"]).median()))
    assert 0.93 <= np.mean(inside) <= 1.0
    assert np.median(ends) < 1.12, "and they are no wider than needed"


def test_the_forecast_follows_what_sizes_share_and_budgets_agree_with_it():
    rng = np.random.default_rng(1)
    found = trajectory(runs(SIZES, 1, rng, own=0, point=0), 3 * SIZES[-1])
    truth = runs((3 * SIZES[-1],), 1, rng, own=0, point=0).merge(found.table, on=["images_seen", "is_budget"])
    off = np.log(truth["val_loss"] / truth["loss"])
    assert off.abs().max() < 0.012, "plateau, decays and all"
    assert found.sizes == pytest.approx(SIZES)
    assert (found.num_runs, found.exponent > 0.3) == (4, True)


def test_intervals_grow_with_distance_and_runs_of_the_same_size_come_first():
    rng = np.random.default_rng(2)
    rows = runs(SIZES, 2, rng)
    widths = [trajectory(rows, times * SIZES[-1]).table["sd"].median() for times in (1, 3, 10)]
    assert widths[0] < widths[1] < widths[2]
    assert "times" not in trajectory(rows, SIZES[-1]).basis
    alone = trajectory(rows[rows["params_total"] == SIZES[0]], SIZES[0])
    assert alone.table["loss"].notna().all()
    smaller = trajectory(rows, SIZES[1])
    assert smaller.sizes == pytest.approx(SIZES[:2]), "larger runs are left out"


def test_a_spike_of_one_run_moves_nothing():
    rng = np.random.default_rng(3)
    rows = runs(SIZES, 1, rng)
    hit = rows["run_id"].eq(rows["run_id"].iloc[-1]) & rows["images_seen"].eq(AT[24]) & ~rows["is_budget"]
    spiked = rows.assign(val_loss=rows["val_loss"].where(~hit, 1.2 * rows["val_loss"]))
    before, after = (trajectory(each, 3 * SIZES[-1]).table for each in (rows, spiked))
    assert np.abs(np.log(after["loss"] / before["loss"])).max() < 0.02
    assert after["sd"].median() < 1.5 * before["sd"].median()


def test_too_little_is_refused_and_the_result_draws_itself():
    rows = runs(SIZES, 1, np.random.default_rng(4))
    with pytest.raises(AnalysisError, match="No two smaller sizes have finished"):
        trajectory(rows[rows["params_total"] == SIZES[0]], SIZES[-1])
    with pytest.raises(AnalysisError, match="No two smaller sizes have finished"):
        trajectory(rows, SIZES[0] / 2)
    with pytest.raises(AnalysisError, match="too few points to tell how runs scatter"):
        trajectory(rows[rows["params_total"] == SIZES[0]], SIZES[0])
    with pytest.raises(AnalysisError, match="too few points to tell how runs scatter"):
        trajectory(rows[rows["is_budget"] & rows["params_total"].isin(SIZES[:2])], SIZES[-1])
    found = trajectory(rows[rows["params_total"] < SIZES[-1]], SIZES[-1])
    measured = rows[rows["params_total"] == SIZES[-1]]
    figure = found.plot(measured=measured)
    assert isinstance(figure, ShownFigure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["forecast, 95 % of one run"]
    drawn = [line for line in figure.axes[0].lines if line.get_linestyle() == "None" and line.get_color() == INK]
    assert sum(len(line.get_xdata()) for line in drawn) == len(measured)
    assert "3 finished runs of 3 sizes" in found.headline()
