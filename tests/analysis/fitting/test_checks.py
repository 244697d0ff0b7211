"""What a fit says about itself: parameters that are not known, and lack of fit."""

import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy.stats import f as fisher
from tables import law_grid

from aimscale.analysis import fit, laws
from aimscale.analysis.fitting.diagnostics import f_probability


def flags_of(df: pd.DataFrame, y: str = "val_loss") -> set[tuple[str, str]]:
    """(kind, subject) of every flag; those of lack of fit need no draws."""
    return {(flag.kind, flag.subject) for flag in fit(df, "chinchilla", y=y).flags}


def noisy_grid(rng: np.random.Generator, sizes: int = 6, budgets: int = 5) -> pd.DataFrame:
    rows = law_grid(sizes=(1e5, 1e7, sizes), budgets=(1e5, 3e6, budgets), noise=0.003, rng=rng).drop(columns="C")
    return rows.assign(size=[f"s{n:.0f}" for n in rows["N"]])


def test_what_the_data_do_not_pin_down_is_not_printed_as_digits(grid):
    grid["val_loss"] = 1 + 0.01 * np.random.default_rng(0).standard_normal(len(grid))
    result = fit(grid, laws.CHINCHILLA)
    assert {"alpha", "beta", "a"} <= result.not_identified
    assert result.shown("alpha") == "not identified"
    assert json.loads(result.to_json())["params"]["alpha"] is None


def test_one_flag_a_parameter_and_it_lies_beside_it(grid):
    rng = np.random.default_rng(0)
    flat = grid.assign(val_loss=0.3 * (1 + 1e-3 * rng.standard_normal(len(grid))))
    rising = grid.assign(val_loss=grid["params_total"] ** 0.2 + grid["images_seen"] ** 0.1)  # A and B are 0 throughout
    kinds = []
    for each in (flat, rising):
        result = fit(each, "chinchilla")
        about = [flag.subject for flag in result.flags if flag.subject in result.params]
        assert len(about) == len(set(about))
        bounded = {flag.subject for flag in result.flags if flag.kind == "from_above"} - result.not_identified
        assert all(result.shown(name).startswith("at most ") for name in bounded)
        kinds += [flag.kind for flag in result.flags]
    assert kinds.count("from_above") > 1


def test_variables_that_move_together_are_flagged(grid):
    rng = np.random.default_rng(0)
    grid["images_seen"] = 20 * grid["params_total"] * np.exp(0.01 * rng.standard_normal(len(grid)))
    result = fit(grid.drop(columns="flops_train"), laws.CHINCHILLA)
    assert ("one_variable", "N and D") in [(flag.kind, flag.subject) for flag in result.flags]
    assert {"alpha", "beta"} & result.not_identified


def test_the_f_test_is_fishers_for_independent_errors_and_holds_for_shared_ones():
    sizes = np.array([5, 14])
    assert f_probability(2.5, sizes, 0.3 * sizes, 0.09 * sizes) == pytest.approx(fisher.sf(2.5, 5, 14))
    rng, runs = np.random.default_rng(1), np.repeat(np.arange(6), 4)
    basis = np.linalg.qr(np.column_stack([np.vander(runs, 3), rng.standard_normal((24, 21))]))[0]
    above, below = basis[:, 1:3], basis[:, 3:]  # a trend over runs, and what is left: between runs and within
    covariance = 0.2 * np.eye(24) + (runs[:, None] == runs)
    parts = [each.T @ covariance @ each for each in (above, below)]
    forms = np.array([2, 21]), np.array([np.trace(p) for p in parts]), np.array([np.sum(p**2) for p in parts])
    errors = np.linalg.cholesky(covariance) @ rng.standard_normal((24, 4000))
    ratios = np.mean((above.T @ errors) ** 2, axis=0) / np.mean((below.T @ errors) ** 2, axis=0)
    ours, plain = np.array([f_probability(f, *forms) for f in ratios]), fisher.sf(ratios, 2, 21)
    assert np.mean(ours < 0.1) == pytest.approx(0.1, rel=0.2)
    assert np.mean(ours < 0.01) <= 0.01 < 0.3 < np.mean(plain < 0.01)


def test_rows_that_differ_in_depth_are_no_replicates():
    """Heads whose losses differ by 2 % are no noise of seeds: a form that is 1 % off is seen beside two seeds only."""
    rng = np.random.default_rng(6)
    parts = [noisy_grid(rng).assign(head_depth=depth, seed=seed) for depth in (1, 2) for seed in (0, 1)]
    df = pd.concat(parts, ignore_index=True)
    df["run_id"] = df["size"] + df["seed"].astype(str) + df["head_depth"].astype(str)
    df["val_loss"] *= np.where(df["head_depth"] > 1, 1.02, 1.0)
    one = df[df["seed"] == 0].drop(columns="seed")
    assert not any(f.kind == "scatter" for f in fit(one, "chinchilla").flags)
    (flag,) = [f for f in fit(df, "chinchilla").flags if f.kind == "scatter"]
    assert flag.number == pytest.approx(1.0, abs=0.3)  # half of what the heads differ by
    assert flag.more[2] == len(df) / 2  # every cell of a head has two seeds


def test_replicate_seeds_tell_lack_of_fit_from_noise_of_runs():
    rng, said = np.random.default_rng(2), {"run": 0, "size": 0}
    for errors in said:
        for _ in range(8):
            df = pd.concat([noisy_grid(rng, 7).assign(seed=seed) for seed in range(3)], ignore_index=True)
            df["run_id"] = df["size"] + "s" + df["seed"].astype(str)
            labels, codes = np.unique(df["run_id" if errors == "run" else "size"], return_inverse=True)
            df["val_loss"] *= np.exp(0.005 * rng.standard_normal(len(labels)))[codes]
            said[errors] += any(kind == "scatter" for kind, _ in flags_of(df))
    assert said["run"] <= 1  # seeds of a run share their error over budgets: the test knows
    assert said["size"] <= 1  # what intervals take for a size's error is no misfit (S24)


def test_one_size_or_budget_that_lies_off_is_a_misfit_of_its_variable_alone():
    """H4: the null of lack of fit held errors of sizes and budgets that were estimated from the same residuals."""
    rng, told = np.random.default_rng(5), {"N": [], "D": [], "": []}
    for v in told:
        for _ in range(6):
            df = law_grid(sizes=(1e5, 1e7, 7), budgets=(1e5, 3e6, 5), noise=0.003, rng=rng)
            if v:
                df.loc[df[v] == (df[v].median() if v == "N" else df[v].min()), "val_loss"] *= 1.01 if v == "N" else 1.02
            told[v].append({test.subject: test for test in fit(df, "chinchilla").misfits})
    for v, other in (("N", "D"), ("D", "N")):
        assert np.median([tests[v].p for tests in told[v]]) < 0.01
        assert np.median([tests[other].p for tests in told[v]]) > 0.01
        assert np.median([tests[v].off for tests in told[v]]) > 0.1
    assert min(test.p for tests in told[""] for test in tests.values()) > 0.001
    assert np.median([tests["N"].noise for tests in told[""]]) == pytest.approx(0.3, rel=0.2)


def test_without_replicates_a_wrong_form_shows_in_its_residuals():
    rng = np.random.default_rng(3)
    df = noisy_grid(rng)
    df["val_loss"] = 1.0 * (df["N"] / 1e5) ** -0.2 * (df["D"] / 1e5) ** -0.3 * np.exp(0.003 * rng.standard_normal(30))
    assert ("pattern", "ln N x ln D") in flags_of(df)
    df["val_loss"] = noisy_grid(rng)["val_loss"]
    assert not any(kind == "pattern" for kind, _ in flags_of(df))


def test_experiments_in_a_large_table_are_told_apart_in_little_memory():
    """Two set-ups passed for one green law; then the test of 10,000 rows took a minute and three gigabytes."""
    rng = np.random.default_rng(8)
    df = pd.concat([noisy_grid(rng, 40, 50).assign(setting=word) for word in ("old", "new")], ignore_index=True)
    tracemalloc.start()
    assert "experiments" not in {kind for kind, _ in flags_of(df)}
    df.loc[df["setting"] == "new", "val_loss"] *= 1.005
    assert ("experiments", "setting") in flags_of(df.sample(frac=1, random_state=0))
    assert tracemalloc.get_traced_memory()[1] < 3e8
    tracemalloc.stop()


def test_columns_that_may_tell_experiments_apart_share_the_chance_of_a_false_alarm():
    """Of ten columns of random words one lies apart at p = .01 in a tenth of tables."""
    rng = np.random.default_rng(8)
    df = pd.concat([noisy_grid(rng).assign(setting=word) for word in ("old", "new")], ignore_index=True)
    df.loc[df["setting"] == "new", "val_loss"] *= 1.003
    (flag,) = [f for f in fit(df, "chinchilla").flags if f.kind == "experiments"]
    assert 0.001 < flag.p < 0.01
    words = {f"word{i}": rng.choice(["a", "b"], len(df)) for i in range(9)}
    assert "experiments" not in {kind for kind, _ in flags_of(df.assign(**words))}


def test_a_derived_exponent_is_known_by_its_own_interval():
    """S16, S22: the exponent of N* does not depend on the outer exponent, which may be unknown."""
    found = fit(noisy_grid(np.random.default_rng(9), 5, 4), "coupled", bounds={"c": (0.99, 1.01)})
    assert "c" in found.not_identified
    assert "a" not in found.not_identified
    assert 0 < found.intervals["a"].high - found.intervals["a"].low < 0.5
