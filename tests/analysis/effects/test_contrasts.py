"""Contrasts: a known effect is found with its interval, pairs are what they say, and what is not paired is refused."""

import json
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from commands import answer, say
from scipy import stats

from aimscale.analysis.effects.contrasts import contrast, factors
from aimscale.analysis.effects.paired import Hits, paired
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.read import read_tables, with_setup
from aimscale.analysis.table.schema import hits_table, results_table, write_table

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


def test_one_pair_at_each_of_two_sizes_has_no_interval(tmp_path):
    df = paired_runs({"s0": [0.010], "s1": [0.012]})
    (each,) = contrast(df, by="prefix").contrasts
    assert (each.over, each.verdict) == ("", "no significant difference")
    assert np.isnan([each.low, each.detectable, each.ratio_low, each.degrees]).all()
    assert "without an interval" in each.scope
    hits = {"paired": np.arange(1000) < 500, "none": np.arange(1000) < 400}
    df = with_hits(df.assign(image_size=32), tmp_path, lambda row: hits[row["prefix"]])
    found = contrast(df, by="prefix", measures=["top1"])
    (each,) = found.contrasts
    assert (each.over, each.verdict) == ("test images", "worse")
    assert {flag.kind for flag in found.flags} == {"one_pair", "unseen_prefix"}


def with_hits(frame: pd.DataFrame, folder: Path, right: Callable[[dict[str, Any]], np.ndarray]) -> pd.DataFrame:
    """A linear probe per row that is right on the test images that `right` says, kept beside the table."""
    rows = frame.to_dict("records")
    each = [{"task": "pets", "kind": "linear", "evaluation": "a-b"} for _ in rows]
    for row, entry in zip(rows, each, strict=True):
        row["probes"] = [entry | {"n": len(right(row)), "top1": float(right(row).mean()), "chance": 0.1}]
    write_table(results_table(rows), folder / "results.parquet")
    about = [{name: row[name] for name in ("run_id", "size", "images_seen")} for row in rows]
    bits = [{"num_test": len(right(row)), "hits": np.packbits(right(row)).tobytes()} for row in rows]
    write_table(hits_table(map(operator.or_, map(operator.or_, about, each), bits)), folder / "hits.parquet")
    return read_tables([folder])


def test_one_pair_of_runs_is_compared_over_its_test_images(known_study, tmp_path):
    # Bentur et al. 2009 in Fagerland, Lydersen and Laake 2014, table V: of 21, 7 on one side alone and 1 on the other
    one = {"sizes": ["s3"], "budgets": [8000], "seeds": [0]}
    sides = {"paired": [1] * 8 + [0] * 13, "none": [1] + [0] * 7 + [1] + [0] * 12}
    df = with_hits(known_study(one, one | {"prefix": "none"}), tmp_path, lambda row: np.array(sides[row["prefix"]]))
    found = contrast(df, by="prefix", measures=["top1"])
    (each,) = found.contrasts
    assert (each.low, each.high) == pytest.approx((-0.5084, -0.0133), abs=1e-4)
    assert (each.over, each.verdict, each.images.discordant) == ("test images", "worse", pytest.approx(8 / 21))
    assert each.images.p == pytest.approx(2 * 9 / 2**8)
    assert "one_pair" in {flag.kind for flag in found.flags}
    assert {"images_p", "over"} <= set(each.table)
    (tmp_path / "hits.parquet").unlink()
    (without,) = contrast(read_tables([tmp_path]), by="prefix", measures=["top1"]).contrasts
    assert (without.difference, without.over, without.is_significant) == (each.difference, "", False)


def test_pairs_of_runs_vary_over_runs_and_the_images_that_they_share_stand_beside(known_study, tmp_path):
    rng = np.random.default_rng(0)
    suits = rng.random(4000) < 0.05  # images that the level gets wrong whatever the seed
    drawn = {seed: rng.random((2, 4000)) < 0.6 for seed in range(3)}

    def right(row: dict[str, Any]) -> np.ndarray:
        is_level = row["prefix"] == "none"
        return drawn[row["seed"]][int(is_level)] & ~(suits & is_level)

    df = with_hits(known_study(DIRECTION, DIRECTION | {"prefix": "none"}), tmp_path, right)
    (each,) = contrast(df, by="prefix", measures=["top1"]).contrasts
    by_seed = [(drawn[s][1] & ~suits).mean() - drawn[s][0].mean() for s in range(3)]
    exact = stats.ttest_1samp(by_seed, 0).confidence_interval()
    assert (each.over, each.low, each.high) == ("runs", pytest.approx(exact.low), pytest.approx(exact.high))
    gain = np.mean([(drawn[s][1] & ~suits) * 1.0 - drawn[s][0] for s in range(3)], axis=0)
    assert (each.images.high - each.images.low) / 2 == pytest.approx(1.96 * gain.std() / np.sqrt(4000), rel=0.01)
    assert np.isnan(each.images.p)


def test_the_detectable_difference_is_seen_four_times_in_five():
    rng, n, discordant = np.random.default_rng(1), 2000, 0.1
    bits = [Hits("a", n, np.packbits(row).tobytes()) for row in (np.arange(n) < 100, np.arange(n) >= n - 100)]
    effect = paired([bits[0]], [bits[1]]).detectable
    ours, theirs, _ = rng.multinomial(n, [(discordant + effect) / 2, (discordant - effect) / 2, 0.9], size=20_000).T
    half = 1.96 * np.sqrt(ours + theirs + 2 - (ours - theirs) ** 2 / (n + 2))
    assert np.mean(np.abs(ours - theirs) > half) == pytest.approx(0.8, abs=0.015)


def test_kinds_of_probes_are_compared_within_a_row(known_study):
    df = with_probes(known_study({"sizes": ["s1", "s3", "s5"]}))
    (kinds,) = contrast(df, by="kind").contrasts
    assert (kinds.baseline, kinds.level) == ("attentive", "linear")
    assert kinds.difference == pytest.approx(-0.02)
    assert kinds.num_run_pairs == 9
    assert kinds.num_pairs == 45


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
    assert "head_depth" in factors(known_study(*parts))


def test_fields_without_a_column_are_compared_and_held_equal(known_study):
    rows = known_study(DIRECTION, DIRECTION | {"prefix": "none", "effect": 0.05})
    decay = rows.assign(val_loss=rows["val_loss"] * 1.1, run_id=rows["run_id"] + "d")
    setups = [json.dumps({}), json.dumps({"optimiser.weight_decay": 0.1})]
    df = with_setup(pd.concat([rows.assign(setup=setups[0]), decay.assign(setup=setups[1])], ignore_index=True))
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
        ({"by": "kind"}, "kind"),
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
