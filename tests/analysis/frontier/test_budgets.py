"""Which tables are planned by budgets of compute, and which budget an exponent hangs on."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from aimscale.analysis import laws
from aimscale.analysis.frontier.budgets import isoflop_budgets
from aimscale.analysis.frontier.measured import isoflop_frontier, without_budgets
from aimscale.analysis.frontier.optimum import Cost, optimum_of
from aimscale.sweeps.cli.main import verb

BOARD = Path(__file__).parents[2] / "board"
TRUTH = {"E": 1.7, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.36}
COST = Cost(kappa=6.0, s=0.0)


def isoflop_table(flops: np.ndarray, shift: np.ndarray) -> pd.DataFrame:
    """Seven sizes about the optimum of each budget; `shift` moves ln N* of each from the law's own."""
    log_k, a = (float(v) for v in optimum_of({k: np.array(v) for k, v in TRUTH.items()}, COST))
    rng, parts = np.random.default_rng(0), []
    for c, moved in zip(flops, shift, strict=True):
        n = np.exp(log_k + a * np.log(c)) * np.geomspace(1 / 4, 4, 7)
        loss = laws.CHINCHILLA.value({"N": n, "D": COST.samples(c, n)}, TRUTH) * np.exp(5e-4 * rng.standard_normal(7))
        jitter = n * np.exp(moved + 0.01 * rng.standard_normal(7))  # sizes are never exactly on the budget
        parts.append(pd.DataFrame({"N": n * np.exp(moved), "D": COST.samples(c, jitter), "val_loss": loss}))
    return pd.concat(parts, ignore_index=True).assign(C=lambda df: 6 * df["N"] * df["D"])


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


def test_the_largest_budget_is_held_out_whole_though_its_runs_differ_a_little_in_compute(tmp_path):
    df = isoflop_table(np.geomspace(1e18, 1e21, 6), np.zeros(6))
    df.to_csv(tmp_path / "runs.csv", index=False)
    args = [str(tmp_path / "runs.csv"), "--columns", "L=val_loss", "--hold-out", "C", "--resamples", "50", "--json"]
    out = CliRunner().invoke(verb("fit"), args, catch_exceptions=False)
    [test] = json.loads(out.output)["heldout"]
    assert (test["variable"], test["num_train"], test["num_test"]) == ("C", 35, 7)


def test_the_exponent_without_some_budgets():
    df = pd.read_csv(BOARD / "llama3-isoflop.csv", comment="#")
    found = isoflop_frontier(df, y="loss", resamples=200)
    assert found.exponent == pytest.approx(0.463, abs=0.001)
    without = found.left_out.drop_duplicates("which", keep="last").set_index("which")["exponent"]
    assert without["largest two"] == pytest.approx(0.501, abs=0.001)
    ones = found.left_out[found.left_out["which"] == "one"]
    most = ones.loc[(ones["exponent"] - found.exponent).abs().idxmax()]
    assert most["budgets"] == pytest.approx([1e22])
    assert found.moves


def test_an_interval_holds_the_published_exponent_whatever_the_law():
    """Chinchilla's law misses Porian's tuned runs by 7 %: its optimum is not theirs."""
    df = pd.read_csv(BOARD / "porian-rw-5-tuned.csv", comment="#")
    ends = isoflop_frontier(df, y="loss", resamples=300).exponent_interval
    assert ends.low < 0.4969 < ends.high
    assert ends.high - ends.low < 0.1


def test_two_bent_budgets_are_named_and_a_straight_frontier_is_not():
    flops, bend = np.geomspace(1e18, 1e21, 9), np.r_[np.zeros(7), -0.4, -0.8]
    bent = isoflop_frontier(isoflop_table(flops, bend), resamples=100)
    straight = isoflop_frontier(isoflop_table(flops, 0 * bend), resamples=100)
    truth = 0.36 / 0.70
    last = bent.left_out.set_index("which")["exponent"]["largest two"]
    assert abs(bent.exponent - truth) > 0.08
    assert last == pytest.approx(truth, abs=0.01)
    assert bent.moves
    assert f"{last:.3f} without the largest two" in bent.sentence()
    assert abs(straight.exponent - truth) < 0.01
    assert (straight.left_out["exponent"] - straight.exponent).abs().max() < 0.02
    assert without_budgets(bent.pairs.head(3)).empty
