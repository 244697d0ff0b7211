"""The first line of the page: what makes a law one to use, to use with care, or not to use."""

import dataclasses
from types import SimpleNamespace

import pandas as pd
import pytest
from tables import law_grid

from aimscale.analysis import fit, frontier, held_out
from aimscale.analysis.report.summary import beside_others, trust, verdict
from aimscale.analysis.table.points import passes_flags
from aimscale.analysis.words import Flag


@pytest.fixture(scope="module")
def joint():
    """A law of 7 x 6 points, tested on the largest size and budget."""
    df = law_grid(sizes=(1e5, 1e7, 7), budgets=(1e5, 3e6, 6), noise=0.002).drop(columns="C")
    result = fit(df, "chinchilla")
    tests = tuple(held_out(result, df, by=v) for v in ("N", "D"))
    return dataclasses.replace(result, heldout=tests, flags=())


def light(joint, **changes):
    colour, reasons, doubts = trust(dataclasses.replace(joint, **changes), None)
    return colour, [*reasons, *doubts]


def test_a_departure_that_is_significant_and_small_is_told_and_changes_nothing(joint):
    tiny = Flag(kind="pattern", subject="ln N squared", number=0.14, p=0.008, text="0.14 % off.")
    colour, reasons = light(joint, flags=(tiny,))
    assert colour == "green"
    assert any("0.14 %" in reason for reason in reasons)
    assert light(joint)[0] == "green"
    assert light(joint, flags=(tiny,), heldout=())[0] == "amber"  # nothing shows that it does not matter
    for kind, number, expected in (("pattern", 2.0, "amber"), ("collinear", 0.99, "amber"), ("few_groups", 4, "green")):
        colour, reasons = light(joint, flags=(Flag(kind=kind, number=number, text=f"{kind} is said."),))
        assert (colour, any(kind in reason for reason in reasons)) == (expected, True)


def test_a_test_counts_where_its_refit_is_identified_and_beats_a_line(joint):
    by_size, by_budget = joint.heldout
    blind = [dataclasses.replace(each, not_identified=frozenset({"alpha"})) for each in joint.heldout]
    colour, reasons = light(joint, heldout=(blind[0], by_budget))
    assert colour == "green"
    assert any("hardly tests the law" in reason for reason in reasons[1:])
    assert light(joint, heldout=tuple(blind))[0] == "amber"
    assert (
        light(joint, heldout=(dataclasses.replace(by_size, not_identified=frozenset({"A"})), by_budget))[0] == "green"
    )
    worse = [dataclasses.replace(each, naive_mean_abs_relative_error=0.0) for each in joint.heldout]
    assert light(joint, heldout=(worse[0], by_budget))[0] == "amber"
    assert light(joint, heldout=tuple(worse))[0] == "red"
    assert light(joint, not_identified=frozenset({"beta"}))[0] == "red"


def test_points_that_err_together_are_an_alarm_only_where_most_lie_far_off(joint):
    """Half of sound tables raised one: the rows of a left-out budget share its error."""
    (by_size, by_budget) = joint.heldout

    def moved(share, num):
        p = by_size.predictions.copy()
        reach = p["pi_hi"] - p["predicted"]
        p.loc[p.index[:num], "measured"] = (p["predicted"] + share * reach)[:num]
        return light(joint, heldout=(dataclasses.replace(by_size, predictions=p), by_budget))[0]

    assert moved(1.5, by_size.num_test) == "green"
    assert moved(3.0, by_size.num_test // 2) == "green"
    assert moved(3.0, by_size.num_test) == "amber"


def test_a_sentence_compares_the_numbers_that_it_prints(joint):
    (test, _) = joint.heldout
    errors = {"mean_abs_relative_error": 0.301, "naive_mean_abs_relative_error": 0.286}
    test = dataclasses.replace(test, **errors)
    assert "30.1 % on 6 points, no better than a straight line in log-log (28.6 %)" in test.sentence()


def test_large_numbers_are_written_as_people_say_them():
    rows = pd.DataFrame({"images_seen": [5_450_000.0], "unique_images": [1000.0]})
    (flag,) = passes_flags(rows, "This D", {"D": 2e7, "U": 1e3})
    assert str(flag) == "This D means 20k passes over the pool of 1k, beyond the 5.45k that were seen."
    costly = law_grid(noise=0.002).assign(C=lambda rows: 5450 * rows["N"] * rows["D"])
    assert any("C = 5.45k N^1 D" in told for _, told in frontier(costly).facts())


@pytest.mark.parametrize(
    ("name", "better", "told"),
    [
        ("chinchilla", set(), ["cannot tell it apart from coupled, kaplan."]),
        ("chinchilla", {("chinchilla", "kaplan")}, ["cannot tell it apart from coupled."]),
        ("coupled", {("coupled", "chinchilla"), ("coupled", "kaplan")}, ["each of its 2 backtests"]),
    ],
)
def test_a_law_predicts_better_only_where_every_backtest_says_so(name, better, told):
    """Errors of .537, .545 and .549 % were told as one law that predicts better."""
    laws = SimpleNamespace(
        law=SimpleNamespace(name=name),
        curves=dict.fromkeys(("chinchilla", "coupled", "kaplan")),
        is_better=lambda one, other: (one, other) in better,
        is_tested=True,
        backtests=pd.DataFrame({"times": [2.0, 4.0]}),
    )
    said = list(beside_others(laws))
    assert len(said) == len(told)
    assert all(words in sentence for words, sentence in zip(told, said, strict=True))


def test_a_sweep_of_few_steps_is_told_to_train_on_more_data(joint):
    """Where exponents are unknown, budgets past the first plateau come first; a foreign table has no steps."""
    lost = dataclasses.replace(joint, not_identified=frozenset({"alpha"}))

    def advice(**columns):
        rows = pd.DataFrame({"images_seen": [8_000, 16_000, 64_000], "seed": [0, 0, 1]} | columns)
        study = SimpleNamespace(usable=rows, whose="", tuning="none", get=lambda name: lost if name == "law" else None)
        return verdict(study)[-1].answer

    assert advice(run_id="r", batch_size=32).startswith("Larger data, from 22.4k images on")
    assert advice(run_id="r", batch_size=8).startswith("More sizes")
    assert advice(batch_size=32).startswith("More sizes")
