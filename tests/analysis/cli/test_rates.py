"""`aimscale rates` and `contrast --as-law`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from aimscale.sweeps.cli.main import main

LINES = {
    "rates": "rates tuned.csv --label val_loss=Loss",
    "recipes": "contrast two.csv --by recipe=old --as-law --label C=FLOPs --label new=ours",
}


@pytest.fixture(autouse=True)
def tables(grid: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [grid.assign(lr_peak=0.003 * 2.0**k, val_loss=grid["val_loss"] * (1 + 0.01 * k**2)) for k in (-1, 0, 1)]
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


@pytest.mark.parametrize("options", ["--ignore seed", "--measure val_loss --measure top1"])
def test_what_a_law_of_one_loss_cannot_use_is_refused(options: str, capsys: Any) -> None:
    assert exit_code(f"contrast two.csv --by recipe --as-law {options}") == 2
    assert "--as-law fits one loss" in capsys.readouterr().err
