"""`aimscale fit`, `frontier` and `correlate` on a results table, as a user runs them."""

import json
import shlex

import numpy as np
import pandas as pd
import pytest
from commands import answer, say

from aimscale import analysis
from aimscale.analysis.display import Flag, fact_lines, text_table
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws import LAWS


@pytest.fixture
def table(grid, tmp_path):
    probe = np.clip(0.9 - grid["val_loss"], 0.1, 0.9)
    grid["probes"] = [
        json.dumps([{"task": "digits", "kind": "linear", "top1": float(p), "chance": 0.1, "n": 1000}]) for p in probe
    ]
    grid["params_trunk"] = 0.6 * grid["params_total"]
    path = tmp_path / "results.csv"
    grid.to_csv(path, index=False)
    return path


def test_laws_of_one_variable_are_chosen_among_too_and_parameters_held_for_none_of_several(table):
    one = answer("fit", table, "--law", "auto:C", "--where", "envelope")
    assert list(one["columns"]) == ["C", "y"]
    with pytest.raises(AnalysisError, match="--fix"):
        say("fit", table, "--law", "auto", "--fix", "E=0")


@pytest.mark.parametrize("words", [("--fix", "alpha=0:1:2"), ("--fix", "alpha=a:b"), ("--fix", "E")])
def test_values_of_another_form_are_refused_with_an_example(table, words):
    with pytest.raises(AnalysisError, match=f"{words[0]} takes numbers such as"):
        say("fit", table, *words)


def test_a_parameter_is_held_or_kept_between_two_values(table):
    found = answer("fit", table, "--fix", "E=0", "--fix", "alpha=0.1:0.15")
    assert found["params"]["E"] == 0
    assert (found["fixed"], found["bounds"]) == ({"E": 0}, {"alpha": [0.1, 0.15]})


def test_sizes_and_budgets_are_counted_and_a_user_says_otherwise(table):
    told = say("fit", table, "--groups", "budgets=images_seen", "--groups", "sizes=0.9")
    assert "30 of 30: 6 sizes, 5 budgets" in told
    assert "--groups budgets=images_seen --groups sizes=0.9" in told.splitlines()[-1]
    with pytest.raises(AnalysisError, match="groups takes sizes or budgets"):
        say("fit", table, "--groups", "budget=tokens")


def test_a_law_of_compute_is_taken_from_a_table_that_counts_none(table):
    """Over-trained's variables are C and D / N; C is 6 N D where no column says it."""
    pd.read_csv(table).drop(columns=["flops_train", "flops_6nd"], errors="ignore").to_csv(table, index=False)
    out = answer("fit", table, "--law", "overtrained,kaplan")
    assert out["law"] == "overtrained"
    assert out["columns"]["C"] == "C"


def test_a_law_is_chosen_and_tested(chinchilla, tmp_path):
    chinchilla.to_csv(tmp_path / "chinchilla.csv", index=False)
    out = answer("fit", tmp_path / "chinchilla.csv", "--columns", "L=loss", "--law", "auto", "--hold-out", "C:19")
    assert out["law"] == out["laws"][0]["curve"]
    assert {law["curve"] for law in out["laws"]} == {"overtrained", "chinchilla", "kaplan", "coupled"}
    assert out["num_points"] == 234
    assert out["heldout"][0]["mean_abs_relative_error"] < 0.02


def test_a_probes_error_takes_the_place_of_the_loss(table):
    fitted = answer("fit", table, "--y", "digits:linear")
    assert fitted["params"]["E"] == pytest.approx(0.3, abs=0.02)  # 1 - (0.9 - loss), so 0.1 above the loss's floor
    out = answer("frontier", table, "--y", "digits:linear", "--law", "coupled,chinchilla")
    assert out["measure"] == "linear-probe error on digits"
    by_loss = answer("frontier", table)["optima"][-1]
    assert out["optima"][-1]["N"] == pytest.approx(by_loss["N"], rel=0.1)  # the error is the loss and a constant


def test_laws_of_compute_are_fitted_to_the_envelope(table):
    out = answer("fit", table, "--law", "power_offset:C", "--where", "envelope")
    assert 5 < out["num_points"] < 30
    law = answer("fit", table, "--law", "power_offset:N")
    assert ("mixed", "images_seen", 5) in [(flag["kind"], flag["subject"], flag["number"]) for flag in law["flags"]]


def test_a_fit_is_keys_and_a_table_and_says_what_to_run_next_in_the_users_words(table):
    """Left-out errors, then flags, one line each; no line of prose; the next command has the same table and names."""
    named = ["--columns", "N=params_trunk", "--where", "D>=1"]
    above, below = say("fit", table, *named, "--fix", "E=0.2", "--hold-out", "D").split("\n\n")
    *below, tuning, last = below.splitlines()
    assert tuning == "tuning: learning rates were not swept, so tuning cannot be checked"
    keys = [line.split("  ")[0] for line in above.splitlines()]
    assert keys[: 1 + keys.count("caution")] == ["held out D", *["caution"] * keys.count("caution")]
    told = ["held out D", *["lack of fit"] * 3, "law", "rows", "range N", "range D", "objective", "intervals"]
    assert [key for key in keys if key not in ("caution", "columns")] == told
    assert [line.split()[0] for line in below] == ["parameter", "E", "A", "B", "alpha", "beta", "a", "b"]
    same = f"{table} --columns N=params_trunk --where 'D>=1'"
    assert last == f"next: aimscale frontier {same}; aimscale report {same}"
    last = say("fit", table, *named, "--level", "0.9").splitlines()[-1]
    assert last == f"next: aimscale frontier {same} --level 0.9; aimscale report {same}"
    pd.read_csv(table).drop(columns=["flops_train", "flops_6nd"], errors="ignore").to_csv(table, index=False)
    assert "frontier" not in say("fit", table), "its compute would be an estimate"
    assert "so C is 6 N D" in say("frontier", table)
    with pytest.raises(AnalysisError, match=f"{table}\\?"):
        say("fit", table.with_name("result.csv"))


def test_the_next_line_keeps_the_law_and_runs_as_printed(table):
    def following(*words):
        return shlex.split(say(*words).splitlines()[-1])[2:]

    of_law, place = [str(table), "--law", "coupled"], "N=1e8, D=1e8"
    proposal = following("forecast", *of_law, "--at", place)
    assert proposal == ["next", str(table), "--target", place, "--law", "coupled"]
    assert following(*proposal) == ["forecast", str(table), "--register", "--at", place, "--law", "coupled"]
    assert following("forecast", *of_law, "--at", "N=1e6,D=1e6")[0] == "report", (
        "inside the table nothing is left to buy"
    )
    assert following("forecast", table, "--law", "auto:C", "--at", "C=1e20")[0] == "report", "`next` needs N and D"
    assert following("fit", *of_law)[:4] == ["frontier", str(table), "--law", "coupled;"]
    assert "--law coupled; aimscale report" in say("frontier", *of_law)


def test_python_takes_a_loss_by_the_name_in_the_file(table, tmp_path):
    theirs = pd.read_csv(table).rename(columns={"val_loss": "bpb"})
    theirs.to_csv(tmp_path / "theirs.csv", index=False)
    df = analysis.read_table(tmp_path / "theirs.csv", {"L": "bpb"})
    assert analysis.fit(df, y="bpb").params.equals(analysis.fit(df).params)
    at = {"N": 1e6, "D": 1e6}
    pd.testing.assert_frame_equal(analysis.forecast(df, at, y="bpb").table, analysis.forecast(df, at).table)
    pd.testing.assert_frame_equal(analysis.frontier(df, y="L").at(1e14), analysis.frontier(df).at(1e14))


def test_a_narrow_terminal_breaks_no_key_from_its_value(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    words = fact_lines([("caution", "six words that go on below " * 4), ("rows", "20 of 20")]).splitlines()
    assert [line[:9].strip() for line in words] == ["caution", "", "", "rows"]
    assert max(map(len, words)) <= 60


@pytest.mark.parametrize("width", [40, None])
def test_a_table_too_wide_goes_on_in_a_block_below_beside_what_tells_its_rows_apart(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width or 0))
    rows = [{"task": "digits", "kind": kind, **{f"share of {i}": f"0.{i:02}" for i in range(20)}} for kind in "ab"]
    blocks = [block.splitlines() for block in text_table(rows).split("\n\n")]
    assert max(len(line) for block in blocks for line in block) <= (width or 120)
    assert len(blocks) == (10 if width else 3)
    assert all(
        [line.split()[:2] for line in block] == [["task", "kind"], ["digits", "a"], ["digits", "b"]] for block in blocks
    )
    assert [word for block in blocks for word in block[2].split()[2:]] == [f"0.{i:02}" for i in range(20)]


def test_approaches_that_disagree_are_a_flag_and_lead_to_no_forecast(table, monkeypatch):
    """The next line took approach 3's size, 126M where approach 2 had 1.7B, and `flags` was empty."""
    assert "aimscale forecast" in say("frontier", table)
    disputed = (Flag(kind="apart", text="Approaches 2 and 3 are apart."),)
    monkeypatch.setattr("aimscale.analysis.optimum.approaches.apart_flags", lambda _: disputed)
    assert str(disputed[0]) in answer("frontier", table)["flags"]
    assert say("frontier", table).splitlines()[-1] == f"next: aimscale report {table}"


@pytest.fixture
def tuned_table(known_study, tmp_path):
    """Three rates of a law at every cell of a grid over one pool, seen four times at most."""
    frames = [
        known_study({"seeds": [0], "uniques": [16000], "lr_multiplier": rate, "effect": worse})
        for rate, worse in ((0.5, 0.02), (1.0, 0.0), (2.0, 0.01))
    ]
    path = tmp_path / "tuned.csv"
    pd.concat(frames, ignore_index=True).assign(lr_peak=lambda d: 1e-3 * d["lr_multiplier"]).to_csv(path, index=False)
    return path


def test_forecast_and_frontier_say_what_was_tuned_and_how_often_data_repeat(tuned_table):
    found = answer("forecast", tuned_table, "--at", "N=1e7,D=1e5", "--at", "N=1e7,D=6e4", "--law", "chinchilla")
    assert "of its loss" in found["tuning"]
    assert not any(flag["kind"] == "tuned" for flag in found["flags"])  # losses are corrected, none is merely chosen
    assert [flag["number"] for flag in found["flags"] if flag["kind"] == "passes"] == [pytest.approx(6.25)]
    said = answer("frontier", tuned_table, "--at", "1e16")["flags"]
    assert any("passes over the pool of 16k, beyond the 4 that were seen" in each for each in said)
    assert not any("passes" in each for each in answer("frontier", tuned_table, "--at", "1e12")["flags"])
    by_rate = answer("contrast", tuned_table, "--by", "lr_multiplier")
    assert {each["num_pairs"] for each in by_rate["contrasts"]} == {30}


def test_all_laws_are_listed_without_a_table():
    printed = say("fit", "--law", "list")
    assert all(f"{law.name} " in printed and law.formula in printed for law in LAWS.values())


def test_points_during_training_are_fitted_by_themselves_and_never_mixed_without_a_word(known_study, tmp_path):
    names = {"budgets.csv": known_study({"seeds": (0,)}), "points.csv": known_study({"seeds": (0,)})}
    names["points.csv"]["status"] = "during"
    names["points.csv"]["images_seen"] += 1
    for name, frame in names.items():
        frame.to_csv(tmp_path / name, index=False)

    def kinds(*files):
        found = answer("fit", *(tmp_path / name for name in files))
        return [f["kind"] for f in found["flags"] if "during" in f["kind"]], found["sentences"]

    alone, sentences = kinds("points.csv")
    assert alone == ["during"]
    assert any("over 6 sizes" in sentence for sentence in sentences)  # points of a run are one cluster
    assert kinds(*names)[0] == ["during_mixed"]
    assert kinds("budgets.csv")[0] == []
