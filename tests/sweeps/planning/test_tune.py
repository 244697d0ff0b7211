from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from aimscale import analysis
from aimscale.aim.errors import UserError
from aimscale.analysis.table.schema import results_table, write_table
from aimscale.harness.run.row import configured_columns, setup_of
from aimscale.sweeps.cli.plan_view import print_plan
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.state.planned_sweep import PlannedSweep, to_json

SIZES = ["rung-24", "rung-32", "rung-48", "rung-64"]
GRID: dict[str, Any] = {"sizes": SIZES, "budgets": ["64k", "128k", "256k"], "seeds": [0, 1], "base": {"optimiser": {}}}
TUNE: dict[str, Any] = {"lr_multiplier": [0.5, 1, 2, 4], "at": {"size": SIZES[:3], "budget": ["128k", "256k"]}}


def test_a_sweep_tunes_by_further_runs_of_small_sizes(write_sweep: Any) -> None:
    grid, runs = (plan(write_sweep(**GRID, tune=tune)) for tune in (None, TUNE))
    assert [run.run_id for run in runs[: len(grid)]] == [run.run_id for run in grid]
    further = runs[len(grid) :]
    assert [run.is_tuning for run in runs] == [False] * len(grid) + [True] * len(further)
    assert [(run.cell["size"], run.lr_multiplier) for run in further] == [
        (size, factor) for factor in (0.5, 2, 4) for size in SIZES[:3]
    ], "the grid holds a factor of 1"
    own = {run.cell["size"]: run.config.training for run in grid if run.cell["seed"] == 0}
    for run in further:
        expected = own[run.cell["size"]].optimiser
        rate = float(f"{run.lr_multiplier * expected.lr_peak:.6g}")
        assert run.config.training.optimiser == expected.model_copy(update={"lr_peak": rate})
        assert run.config.training.schedule == own[run.cell["size"]].schedule, "warm-up as in the grid, by 64k"
        assert (run.budgets, run.cell["seed"]) == ((128_000, 256_000), 0)


def test_batches_are_tuned_at_every_rate(write_sweep: Any) -> None:
    tune = TUNE | {"batch_size": [32, 64, 128], "at": {"size": "rung-24"}}
    further = [run for run in plan(write_sweep(**GRID, tune=tune)) if run.is_tuning]
    settings = {(run.lr_multiplier, run.config.training.optimiser.batch_size) for run in further}
    assert settings == {(rate, batch) for rate in (0.5, 1, 2, 4) for batch in (32, 64, 128)} - {(1, 64)}


def test_a_plan_prices_tuning_as_a_share_of_the_sweep(write_sweep: Any) -> None:
    sweep = write_sweep(**GRID, tune=TUNE)
    cards = cost_cards(sweep, plan(sweep))
    hours = {tuning: sum(c.device_hours for c in cards if c.run.is_tuning is tuning) for tuning in (True, False)}
    found = to_json(cards)["totals"]
    assert found["num_tuning_runs"] == 9
    assert found["share_tuning"] == pytest.approx(hours[True] / (hours[True] + hours[False]))
    console = Console(width=200, file=io.StringIO())
    print_plan(PlannedSweep(sweep), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"tuning      {100 * found['share_tuning']:.2g} % of the sweep: 9 of the runs" in said
    assert "lr_multiplier" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune": TUNE | {"lr_multiplyer": [1]}}, "tune.lr_multiplyer"),
        ({"tune": TUNE | {"at": {"sise": "rung-24"}}}, "'sise' is no axis of this sweep; did you mean 'size'"),
        ({"tune": TUNE | {"at": {"size": "rung-96"}}}, "tune names size 'rung-96', which no cell has"),
        ({"tune": TUNE | {"lr_multiplier": [1.0]}}, "`tune` adds no run"),
        ({"tune": TUNE | {"lr_multiplier": [0.5, 0.5]}}, "are the same run"),
        ({"tune": TUNE, "axes": {"lr_multiplier": [1, 2]}}, "both `tune` and `axes` vary lr_multiplier"),
        ({"tune": TUNE, "exclude": [{"size": SIZES[:3]}]}, "`tune` adds no run"),
    ],
)
def test_bad_tuning_is_refused_in_one_sentence(write_sweep: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(write_sweep(**GRID | changes))
    assert words in str(caught.value)


def test_a_tuned_sweep_gives_the_law_of_rates_and_its_best_rows_the_law_of_the_loss(
    write_sweep: Any, tmp_path: Path
) -> None:
    """The best rate falls with N by a power of .4.

    The six best rates of this draw happen to agree: their scatter alone put the power into [-.379, -.375].
    """
    rows = []
    for run in plan(write_sweep(**GRID, tune=TUNE)):
        columns = configured_columns(run.config) | {"lr_multiplier": run.lr_multiplier, "status": "complete"}
        for seen in run.budgets:
            n, noise = columns["params_total"], np.random.default_rng([len(rows), 1]).normal(0, 1e-3)
            best = 6e-3 * (n / 1e5) ** -0.4
            loss = 0.5 + 20 * n**-0.5 + 30 * seen**-0.5
            loss *= np.exp(0.02 * np.log(columns["lr_peak"] / best) ** 2 + noise)
            rows.append(columns | {"setup": setup_of(run.config.training), "images_seen": seen, "val_loss": loss})
    write_table(results_table(rows), tmp_path / "table.parquet")
    table = analysis.read_table(tmp_path / "table.parquet")
    rates = analysis.rates(table)
    law = rates.laws["lr"]
    assert law.intervals["a"].low < -0.4 < law.intervals["a"].high
    (tmp_path / "mine.yaml").write_text(rates.recipe("table.parquet"))
    for run in plan(write_sweep(**GRID, recipe="mine.yaml")):
        n, rate = configured_columns(run.config)["params_total"], run.config.training.optimiser.lr_peak
        assert rate == pytest.approx(law.predict(N=n, D=64_000)["value"][0], rel=0.06), "two digits; by 64k"
    found = analysis.fit(table)
    left_out = [each.number for each in found.exclusions if each.kind == "best of"]
    cells = table.frame.groupby(["size", "images_seen"])["lr_multiplier"].nunique()
    assert (cells > 1).sum() == 6
    assert left_out == [len(table) - found.num_points]
    assert found.num_points >= len(cells)
