"""What a fit says about itself: held parameters, notes at the right parameter, losses that rise."""

import dataclasses
import json

import numpy as np
import pandas as pd

from aimscale.analysis import fit
from aimscale.analysis.fitting.identify import diagnose
from aimscale.analysis.fitting.optimise import Minimum
from aimscale.analysis.fitting.profiles import problem_of
from aimscale.analysis.fitting.result import Flag, Interval
from aimscale.analysis.table.points import observe


def test_a_held_parameter_has_no_interval(grid):
    result = fit("chinchilla", grid, fixed={"E": 0.2}, resamples=60)
    assert "E" not in result.intervals
    assert result.shown("E") == "0.2 (held)"
    row = result.table.set_index("parameter").loc["E"]
    assert np.isnan(row["low"])
    assert row["note"] == "held"
    assert {"A", "B", "alpha", "beta"} <= set(result.intervals)
    assert "E = 0.2 (held)" in result.sentence()


def test_notes_lie_at_the_parameter_they_are_about(grid):
    result = fit("chinchilla", grid, resamples=60)
    flags = (
        Flag("A rival minimum lies within the noise: E = 1."),
        Flag("A is known only within a factor of 200.", "A"),
    )
    notes = dataclasses.replace(result, flags=flags).table.set_index("parameter")["note"]
    assert notes["A"] == "A is known only within a factor of 200."
    assert set(notes.drop("A")) == {""}
    assert json.loads(dataclasses.replace(result, flags=flags).to_json())["flags"] == list(flags)


def test_one_note_a_parameter(grid):
    rng = np.random.default_rng(0)
    flat = grid.assign(val_loss=0.3 * (1 + 1e-3 * rng.standard_normal(len(grid))))
    rising = grid.assign(val_loss=grid["params_total"] ** 0.2 + grid["images_seen"] ** 0.1)  # A and B are 0 throughout
    notes = [note for each in (flat, rising) for note in fit("chinchilla", each, resamples=200).table["note"]]
    assert sum("from above" in note for note in notes) > 1
    for note in notes:
        assert note.count("bound") + note.count("from above") + note.count("factor") <= 1, note


def test_exponents_that_sum_to_one_are_known_together(grid):
    """a may be known within a factor of 50 while b = 1 - a is narrow: neither is told then."""
    result = fit("chinchilla", grid, resamples=0)
    problem = problem_of(result)
    best = Minimum(vector=problem.vector_of(result.law_params)[0], total=result.objective_value)
    points = observe(result.law, grid, y="val_loss")
    ends = {"a": (0.01, 0.5), "b": (0.5, 0.99)}
    intervals = {name: Interval(low=low, high=high, confidence=0.95, method="") for name, (low, high) in ends.items()}
    found = diagnose(problem, best, result.law_params, result.params, {}, intervals, (), points)
    assert {"a", "b"} <= found.not_identified


def test_a_loss_that_rises_is_said_to(grid):
    accuracy = grid.assign(val_loss=1 - grid["val_loss"])
    (flag,) = [f for f in fit("chinchilla", accuracy, resamples=0).flags if "rises" in f]
    assert flag.startswith("val_loss rises with N and D, which L = E + A N^-alpha + B D^-beta cannot follow")
    assert not any("rises" in f for f in fit("chinchilla", grid, resamples=0).flags)
    up = pd.DataFrame({"N": np.geomspace(1, 100, 8), "y": np.geomspace(1, 100, 8) ** 0.3})
    assert any("y rises with N" in f for f in fit("power_offset:N", up, y="y", resamples=0).flags)
