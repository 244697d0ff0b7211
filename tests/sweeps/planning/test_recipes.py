from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import ROOT

from aimscale.aim.errors import UserError
from aimscale.analysis import rates, read_tables
from aimscale.harness.run.section import merge
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.recipes import Scale, get_recipe, parse_recipe, read_recipe
from aimscale.sweeps.planning.sweepfile import load_sweep
from aimscale.sweeps.state.record import prepare_directory

LAW: dict[str, Any] = {"coefficient": 0.01, "source": "an assumption"}
OWN: dict[str, Any] = {"lr_peak": LAW, "batch_size": LAW | {"coefficient": 32}, "warmup_images": LAW | {"D": 1}}
SCALES = [
    Scale(width=width, params_total=params, budget=budget)
    for width in (16, 24, 36, 64, 72, 100, 192, 384, 1536, 3072)
    for params in (10_000, 10**9, 2 * 10**9, 2 * 10**9 + 1, 4 * 10**9, 7 * 10**9)
    for budget in (7, 999, 8192, 32_000, 32_768, 64_000, 90_510, 128_000, 512_000, 5_120_000_000, 2_048_000_039)
]


def test_the_small_recipe_and_that_of_the_studies_are_their_formulas() -> None:
    of_studies = read_recipe(ROOT / "docs/study/recipe.yaml")
    for scale in SCALES:
        fields, n, budget = get_recipe("small").fields(scale), scale.params_total, scale.budget
        batch_size = max(16, int(64 * 2.0 ** round(math.log2(budget / 64_000) / 2)))
        assert fields["optimiser"] == {
            "batch_size": batch_size,
            "lr_peak": float(f"{6.8e-3 * (n / 60_000) ** -0.4 * (budget / 64_000) ** -0.2:.1e}"),
            "precision": "fp32",
        }
        assert fields["schedule"] == {"warmup_images": budget // 10, "kind": "wsd"}
        assert fields["devices"] == 1
        trained = {"optimiser": {"lr_peak": float(f"{2e-3 * (64 / scale.width) ** 0.75:.1e}")}}
        assert of_studies.fields(scale) == merge(fields, trained)


def test_the_small_recipe_has_the_best_rates_measured_on_cifar() -> None:
    study = ROOT / "tests/studies/cifar"
    found = rates(read_tables([study / f"cifar{part}.parquet" for part in ("", "-rates", "-tuning")]))
    for n, middle in ((15_072, 65_536), (60_752, 65_536), (238_920, 65_536)):  # the middle of three budgets at batch 32
        best = found.laws["lr"].predict({"N": [n], "D": [middle]}).iloc[0]
        recipe = get_recipe("small").lr_peak(Scale(width=1, params_total=n, budget=middle // 2))
        batch_size = get_recipe("small").batch_size(Scale(width=1, params_total=n, budget=middle // 2))
        assert best["ci_lo"] < recipe / math.sqrt(batch_size / 32) < best["ci_hi"]


def test_the_papers_recipes_are_its_table_9_and_the_released_trainer() -> None:
    for scale in SCALES:
        paper, released = (get_recipe(name).fields(scale) for name in ("aim-paper", "aim-l3m"))
        n = scale.params_total
        assert paper == {
            "optimiser": {"batch_size": 4096, "lr_peak": 1e-3, "precision": "bf16"},
            "schedule": {"warmup_images": scale.budget // 40, "kind": "cosine"},
            "devices": 64 if n > 4e9 else 32 if n > 2e9 else 8,
        }
        assert released == merge(paper, released)
        assert released["optimiser"]["betas"] == [0.9, 0.95]
        assert released["schedule"]["lr_start"] == 1e-6


def test_a_law_is_a_power_of_width_parameters_and_images_within_bounds() -> None:
    law = LAW | {"width": -1, "N": 0.5, "D": -0.25, "at": {"width": 32, "N": "1M", "D": "64k"}}

    def rate(**changes: Any) -> float:
        recipe = parse_recipe(OWN | {"lr_peak": law | changes}, "here")
        return recipe.fields(Scale(width=64, params_total=4_000_000, budget=1_024_000))["optimiser"]["lr_peak"]

    assert rate() == pytest.approx(0.01 / 2 * 2 / 2)
    assert rate(min=0.02) == 0.02
    assert rate(max=0.002) == 0.002
    assert rate(tuned_for="64k") == 0.01
    assert rate(coefficient=0.0123456) == 0.0062, "two digits"


def test_a_recipe_like_another_has_its_keys_and_constants_stand_before_laws() -> None:
    recipe = parse_recipe({"like": "small", "lr_peak": LAW, "base": {"optimiser": {"batch_size": 48}}}, "here")
    fields = recipe.fields(Scale(width=64, params_total=10**6, budget=64_000))
    assert fields["optimiser"] == {"lr_peak": 0.01, "batch_size": 48, "precision": "fp32"}
    assert (recipe.summary, recipe.name) == ("", "of its own")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("smal", "unknown recipe 'smal' (a file's name ends in .yaml); did you mean 'small'?"),
        ("mine.yaml", "cannot read"),
        (OWN | {"lr_peek": LAW}, "unknown key 'lr_peek'; did you mean 'lr_peak'?"),
        (OWN | {"lr_peak": LAW | {"widht": 1}}, "unknown key 'lr_peak.widht'; did you mean 'width'?"),
        (OWN | {"lr_peak": {"coefficient": 1}}, "lr_peak.source: Field required"),
        (OWN | {"lr_peak": LAW | {"N": 1e9}}, "lr_peak.N"),
        (OWN | {"base": {"optimizer": {}}}, "base: unknown key 'optimizer'; did you mean 'optimiser'?"),
        (OWN | {"base": {"schedule": {"kid": "wsd"}}}, "base.schedule: unknown key 'kid'; did you mean 'kind'?"),
        ({"lr_peak": LAW}, "batch_size: Field required"),
        ({"like": "smal"}, "unknown recipe 'smal' (a file's name ends in .yaml); did you mean 'small'?"),
        ({"like": "small", "base": 3}, "base"),
        (OWN | {"devices": {}}, "devices"),
        (OWN | {"batch_size": LAW | {"coefficient": 1e90}}, "batch_size"),
        (3, "sweep.yaml: recipe must be a mapping of keys to values, not int"),
    ],
)
def test_bad_recipes_are_refused_in_one_sentence(write_sweep: Any, recipe: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(write_sweep(recipe=recipe, base={"optimiser": {}}))
    assert words in str(caught.value)
    assert "sweep.yaml" in str(caught.value) or isinstance(recipe, str) or "like" in recipe
    assert "\n" not in str(caught.value)


def test_a_sweep_keeps_the_recipe_that_it_was_launched_with(write_sweep: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"like": "small", "lr_peak": LAW}))
    sweep = write_sweep(recipe="mine.yaml", base={"optimiser": {}})
    runs = plan(sweep)
    assert {run.config.training.optimiser.lr_peak for run in runs} == {0.01}
    assert sweep.recipe.name == "mine"
    prepare_directory(sweep, runs)
    file.write_text("lost")
    launched = load_sweep(sweep.name, sweep.root)
    assert [run.run_id for run in plan(launched)] == [run.run_id for run in runs]
    assert launched.recipe == sweep.recipe
