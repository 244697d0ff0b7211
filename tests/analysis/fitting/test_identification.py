"""What a grid can identify at all, and what intervals of small tables are worth."""

import numpy as np
import pandas as pd
import pytest
from tables import KNOWN, law_grid

from aimscale.analysis import fit, laws
from aimscale.analysis.fitting.diagnostics import unidentified
from aimscale.analysis.laws import Columns

OF_N, OF_D = {"E", "A", "alpha", "a", "b"}, {"E", "B", "beta", "a", "b"}


def table(sizes: int, budgets: int, seeds: int, rng: np.random.Generator, noise: float = 0.003) -> pd.DataFrame:
    """A grid of a known law, every run with all budgets."""
    once = law_grid(sizes=(1e5, 1e7, sizes), budgets=(1e5, 3e6, budgets))
    df = pd.concat([once.assign(seed=seed) for seed in range(seeds)], ignore_index=True)
    df["run_id"] = df["N"].map("{:.3g}s".format) + df["seed"].astype(str)
    return df.assign(val_loss=df["val_loss"] * np.exp(noise * rng.standard_normal(len(df))))


@pytest.mark.parametrize(
    ("law", "design", "held", "lost"),
    [
        ("chinchilla", (3, 2), (), OF_D),
        ("chinchilla", (5, 2), (), OF_D),
        ("chinchilla", (2, 4), (), OF_N),
        ("chinchilla", (2, 2), (), OF_N | OF_D),
        ("chinchilla", (3, 3), (), set()),
        ("chinchilla", (5, 2), ("E",), set()),  # two values identify where the floor is held
        ("chinchilla", (2, 4), ("E",), set()),
        ("chinchilla", (2, 2), ("E",), (OF_N | OF_D) - {"E"}),
        ("overtrained", (3, 2), (), set()),  # one exponent for both
        ("overtrained", (2, 2), (), {"E", "a", "b", "h"}),
        ("coupled", (5, 2), (), set()),  # what D does at one size differs from what it does at another
        ("kaplan", (3, 2), (), set()),
        ("power:D", (5, 2), (), set()),
        ("power_offset:D", (5, 2), (), {"E", "A", "a"}),
        ("power_offset:D", (5, 3), (), set()),
        ("repeated", (5, 4), (), {"R_D"}),  # nothing is repeated
    ],
)
def test_the_design_says_what_no_loss_could_identify(law, design, held, lost):
    df = table(*design, 1, np.random.default_rng(0))
    df["U"] = df["D"].max()
    found = laws.find_law(law)
    x = {v: df[v].to_numpy() for v in found.variables}
    found = found.centred(Columns(x))
    assert set(unidentified(found, x, held)) & set(found.reported(dict.fromkeys(found.names, 0.5))) == lost
    rng = np.random.default_rng(1)
    if "C" not in x:  # values within a few per cent are one value
        x = {v: values * rng.uniform(0.985, 1.015, len(values)) for v, values in x.items() if v != "U"} | (
            {"U": x["U"]} if "U" in x else {}
        )
        assert set(unidentified(found, x, held)) & set(found.reported(dict.fromkeys(found.names, 0.5))) == lost


@pytest.mark.parametrize(("design", "lost"), [((3, 2, 2), OF_D), ((2, 4, 1), OF_N), ((5, 4, 1), set())])
def test_exponents_of_two_values_are_never_digits(design, lost):
    """Whatever the order of the rows and the unit; a 5 x 4 table identifies both, and holds them."""
    df = table(*design, np.random.default_rng(1))
    mixed = df.sample(frac=1, random_state=3, ignore_index=True).assign(D=lambda d: d["D"] * 196)
    for each in (df, mixed):
        result = fit(each, "chinchilla")
        assert {"alpha", "beta", "a", "b"} & result.not_identified == lost & {"alpha", "beta", "a", "b"}
        assert not any(result.intervals[name].is_known for name in lost)
        told = [flag.subject.split(", ") for flag in result.flags if flag.kind == "few_values"]
        assert told == ([[name for name in result.params.index if name in lost]] if lost else [])
        for name in {"E", "alpha", "beta"} - lost:
            assert result.intervals[name].low < KNOWN[name] < result.intervals[name].high


def test_a_small_ladder_has_useful_intervals_about_its_estimate():
    """4 x 4 runs: no floor lies above the losses, and a forecast lies amid its interval, not at an end of it."""
    rng, place, width, low = np.random.default_rng(2), [], [], []
    for _ in range(12):
        df = table(4, 4, 1, rng, 0.004)
        result = fit(df, "chinchilla")
        low.append(result.intervals["E"].high / result.data["fitted"].min())
        row = result.predict({"N": np.array([3e7]), "D": np.array([1e7])}).iloc[0]
        place.append((row["value"] - row["ci_lo"]) / (row["ci_hi"] - row["ci_lo"]))
        width.append((row["ci_hi"] - row["ci_lo"]) / row["value"])
    assert max(low) < 1.01
    assert 0.4 < np.median(place) < 0.6
    assert min(place) > 0.15
    assert np.median(width) < 0.35
