"""Where the table's own optimum does not lead to that of a resample, every resample's projected grid does."""

from dataclasses import replace

import numpy as np
import pytest

from aimscale.analysis import laws
from aimscale.analysis.fitting.bootstrap import point_counts
from aimscale.analysis.fitting.intervals import bootstrap_draws
from aimscale.analysis.fitting.objectives import find_objective
from aimscale.analysis.fitting.optimise import Minimum, global_minimum, make_problem
from aimscale.analysis.fitting.projection import design, grid_points, project, resample_starts
from aimscale.analysis.laws.base import Columns


def of_kaplan(grid, objective):
    x = {"N": grid["params_total"].to_numpy(float), "D": grid["images_seen"].to_numpy(float)}
    law = laws.KAPLAN.centred(Columns(x))
    return make_problem(law, x, grid["val_loss"].to_numpy(), find_objective(objective))


def totals_of(problem, draws, counts):
    vectors = [problem.vector_of({k: float(v[i]) for k, v in draws.items()}) for i in range(len(counts))]
    return np.array([problem.total(v, w)[0] for v, w in zip(vectors, counts, strict=True)])


@pytest.mark.parametrize("objective", ["log_lsq", "huber_log:0.01"])
def test_a_resample_reaches_its_minimum_from_a_start_that_misleads(grid, objective):
    """Kaplan's law from a corner of its box: what every resample finds is the minimum of its own grid."""
    problem, counts = of_kaplan(grid, objective), point_counts(len(grid), 8, 0)
    corner = np.where(np.isfinite(problem.upper), problem.upper, 1.0)
    draws = bootstrap_draws(problem, [Minimum(vector=corner, total=0.0)], counts)
    own = [global_minimum(replace(problem, weights=row.astype(float)))[0].total for row in counts]
    np.testing.assert_array_less(totals_of(problem, draws, counts), np.array(own) * (1 + 1e-4))


def test_the_first_start_is_the_lowest_floor_of_the_grid_under_each_resamples_weights(grid):
    problem, counts = of_kaplan(grid, "lsq"), point_counts(len(grid), 5, 1)
    found = resample_starts(problem, counts, np.zeros(len(problem.lower)))
    theta = grid_points(problem.lower[problem.num_linear :], problem.upper[problem.num_linear :])
    for k, row in enumerate(counts):
        with np.errstate(all="ignore"):  # far corners of the grid overflow
            linear = project(problem, design(problem, theta), row.astype(float))
            lowest = np.nanmin(problem.total(np.concatenate([linear, theta], axis=1), row))
        assert problem.total(found[0, k][None], row)[0] == pytest.approx(lowest, rel=1e-6)


def test_resamples_of_two_breaks_end_no_higher_than_any_valley_of_their_own_grid():
    x = np.geomspace(1e2, 1e7, 24)
    y = (0.3 + 3 * x**-0.3 / (1 + (x / 1e4) ** 2) ** 0.1) * np.exp(0.005 * np.random.default_rng(0).standard_normal(24))
    problem = make_problem(laws.find_law("broken2:x"), {"x": x}, y, find_objective("log_lsq"))
    counts, nowhere = point_counts(24, 2, 0), np.clip(np.zeros(9), problem.lower, problem.upper)
    draws = bootstrap_draws(problem, [Minimum(vector=nowhere, total=np.inf)], counts)
    valleys = np.stack([problem.total(each, counts) for each in resample_starts(problem, counts, nowhere)])
    assert np.all(totals_of(problem, draws, counts) <= valleys.min(axis=0) * (1 + 1e-9))
