"""Loss to accuracy: known links, Gadre's percentages, OpenCLIP's edge, the OLMo ladder."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit, laws
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import link

BOARD = Path(__file__).parents[2] / "board"
EXPONENTIAL = laws.Law(
    name="exponential",
    formula="accuracy = 1 - eps + k exp(-gamma L)",
    variables=("L",),
    linear=(laws.coefficient("floor"), laws.coefficient("k")),
    nonlinear=(laws.exponent("gamma", 0.01, 100.0),),
    basis=lambda x, t: (1.0, np.exp(-t["gamma"] * x["L"])),
    report=lambda p: {"eps": 1 - p["floor"], "k": p["k"], "gamma": p["gamma"]},
)
"""Gadre et al. 2024, there as error = eps - k exp(-gamma L); the floor is 1 - eps."""


@pytest.fixture
def scores() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    loss = rng.uniform(0.2, 0.6, 80)
    accuracy = 0.1 + 0.8 / (1 + np.exp(25 * (loss - 0.35))) + 0.01 * rng.standard_normal(80)
    return pd.DataFrame({"val_loss": loss, "top1": accuracy.clip(0, 1), "run_id": [f"r{i // 4}" for i in range(80)]})


@pytest.mark.parametrize("scale", [100, np.array([100, 1] * 40)])
def test_percents_are_refused(scores, scale):
    with pytest.raises(AnalysisError, match="top1"):
        link(scores.assign(top1=scores["top1"] * scale))


def test_gadres_fits_and_four_percentages():
    df = pd.read_csv(BOARD / "gadre-rpj-c4.csv", comment="#")
    multiple = (df["D"] / (20 * df["N"])).round(4)
    sizes = ["d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8"]
    five = df[(df["size"].isin(sizes) & (multiple == 1)) | ((df["size"] == sizes[0]) & (multiple == 16))]
    six = pd.concat([five, df[(df["size"] == "open_lm_1b") & (multiple == 1)]])
    law = fit(five, laws.OVERTRAINED, y="loss", objective="lsq")
    columns, acc = {"L": "loss"}, six.assign(acc=1 - six["err_avg17"])
    to_error = fit(acc, EXPONENTIAL, y="acc", columns=columns, objective="lsq")
    assert round(law.params["E"], 4) == 1.8366
    assert round(-2 * law.params["h"], 5) == -0.27285
    assert [round(to_error.params[k], 4) for k in ("eps", "k", "gamma")] == [0.8570, 2.2065, 0.7146]
    published = {("open_lm_1b", 32): (0.7103, 3.6365), ("open_lm_7b", 1): (0.7320, 0.0464)}
    for (size, times), (loss_error, error_error) in published.items():
        row = df[(df["size"] == size) & (multiple == times)]
        loss = law.predict(row)["value"].iloc[0]
        error = 1 - to_error.predict({"L": [loss]})["value"].iloc[0]
        assert round(100 * abs(loss / row["loss"].iloc[0] - 1), 4) == loss_error
        assert round(100 * abs(error / row["err_avg17"].iloc[0] - 1), 4) == error_error


def test_the_ideal_point_guides_a_short_ladder_and_is_no_measurement():
    """Sixteen losses leave the ceiling open: at half of the lowest one forecasts err ten times as much."""
    rng, misses, widths = np.random.default_rng(0), [], []
    truth = lambda loss: 0.25 + 0.757 / (1 + np.exp(4 * (loss - 1.15)))  # noqa: E731
    for _ in range(10):
        loss = np.linspace(0.8, 1.4, 16)
        df = pd.DataFrame({"loss": loss, "acc": truth(loss) + 0.01 * rng.standard_normal(16), "run_id": range(16)})
        df["params_total"] = np.repeat([1e8, 2e8, 4e8, 8e8], 4)
        found = [link(df, loss="loss", accuracy="acc", chance=0.25, ideal=i) for i in (None, 0.0)]
        rows = [each.predict({"L": [0.4]}).iloc[0] for each in found]
        misses.append([abs(row["value"] - truth(0.4)) for row in rows])
        widths.append([row["ci_hi"] - row["ci_lo"] for row in rows])
        assert (found[1].num_points, found[1].ranges["L"], len(found[1].data)) == (16, (0.8, 1.4), 16)
        assert found[1].estimate.groups.counts == {"sizes": 5}  # the ideal point is a cluster of its own
        assert rows[1]["beyond_range"] == pytest.approx(2)
    assert np.mean(misses, axis=0)[1] < 0.4 * np.mean(misses, axis=0)[0]
    assert np.median(widths, axis=0)[1] < 0.9 * np.median(widths, axis=0)[0]
    with pytest.raises(AnalysisError, match=r"0\.8"):
        link(df, loss="loss", accuracy="acc", ideal=0.8)


def test_floor_and_ideal_point_halve_the_error_at_the_ladders_target():
    """From 16 models of up to 1.3B to the 13B model's accuracies at its own losses: 9.3 % as fitted freely."""
    chances = {"hellaswag": 0.25, "piqa": 0.5, "arc_easy": 0.25, "arc_challenge": 0.25, "csqa": 0.2}
    chances |= {"socialiqa": 1 / 3, "openbookqa": 0.25}
    targets = pd.read_csv(BOARD / "targets" / "olmo-13b-5t.csv", comment="#").set_index("task")
    misses: dict[str, list[float]] = {"free": [], "anchored": []}
    for task, chance in chances.items():
        small = pd.read_csv(BOARD / f"olmo-{task.replace('_', '-')}.csv", comment="#")
        for name, anchors in (("free", {}), ("anchored", {"chance": chance, "ideal": 0.0})):
            found = link(small, loss="loss", accuracy="accuracy", **anchors)
            value = found.predict({"L": [targets["loss"][task]]})["value"].iloc[0]
            misses[name].append(abs(value / targets["accuracy"][task] - 1))
    assert np.mean(misses["anchored"]) < 0.05 < 0.09 < np.mean(misses["free"])


@pytest.mark.parametrize("chance", [None, 0.1])
def test_an_accuracy_of_exactly_one_is_fitted_as_any_other(chance):
    loss, at = np.linspace(0.2, 1.5, 20), np.array([0.01, 0.2, 0.6, 1.5, 3.0])
    curve = {"floor": 0.1, "height": 0.9, "k": 12.0, "L0": 0.6}
    accuracy = laws.LINK_SIGMOID.value({"L": loss}, curve) + 0.01 * np.random.default_rng(0).standard_normal(20)
    df = pd.DataFrame({"val_loss": loss, "top1": accuracy.clip(0, 1)})
    df.loc[:1, "top1"] = 1.0
    found = link(df, chance=chance)
    assert found.num_points == 20
    rows = found.predict({"L": at})
    assert rows["value"].to_numpy() == pytest.approx(laws.LINK_SIGMOID.value({"L": at}, curve), abs=0.02)
    ends = rows[["value", "ci_lo", "ci_hi", "pi_lo", "pi_hi"]].to_numpy()
    assert 0 <= ends.min() <= ends.max() <= 1
    assert rows[["value", "ci_lo"]].to_numpy().min() >= (chance or 0)


@pytest.mark.parametrize("bounds", [{"k": (200.0, 260.0), "L0": (0.4, 0.45)}, {"k": (900.0, 1e3), "L0": (1.1, 1.2)}])
@pytest.mark.filterwarnings("error")
def test_where_an_optimum_lies_in_a_flat_place_says_nothing(bounds):
    # All losses lie far from the step. What moves the law by a rounding error there, or not at all, is no direction.
    loss, noise = np.linspace(0.2, 0.3, 24), np.random.default_rng(0).normal(0, 0.01, 24)
    rows = pd.DataFrame({"val_loss": loss, "top1": 0.6 + noise, "size": np.repeat([*"abcdef"], 4)})
    options = {"y": "top1", "objective": "lsq", "columns": {"L": "val_loss"}, "fixed": {"floor": 0.1}}
    fitted = fit(rows, laws.LINK_SIGMOID, bounds=bounds, **options)
    assert fitted.not_identified == {"k", "L0"}
    elsewhere = fit(rows, laws.LINK_SIGMOID, bounds={"k": (5e3, 6e3), "L0": (8.0, 9.0)}, **options)
    ceiling = fitted.intervals["ceiling"]
    other = elsewhere.intervals["ceiling"]
    assert (ceiling.low, ceiling.high) == pytest.approx((other.low, other.high), rel=1e-9)
    assert 0.58 < ceiling.low < fitted.params["ceiling"] < ceiling.high < 0.62
    assert fitted.predict({"L": [0.25]})["ci_lo"].item() == pytest.approx(ceiling.low)
    assert not np.isfinite(fitted.predict({"L": [fitted.params["L0"]]})["ci_lo"]).any()
