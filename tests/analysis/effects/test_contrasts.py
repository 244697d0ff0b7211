"""Contrasts: a known effect is found with its interval, pairs are what they say, and what is not paired is refused."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
from commands import answer, say
from scipy import stats

from aimscale.analysis.effects.contrasts import contrast
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.report.study import factors
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.select import with_setup

DIRECTION = {"sizes": ["s3"], "budgets": [8000, 32000]}


def with_probes(frame: pd.DataFrame, attentive: float = 0.02, best: float = 0.01) -> pd.DataFrame:
    """Probes of two kinds whose accuracies differ by a known amount, and by another on the last six blocks."""
    probes = []
    for number, loss in enumerate(frame["val_loss"]):
        base = 0.9 - 0.5 * loss
        wobble = 0.001 * np.sin(number)
        probes.append(
            [
                {"task": "pets", "kind": kind, "top1": base + gain + wobble, "n": 1000, "chance": 0.1}
                | {"last_top1": base + gain - best}
                for kind, gain in (("linear", 0.0), ("attentive", attentive))
            ]
        )
    return frame.assign(probes=probes)


def test_a_known_effect_is_found_over_runs_not_rows(known_study):
    df = known_study(DIRECTION, DIRECTION | {"prefix": "none", "effect": 0.05})
    (found,) = contrast(df, by="prefix").contrasts
    assert (found.baseline, found.level, found.num_pairs, found.num_run_pairs) == ("paired", "none", 6, 3)
    assert found.ratio == pytest.approx(np.exp(0.05), abs=0.002)
    assert found.ratio_low < np.exp(0.05) < found.ratio_high
    assert found.verdict == "worse"
    for side in ("baseline", "level"):
        runs = df[df["prefix"] == getattr(found, side)].groupby("run_id")["val_loss"].mean()
        assert getattr(found, f"{side}_mean") == pytest.approx(runs.mean(), rel=1e-12)
    by_run = found.pairs.groupby("seed")["difference"].mean()
    exact = stats.ttest_1samp(by_run, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert "3 pairs of runs (6 of rows)" in found.scope


def test_nothing_is_claimed_where_there_is_nothing_and_the_visible_effect_is_told(known_study):
    df = known_study(DIRECTION, DIRECTION | {"prefix": "none"})
    (found,) = contrast(df, by="prefix").contrasts
    assert found.verdict == "no significant difference"
    se = np.std(found.pairs.groupby("seed")["difference"].mean(), ddof=1) / np.sqrt(3)
    assert found.detectable == pytest.approx(se * (stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)))


def paired_runs(effects: dict[str, list[float]]) -> pd.DataFrame:
    """Runs of some sizes at two prefixes, with the log ratio of each pair: size -> one a seed."""
    rows = [
        {"run_id": f"{size} {seed} {prefix}", "size": size, "seed": seed, "prefix": prefix, "status": "complete"}
        | {"images_seen": 8000, "params_total": 1000, "val_loss": 0.5 * np.exp(effect * (prefix == "none"))}
        for size, values in effects.items()
        for seed, effect in enumerate(values)
        for prefix in ("paired", "none")
    ]
    return pd.DataFrame(rows)


def test_from_three_sizes_on_they_are_the_clusters():
    """What suits one level at one size is shared by its seeds: six seeds are no six sizes."""
    of_size = [0.004, -0.003, 0.008]
    df = paired_runs({f"s{i}": [e - 1e-4, e, e + 1e-4] for i, e in enumerate(of_size)})
    (each,) = contrast(df, by="prefix").contrasts
    exact = stats.ttest_1samp(of_size, 0).confidence_interval()
    assert (np.log(each.ratio_low), np.log(each.ratio_high)) == pytest.approx((exact.low, exact.high))
    assert (each.over, each.num_sizes, each.degrees) == ("sizes", 3, pytest.approx(2))
    assert not each.is_significant
    assert "at 3 sizes (2 degrees of freedom)" in each.scope


def test_from_three_budgets_on_they_are_clusters_too():
    """What suits one level at one budget is shared by its sizes: intervals over sizes alone held 26 to 51 %."""
    of_budget = [0.004, -0.003, 0.008]
    rows = [
        paired_runs({f"s{i}": [effect] for i in range(4)}).assign(images_seen=8000 * 2**k)
        for k, effect in enumerate(of_budget)
    ]
    (each,) = contrast(pd.concat(rows, ignore_index=True), by="prefix").contrasts
    exact = stats.ttest_1samp(of_budget, 0).confidence_interval()
    assert (np.log(each.ratio_low), np.log(each.ratio_high)) == pytest.approx((exact.low, exact.high))
    assert (each.num_sizes, each.num_budgets, each.degrees) == (4, 3, pytest.approx(2))
    assert "at 4 sizes and 3 budgets (2 degrees of freedom)" in each.scope
    assert pickle.loads(pickle.dumps(each)).verdict == each.verdict


def test_two_sizes_speak_of_themselves_alone():
    df = paired_runs({"s0": [0.010, 0.012, 0.014], "s1": [0.001, 0.003, 0.005]})
    found = contrast(df, by="prefix")
    (each,) = found.contrasts
    half = stats.t.ppf(0.975, 4) * 0.002 / np.sqrt(6)  # pairs scatter by 0.002 about the mean of their size
    assert (np.log(each.ratio_low), np.log(each.ratio_high)) == pytest.approx((0.0075 - half, 0.0075 + half))
    assert (each.over, each.num_sizes, each.degrees) == ("runs", 2, 4)
    assert "for these two sizes (4 degrees of freedom)" in each.scope
    assert "these_sizes" in {flag.kind for flag in found.flags}
    (alone,) = contrast(df[df["size"] == "s0"], by="prefix").contrasts
    assert "for this size (2 degrees of freedom)" in alone.scope


def test_one_pair_at_each_of_two_sizes_has_no_interval():
    df = paired_runs({"s0": [0.010], "s1": [0.012]})
    found = contrast(df, by="prefix")
    (each,) = found.contrasts
    assert (each.over, each.verdict) == ("", "no significant difference")
    assert np.isnan([each.low, each.detectable, each.ratio_low, each.degrees]).all()
    assert "without an interval" in each.scope
    assert {flag.kind for flag in found.flags} == {"one_pair", "unseen_prefix"}


@pytest.mark.parametrize("by", ["target", "objective.loss"])  # the second is of a field that a user added
def test_losses_on_another_target_are_not_subtracted_but_accuracies_are(known_study, by):
    df = with_probes(known_study(DIRECTION, DIRECTION | {"target": "raw", "effect": 0.3}))
    df = df.assign(**{"target": "normalised", by: df["target"]})
    found = contrast(df, by=by)
    assert {each.measure.column for each in found.contrasts} == {"top1"}
    assert ("other_unit", by) in {(flag.kind, flag.subject) for flag in found.flags}
    with pytest.raises(AnalysisError, match=by):
        contrast(df, by=by, measures=["val_loss"])


def test_heads_are_told_apart_though_rule_and_depth_change_together(known_study):
    parts = [
        DIRECTION | {"head_depth": 6, "head_width": 64},
        DIRECTION | {"head_depth": 0, "head_width": None, "head_rule": "none", "effect": 0.03},
        DIRECTION | {"head_depth": 12, "head_width": 64, "effect": -0.01},
    ]
    found = contrast(known_study(*parts), by="head_depth", baseline="6")
    assert {each.level: each.verdict for each in found.contrasts} == {"0": "worse", "12": "better"}
    narrow = DIRECTION | {"head_depth": 6, "head_width": 16, "effect": 0.5}  # no part of what depth does
    depth = contrast(known_study(*parts, narrow), by="head_depth", baseline="6").contrasts
    assert [each.ratio for each in depth if each.level == "12"] == [found.contrasts[1].ratio]
    assert "head_depth" in factors(Runs(known_study(*parts)))


def test_fields_without_a_column_are_compared_and_held_equal(known_study):
    rows = known_study(DIRECTION, DIRECTION | {"prefix": "none", "effect": 0.05})
    decay = rows.assign(val_loss=rows["val_loss"] * 1.1, run_id=rows["run_id"] + "d")
    setups = [json.dumps({}), json.dumps({"optimiser.weight_decay": 0.1})]
    df = with_setup(Runs(pd.concat([rows.assign(setup=setups[0]), decay.assign(setup=setups[1])], ignore_index=True)))
    by_prefix = contrast(df, by="prefix")
    assert "optimiser.weight_decay" in by_prefix.equal
    assert by_prefix.contrasts[0].num_run_pairs == 6
    (by_decay,) = contrast(df, by="optimiser.weight_decay", baseline="default").contrasts
    assert by_decay.ratio == pytest.approx(1.1)
    assert by_decay.level == "0.1"


def test_what_is_not_paired_is_refused_with_the_reason(known_study):
    df = known_study(DIRECTION, DIRECTION | {"prefix": "none", "lr_peak": 3e-3})
    with pytest.raises(AnalysisError, match=r"lr_peak \(0\.001 against 0\.003\)"):
        contrast(df, by="prefix")
    assert contrast(df, by="prefix", ignore=["lr_peak"]).contrasts[0].num_run_pairs == 3
    for options, words in (
        ({"by": "prefix", "baseline": "usual"}, "'usual'"),
        ({"by": "nothing"}, "'nothing'"),
        ({"by": "target"}, "normalised"),
        ({"by": "prefix", "measures": ["size"]}, "'size'"),
        ({"by": "prefix", "measures": ["top1:pets"]}, "top1:pets"),
        ({"by": "prefix", "ignore": ["nothing"]}, "'nothing'"),
    ):
        with pytest.raises(AnalysisError, match=words):
            contrast(known_study(DIRECTION, DIRECTION | {"prefix": "none"}), **options)


def test_the_verb_prints_a_table_json_and_a_figure(known_study, tmp_path):
    table = with_probes(known_study(DIRECTION, DIRECTION | {"prefix": "none", "effect": 0.05}))
    table["probes"] = table["probes"].map(json.dumps)
    table.to_csv(tmp_path / "results.csv", index=False)
    arguments = [tmp_path / "results.csv", "--by", "prefix=paired", "--figure", tmp_path / "prefix"]
    out = say("contrast", *arguments)
    assert out.count("worse") == 3
    assert out.endswith(f"\nnext: aimscale report {arguments[0]}\n")
    assert (tmp_path / "prefix.svg").exists()
    found = answer("contrast", *arguments)
    assert len(found["contrasts"]) == 3
    assert found["contrasts"][0]["verdict"] == "worse"
