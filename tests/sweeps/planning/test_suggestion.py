"""Suggested sweeps fit their hours and identify a law; plans warn of budgets on the first plateau."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from aimscale import analysis
from aimscale.analysis.laws import CHINCHILLA
from aimscale.sweeps.cli.plan_view import print_plan
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.run import CostCard
from aimscale.sweeps.planning.suggestion import TOLD, Request, suggest
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError, load_sweep
from aimscale.sweeps.state.planned_sweep import PlannedSweep


@pytest.fixture
def suggested(tmp_path: Path, write_images: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function from hours to the suggested sweep, read from its file, and its cost cards."""
    for seed, name in enumerate(("train", "validation", "test")):
        write_images(tmp_path / "shards" / name, 40, seed=seed, classes=("ant", "bee"))
    monkeypatch.setattr("aimscale.sweeps.planning.suggestion.MAX_PASSES", 10**9)

    def make(hours: float, gpu: str | None = None) -> tuple[Sweep, list[CostCard]]:
        path = tmp_path / f"of-{hours}.yaml"
        path.write_text(
            suggest(
                Request(path=path, data=tmp_path / "shards", hours=hours, devices=2, gpu=gpu, is_gpu=gpu is not None)
            )
        )
        sweep = load_sweep(path, tmp_path / "root")
        return sweep, cost_cards(sweep, plan(sweep))

    return make


def is_identified(sizes: Any, budgets: Any, seed: int, scatter: float = 0.001) -> list[bool]:
    """Say whether a simulated table identifies both exponents: whole, and without the largest size and budget.

    At the middle of the grid each term is a tenth of the floor, as in the studies; sizes and points scatter.
    """
    rng = np.random.default_rng(seed)
    n, d = (each.ravel() for each in np.meshgrid(np.asarray(sizes, float), np.asarray(budgets, float), indexing="ij"))
    terms = sum(0.1 * (x / np.exp(np.log(x).mean())) ** -power for x, power in ((n, 0.55), (d, 0.55)))
    errors = np.repeat(rng.normal(0, scatter, len(sizes)), len(budgets)) + rng.normal(0, scatter / 2, len(n))
    table = pd.DataFrame({"params_total": n, "images_seen": d, "val_loss": 0.4 * (1 + terms) * np.exp(errors)})
    fit = analysis.fit(table, CHINCHILLA)
    tests = (fit, *(analysis.held_out(fit, table, by=by) for by in "ND"))
    return [not {"alpha", "beta"} & {*each.not_identified} for each in tests]


@pytest.mark.parametrize(("hours", "gpu"), [(0.15, None), (100.0, "H100")])
def test_a_suggested_sweep_fits_its_hours_and_identifies_a_law(suggested: Any, hours: float, gpu: str | None) -> None:
    sweep, cards = suggested(hours, gpu)
    planned = sum(card.device_hours for card in cards) / 2
    assert hours / 8 < planned <= hours
    assert max(card.wall_s for card in cards) <= 3600 * hours
    assert not [each for card in cards for each in card.cautions if "follows no law" in each.text]
    assert sweep.file.base["probes"][0]["kinds"] == (["linear", "knn"] if gpu else ["knn"])
    sizes = sorted(card.params_total for card in cards)
    assert all(each.run.is_tuning is False for each in cards)
    found = [is_identified(sizes, sweep.file.budgets, seed) for seed in range(5)]
    assert np.mean(found, axis=0).min() >= 0.8
    noisy = [is_identified(sizes, sweep.file.budgets, seed, scatter=TOLD / 100)[0] for seed in range(5)]
    assert np.mean(noisy) >= 0.8, "what the file says of itself"
    poor = [is_identified(sizes[1:6], np.array([80, 115, 160, 230]) * 1000, seed) for seed in range(5)]
    assert np.mean(poor, axis=0).min() <= 0.4, "the test can tell a grid that does not"


def test_few_images_bound_the_budgets(suggested: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = suggested(4.0)[0].file.budgets[-1]
    monkeypatch.setattr("aimscale.sweeps.planning.suggestion.MAX_PASSES", 8000)
    assert suggested(4.0)[0].file.budgets[-1] <= 8000 * 40 < largest


def test_a_suggestion_is_refused_without_hours_or_parts(suggested: Any, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"too few.*takes 0\.\d+ on 2"):
        suggested(0.001)
    (tmp_path / "shards" / "validation").rename(tmp_path / "shards" / "val")
    with pytest.raises(SweepError, match="has no validation"):
        suggested(1.0)


def test_a_plan_warns_of_budgets_on_the_first_plateau_by_steps_and_rate(write_sweep: Any) -> None:
    def warned(budgets: list[int], **base: Any) -> list[str]:
        sweep = write_sweep(sizes=["rung-32"], budgets=budgets, base=base)
        return [
            each.text for card in cost_cards(sweep, plan(sweep)) for each in card.cautions if "plateau" in each.text
        ]

    (why,) = warned([8_000, 16_000, 32_000], optimiser={"batch_size": 32})
    assert why.startswith("8,000, 16,000 images are at most 500 steps")
    assert not warned([32_000, 64_000], optimiser={"batch_size": 32})
    assert warned([32_000, 64_000], optimiser={"batch_size": 64})
    assert warned([32_000], optimiser={"batch_size": 32}, lr_multiplier=0.4)
    assert not warned([16_000], optimiser={"batch_size": 32}, lr_multiplier=2)


def test_a_plan_names_what_makes_evaluation_dear(write_sweep: Any, write_images: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(("fit", "test")):
        write_images(tmp_path / name, 40, seed=seed, classes=("ant", "bee"))

    def said(epochs: int) -> str:
        task = {"task": "pets", "train": "fit", "test": "test", "kinds": ["attentive"], "epochs": epochs}
        sweep = write_sweep(budgets=[64_000], base={"probes": [task]}, cost={"mfu": 0.01})
        console = Console(width=200, file=io.StringIO())
        print_plan(PlannedSweep(sweep), console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert "most of it is the probes of pets: fewer `kinds`" in said(100_000)
    assert "warn  evaluation" not in said(1)
