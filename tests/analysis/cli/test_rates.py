"""`aimscale rates` and `contrast --as-law`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from aimscale.sweeps.cli.main import main
from aimscale.sweeps.planning.recipes import Scale, read_recipe

LINES = {
    "rates": "rates tuned.csv --label val_loss=Loss",
    "recipes": "contrast two.csv --by recipe=old --as-law --label C=FLOPs --label new=ours",
}


@pytest.fixture(autouse=True)
def tables(grid: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = (grid["params_total"] / 1e6) ** -0.5
    tried = [
        grid.assign(lr_peak=0.003 * 2.0**k * scale, val_loss=grid["val_loss"] * (1 + 0.01 * k**2)) for k in (-1, 0, 1)
    ]
    pd.concat(tried).to_csv(tmp_path / "tuned.csv", index=False)
    both = [grid.assign(recipe=name, val_loss=grid["val_loss"] * by) for name, by in (("old", 1.0), ("new", 0.98))]
    pd.concat(both).to_csv(tmp_path / "two.csv", index=False)
    monkeypatch.chdir(tmp_path)


def exit_code(line: str) -> int:
    """Run a verb and return its exit code."""
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize("name", LINES)
def test_a_figure_is_drawn_with_the_words_that_it_is_given(name: str, capsys: Any) -> None:
    assert exit_code(f"{LINES[name]} --figure figure") == 0
    drawn = Path("figure.svg").read_text()
    assert all(words in drawn for words in {"rates": ["Loss"], "recipes": ["FLOPs", "ours against old"]}[name])
    assert "next: aimscale" in capsys.readouterr().out


@pytest.mark.parametrize("name", LINES)
def test_json_holds_the_table(name: str, capsys: Any) -> None:
    assert exit_code(f"{LINES[name].partition(' --label')[0]} --json") == 0
    assert json.loads(capsys.readouterr().out)["table"]


def test_an_accuracy_is_not_corrected_to_its_lowest(capsys: Any) -> None:
    """The best rate of an accuracy is that of the highest."""
    table = pd.read_csv("tuned.csv")
    table.assign(accuracy=1 - table["val_loss"] / 10).to_csv("accuracies.csv", index=False)
    assert exit_code("fit accuracies.csv --y accuracy --law power:N --json") == 0
    assert json.loads(capsys.readouterr().out)["tuning"] == ""


def test_the_laws_are_written_as_a_recipe_that_sweeps_read(capsys: Any) -> None:
    assert exit_code("rates tuned.csv --write my.yaml --target N=1e9,D=1e9") == 0
    printed = capsys.readouterr()
    assert "wrote my.yaml" in printed.err
    assert "target: best learning rate 9.49×10⁻⁵" in printed.out
    law = read_recipe(Path("my.yaml")).lr_peak
    assert law(Scale(width=64, params_total=4_000_000, budget=10**6)) == pytest.approx(0.0015, rel=1e-3)
    assert "aimscale rates tuned.csv" in law.source


@pytest.mark.parametrize(("verb", "rest"), [("fit", ""), ("forecast", "--at N=1e9,D=1e9"), ("frontier", "")])
def test_verbs_fit_corrected_losses_and_say_how_well_sizes_are_tuned(verb: str, rest: str, capsys: Any) -> None:
    """The largest size has one rate, four times too high, which costs it 4 % of its loss."""
    tuned = pd.read_csv("tuned.csv")
    best = tuned.groupby(["params_total", "images_seen"])["lr_peak"].rank() == 2
    is_largest = tuned["params_total"] == tuned["params_total"].max()
    worse = tuned.assign(lr_peak=4 * tuned["lr_peak"], val_loss=1.04 * tuned["val_loss"])
    pd.concat([tuned[~is_largest], worse[is_largest & best]]).to_csv("off.csv", index=False)
    assert exit_code(f"{verb} off.csv {rest} --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuning"].startswith("the largest size lost 4.")
    if verb == "fit":
        assert exit_code("fit tuned.csv --json") == 0
        whole = json.loads(capsys.readouterr().out)
        assert found["params"]["alpha"] == pytest.approx(whole["params"]["alpha"], rel=0.02)


@pytest.mark.parametrize("options", ["--ignore seed", "--measure val_loss --measure top1"])
def test_what_a_law_of_one_loss_cannot_use_is_refused(options: str, capsys: Any) -> None:
    assert exit_code(f"contrast two.csv --by recipe --as-law {options}") == 2
    assert "--as-law fits one loss" in capsys.readouterr().err
