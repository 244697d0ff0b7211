"""Data transferred: a planted law comes back, nothing is told of nothing, and no number goes beyond its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tables import KNOWN

from aimscale import analysis
from aimscale.analysis.effects.transfer import BEYOND, Transfer, transfer
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws import CHINCHILLA
from aimscale.analysis.table.select import main_part, mixture_flags
from aimscale.sweeps.cli.main import main

WORTH = {"k": 0.8, "a": 0.3, "b": 0.6}


def losses(
    worth: dict[str, float] = WORTH, *, noise: float = 1e-4, warm: tuple[float, float, int] = (1e5, 8e5, 4), **more: Any
) -> pd.DataFrame:
    """Losses from scratch and warm ones, whose data count as D + k D^a N^b."""
    rng, parts = np.random.default_rng(0), []
    for init, budgets in (("scratch", (1e5, 3e6, 5)), ("warm", warm)):
        n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(*budgets)))
        moved = worth["k"] * d ** worth["a"] * n ** worth["b"] if init == "warm" else 0.0
        loss = CHINCHILLA.value({"N": n, "D": d + moved}, KNOWN) * np.exp(noise * rng.standard_normal(n.size))
        parts.append(pd.DataFrame({"N": n, "D": d, "val_loss": loss, "init": init}))
    return pd.concat(parts, ignore_index=True).assign(**more)


def test_a_planted_law_comes_back_with_every_amount(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (found,) = transfer(losses())
    assert found.is_told
    assert found.law is not None
    ends = found.law.conf_int()
    for name, value in WORTH.items():
        assert found.law.params[name] == pytest.approx(value, rel=0.05)
        assert ends.loc[name, "lower"] < value < ends.loc[name, "upper"]
    rows = found.table
    exact = WORTH["k"] * rows["D_F"] ** WORTH["a"] * rows["N"] ** WORTH["b"]
    assert (rows["kind"] == "told").all()
    assert rows["D_E"].to_numpy() == pytest.approx((exact + rows["D_F"]).to_numpy(), rel=0.01)
    assert (rows["D_T_lo"].le(exact) & rows["D_T_hi"].ge(exact)).mean() > 0.9
    assert found.times[0] == pytest.approx(np.exp(np.log1p(exact / rows["D_F"]).mean()), rel=0.1)
    losses().to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(SystemExit) as end:
        main(["contrast", str(tmp_path / "t.csv"), "--by", "init", "--transfer", "--json"])
    assert end.value.code in (0, None)
    told = json.loads(capsys.readouterr().out)
    assert told["times"] == pytest.approx(found.times)
    assert told["data"] == "images_seen"


def test_nothing_is_told_of_a_start_that_is_worth_nothing() -> None:
    (found,) = transfer(losses({"k": 0.0, "a": 0.0, "b": 0.0}, noise=0.003))
    assert not found.is_told
    assert found.law is None
    assert "is not known to be worth data" in found.headline()


def test_no_number_lies_beyond_ten_times_the_data_from_scratch() -> None:
    (found,) = transfer(losses({"k": 1e8, "a": 0.0, "b": 0.0}))
    rows = found.table
    assert (rows["kind"] == "at least").all()
    assert rows[["D_E", "D_T", "D_T_hi"]].isna().all(axis=None)
    assert (rows["D_T_lo"] + rows["D_F"]).max() <= BEYOND * 3e6 * (1 + 1e-9)
    assert found.law is None
    assert [flag.kind for flag in found.flags if flag.kind == "beyond"]
    assert "at least" in found.headline()


def test_one_size_has_a_law_of_data_alone() -> None:
    one = losses(noise=1e-5)
    (found,) = transfer(one[one["N"] == one["N"].max()])
    assert found.law is not None
    k = WORTH["k"] * one["N"].max() ** WORTH["b"]
    assert found.law.params[["k", "a"]].tolist() == pytest.approx([k, WORTH["a"]], rel=0.2)
    assert found.is_told
    assert "N^b" not in dict(found.facts())["law"]


def test_losses_above_all_from_scratch_have_an_upper_end_alone() -> None:
    (found,) = transfer(losses({"k": 100.0, "a": 0.0, "b": 0.0}, warm=(1e3, 1e4, 3)))
    assert (found.table["kind"] == "at most").all()
    assert found.table[["D_E", "D_T", "D_T_lo"]].isna().all(axis=None)


def test_d_counts_different_images_where_their_number_varies() -> None:
    seen = losses()
    passes = pd.concat([seen.assign(U=seen["D"], D=seen["D"] * times, val_loss=seen["val_loss"] * loss)
                        for times, loss in ((1, 1.2), (4, 1.0), (9, 1.1))])  # fmt: skip
    (found,) = transfer(passes.reset_index(drop=True).rename(columns={"U": "unique_images"}))
    (expected,) = transfer(seen)
    assert found.data == "unique_images"
    assert found.table["D_T"].to_numpy() == pytest.approx(expected.table["D_T"].to_numpy(), rel=1e-6)


def test_warm_rows_are_another_experiment() -> None:
    ours = losses().assign(schema_version=1, seed=0).replace({"init": {"scratch": None}})
    runs = analysis.Runs(ours.rename(columns={"N": "params_total", "D": "images_seen"}))
    assert runs.design_columns() == ["init"]
    part, words = main_part(runs)
    assert words == "init scratch"
    assert set(part["init"]) == {"scratch"}
    assert [flag.subject for flag in mixture_flags(runs, ("N", "D"))] == ["init"]
    alone = analysis.Runs(ours[ours["init"].isna()])
    assert alone["init"].isna().all(), "a table without warm runs stays as it is"


def test_a_table_of_one_start_is_refused() -> None:
    with pytest.raises(AnalysisError, match="alone has rows"):
        transfer(losses().query("init == 'warm'"))
    assert isinstance(transfer(losses(), by="init", baseline="scratch")[0], Transfer)
