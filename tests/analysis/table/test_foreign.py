"""Tables of others: their formats, their names, columns that can be computed, and the best of what they tuned."""

import contextlib
import inspect
import re

import numpy as np
import pandas as pd
import pytest
from commands import answer, refused, say

from aimscale.analysis import contrast, correlate, fit, forecast, frontier, rates, read_table, read_tables
from aimscale.analysis.display import in_command
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.columns import parse_columns
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.select import select

NAMES = {"N": "num_params", "D": "tokens", "L": "loss"}
COLUMNS = "N=num_params,D=tokens,L=loss"


@pytest.fixture
def theirs() -> pd.DataFrame:
    """5 sizes x 4 budgets x 3 rates; the middle rate is the best one everywhere but at the largest size."""
    rng = np.random.default_rng(0)
    rows = []
    for n in np.geomspace(1e7, 1e9, 5):
        for d in np.geomspace(1e8, 1e10, 4):
            for lr, worse in ((1e-4, 1.02 if n < 9e8 else 1.0), (3e-4, 1.0 if n < 9e8 else 1.01), (1e-3, 1.03)):
                loss = (1.8 + 400 * n**-0.34 + 2000 * d**-0.37) * worse * np.exp(1e-3 * rng.standard_normal())
                rows.append({"num_params": n, "tokens": d, "lr": lr, "loss": loss, "note": "x", "flops": 6 * n * d})
    return pd.DataFrame(rows)


def test_a_computed_column_may_need_an_earlier_one_take_odd_names_and_outgrow_int64(tmp_path):
    """6 N D of whole numbers was -7e18 by int64."""
    odd = {"mparams": [1000.0, 3000.0], "acc (val, all)": [0.25, 0.5], "D": [10**12, 2 * 10**12], "ppl": [np.e, 1.0]}
    pd.DataFrame({**odd, "n": [10**10, 2 * 10**10]}).to_csv(tmp_path / "odd.csv", index=False)
    given = ["N=mparams*1e6,C=6*N*D", "L=1-`acc (val, all)`", "nats=log(ppl),bits=nats/log(2),acc=acc (val, all)"]
    df = read_tables([tmp_path / "odd.csv"], parse_columns(given), where=["C>6e21", "bits<1"])
    assert df[["params_total", "flops_train", "val_loss", "nats", "acc"]].to_numpy().tolist() == [
        [3e9, 3.6e22, 0.5, 0.0, 0.5]
    ]
    assert read_table(tmp_path / "odd.csv", {"C": "6*n*D"})["flops_train"].tolist() == [6e22, 24e22]
    for columns in ({"C": "6*N*D", "N": "C/6/D"}, {"L": "x=ppl"}):
        with pytest.raises(AnalysisError, match="no formula"):
            read_table(tmp_path / "odd.csv", columns)


@pytest.fixture
def lettered(theirs) -> pd.DataFrame:
    """The same with two seeds, its columns called N, D, C and L."""
    names = {"num_params": "N", "tokens": "D", "flops": "C", "loss": "L"}
    rng = np.random.default_rng(1)
    seeds = [theirs.assign(seed=s, loss=theirs["loss"] * np.exp(1e-3 * rng.standard_normal(60))) for s in (0, 1)]
    return pd.concat(seeds).rename(columns=names)


def test_columns_called_by_a_letter_are_known(lettered, tmp_path):
    lettered.to_csv(tmp_path / "lettered.csv", index=False)
    lettered.rename(columns=str.lower).rename(columns={"l": "Loss, last"}).to_csv(tmp_path / "named.csv", index=False)
    named = read_table(tmp_path / "named.csv", parse_columns(["N=n, D=d,C=c", "val_loss=Loss, last"]))
    assert {"params_total", "images_seen", "flops_train", "val_loss"} <= set(named)
    pd.testing.assert_frame_equal(read_table(tmp_path / "lettered.csv").frame, named.frame, check_like=True)


def test_everything_else_equal_counts_their_sizes_and_settings(lettered, tmp_path):
    """Pairs and cells agree in N where no size is named, and in rates and words; not in the names of runs."""
    named = lettered.drop(columns="C").assign(
        run=lambda df: [f"{n:g}-{s}" for n, s in zip(df["N"], df["seed"], strict=True)]
    )
    both = pd.concat([named.assign(data="a"), named.assign(data="b", L=1.02 * named["L"])])
    both["tags"] = both["data"].map(lambda data: [data])
    both.to_json(tmp_path / "both.jsonl", orient="records", lines=True)
    words = say("contrast", tmp_path / "both.jsonl", "--by", "data")
    assert "equal        N, seed, D, lr\n" in words
    assert "1.0200 [1.0200, 1.0200]" in words
    assert "30 pairs" in words
    assert "12 pairs" in say("contrast", tmp_path / "both.jsonl", "--by", "N")
    one = both[both["seed"] == both["data"].map({"a": 0, "b": 1})]
    one.to_json(tmp_path / "both.jsonl", orient="records", lines=True)
    with pytest.raises(AnalysisError, match=r"seed \(0 against 1\).*ignore"):
        say("contrast", tmp_path / "both.jsonl", "--by", "data")


def test_a_column_of_a_letter_gives_way_to_the_one_that_was_named(lettered, tmp_path):
    layers = lettered.rename(columns={"L": "loss", "N": "all"}).assign(L=12, N=lettered["N"] / 2, C="cluster-a")
    layers.to_csv(tmp_path / "layers.csv", index=False)
    df = read_table(tmp_path / "layers.csv", {"L": "loss", "N": "all"})
    assert df["val_loss"].max() < 10
    assert set(df["their L"]) == {12}
    assert set(df["C"]) == {"cluster-a"}
    assert fit(df, "chinchilla").ranges["N"][1] == pytest.approx(1e9)


def test_their_names_are_kept_in_words_figures_and_conditions(theirs, tmp_path):
    theirs.to_csv(tmp_path / "theirs.csv", index=False)
    df = select(read_table(tmp_path / "theirs.csv", NAMES), ["num_params<9e8", "lr=3e-4"])
    result = fit(df, "chinchilla")
    words = " ".join(result.sentences())
    assert "L = loss, N = num_params, D = tokens." in words
    assert not any(ours in words for ours in ("head included", "images", "params_total", "val_loss"))
    (ax,) = result.plot().axes
    labels = (ax.get_xlabel(), ax.get_ylabel(), ax.figure.legends[0].get_title().get_text())
    assert labels == ("N: num_params", "loss", "D: tokens")


def test_what_is_said_of_their_rows_has_their_names(theirs, tmp_path):
    some = theirs.drop(columns="flops")
    some.loc[0, "num_params"], some.loc[1, "loss"] = np.nan, np.inf
    some.assign(pool=np.where(some["lr"] > 5e-4, some["tokens"], some["tokens"] / 2)).to_csv(tmp_path / "theirs.csv")
    args = [tmp_path / "theirs.csv", "--columns", COLUMNS + ",U=pool"]
    found = answer("fit", *args, "--y", "loss", "--hold-out", "tokens")
    left_out = [(each["subject"], each["number"]) for each in found["exclusions"]]
    assert left_out[:2] == [("num_params", 1), ("loss", 1)]
    assert "pool" in {flag["subject"] for flag in found["flags"]}
    with pytest.raises(AnalysisError, match=r'columns=.*"C": "THEIRS"'):
        say("fit", *args, "--law", "power_offset:C", "--where", "envelope")


def test_rows_that_differ_in_any_column_are_no_repeats():
    df = pd.DataFrame(
        {"N": [1e6, 1e6, 2e6, 4e6, 8e6, 1e6], "y": [3.0, 3.0, 2.0, 1.5, 1.2, 3.0], "data": list("abaaaa")}
    )
    result = fit(df, "power:N", y="y")
    assert [str(e) for e in result.exclusions] == ["1 row that repeat another row exactly"]
    assert result.num_points == 5


@pytest.mark.parametrize(
    ("mistake", "in_python", "typed"),
    [
        (lambda df: fit(df.drop(columns="N"), "chinchilla"), 'columns={"N": "THEIRS"}', "--columns N=THEIRS"),
        (lambda df: select(Runs(df), ["lr>1"]), 'where=["lr>1"]', "--where 'lr>1'"),
        (lambda df: correlate(df), 'columns={"TASK:KIND": "THEIRS"}', "--columns TASK:KIND=THEIRS"),
        (lambda df: contrast(df, by="lr", measures=["los"]), 'columns={"TASK:KIND": "THEIRS"}', "loss"),
    ],
)
def test_an_error_names_options_as_its_reader_types_them(theirs, mistake, in_python, typed):
    df = theirs.rename(columns={"num_params": "N"})
    said = []
    for context in (contextlib.nullcontext(), in_command()):
        with context, pytest.raises(AnalysisError) as error:
            mistake(df)
        said.append(str(error.value))
    assert in_python in said[0]
    assert "--" not in said[0]
    assert typed in said[1]


def test_a_table_without_our_names_is_answered_with_the_columns_that_are_meant(theirs, tmp_path):
    """Typed as it stands, the answer is what the table needs: the fit equals that of numbers under our names."""
    in_units = theirs.assign(**{"Params (M)": theirs["num_params"] / 1e6, "images in billions": theirs["tokens"] / 1e9})
    in_units = in_units.assign(image_size=224, train_loss=1.0)
    in_units = in_units[["image_size", "train_loss", "images in billions", "Params (M)", "lr", "loss"]]
    in_units.to_csv(tmp_path / "theirs.csv", index=False)
    answer_given = refused("fit", tmp_path / "theirs.csv")
    (columns,) = re.findall(r"by --columns '([^']+)'", answer_given)
    assert columns == "N=`Params (M)`*1e6,D=`images in billions`*1e9,L=loss"
    ours = fit(theirs.rename(columns={"num_params": "N", "tokens": "D", "loss": "L"})[["N", "D", "L", "lr"]])
    typed = fit(read_table(tmp_path / "theirs.csv", parse_columns([columns])))
    assert ours.columns["y"] == "L", "a frame's own letter is the loss"
    assert typed.params.to_dict() == pytest.approx(ours.params.to_dict(), rel=1e-6)
    with pytest.raises(AnalysisError, match=re.escape('by columns={"N": "`Params (M)`*1e6", "D"')):
        fit(in_units)
    with pytest.raises(AnalysisError, match=re.escape('by columns={"N": "THEIRS"}')):
        fit(theirs[["lr", "loss", "tokens"]])


def test_some_names_stand_in_an_error_the_nearest_first():
    df = pd.DataFrame({f"column_{k:02}": [1.0, 2.0] for k in range(40)} | {"learning_rate": [1.0, 2.0]})
    with pytest.raises(AnalysisError) as error:
        correlate(df, x="zz", y="column_01")
    assert len(re.findall(r"column_\d\d", str(error.value))) <= 16
    with pytest.raises(AnalysisError, match=r"Lerning_rate'.*did you mean learning_rate"):
        correlate(df, x="Lerning_rate", y="column_01")
    with pytest.raises(AnalysisError, match="N of L = E"):
        fit(df, "chinchilla")


def test_other_runs_of_an_equal_id_are_counted_and_repeats_of_one_run_are_not(theirs, tmp_path):
    """Numbers as ids are equal in any two tables; a run that stands in both is read once, silently."""
    one = theirs.assign(run_id=range(len(theirs)))
    other = one.assign(loss=one["loss"].where(one.index < 57, 1.01 * one["loss"]))
    for name, rows in (("one", one), ("other", other)):
        rows.to_csv(tmp_path / f"{name}.csv", index=False)
    both = read_tables([tmp_path / "one.csv", tmp_path / "other.csv"], parse_columns([COLUMNS]))
    assert len(both) == 60
    assert [(each.kind, each.number) for each in both.exclusions] == [("repeat", 3)]
    assert not read_tables([tmp_path / "one.csv", tmp_path / "one.csv"], parse_columns([COLUMNS])).exclusions


def test_per_cents_are_measurements_and_words_are_settings(theirs, tmp_path):
    cells = theirs["loss"].map(lambda loss: f"{100 - 10 * loss:.0f} %")
    theirs.assign(hella=cells, optimizer=theirs.index % 2).replace({"optimizer": {0: "adam", 1: "muon"}}).to_csv(
        tmp_path / "theirs.csv", index=False
    )
    found = read_table(tmp_path / "theirs.csv", parse_columns([COLUMNS])).settings()
    assert {"hella", "optimizer"} & {*found} == {"optimizer"}


def test_what_to_run_next_keeps_the_loss_that_was_named_and_runs(theirs, tmp_path):
    table = tmp_path / "theirs.csv"
    theirs.rename(columns={"loss": "bits"}).to_csv(table, index=False)
    given = f"{table} --columns N=num_params,D=tokens,C=flops --y bits"
    last = say("fit", *given.split()).splitlines()[-1]
    assert last == f"next: aimscale frontier {given}", "a report needs val_loss"
    say(*last.split()[2:])


def test_a_rate_that_is_logged_beside_every_step_is_no_setting(theirs):
    """A schedule's rate was taken for a tuned one: 591 of 1,002 rows of a table were dropped as not the best."""
    curves = theirs[theirs["lr"] == 3e-4].drop(columns="lr").reset_index(drop=True)
    scheduled = curves.assign(run_id=(curves.index // 4).astype(str), lr=np.linspace(1e-3, 1e-5, len(curves)))
    assert "lr" not in Runs(scheduled).tuned_columns()
    assert fit(scheduled, columns=NAMES, y="loss").num_points == len(curves)
    assert Runs(theirs).tuned_columns() == ["lr"]


def test_what_scale_determines_or_losses_ignore_is_no_mixture(theirs, tmp_path):
    """`color` and `chinchilla_multiple` were called varied designs; following the advice destroyed the fit."""
    grid = theirs[theirs["lr"] == 3e-4]
    ratio = (grid["tokens"] / grid["num_params"] / 20).round(3).astype(str) + "xC"
    colors = pd.qcut(grid["loss"], 8, labels=[f"#{i}{i}{i}" for i in range(8)]).astype(str)
    apart = np.arange(len(grid)) % 2
    plain = grid.assign(chinchilla_multiple=ratio, color=colors, side=np.where(apart, "left", "right"))
    plain.to_csv(tmp_path / "plain.csv", index=False)
    flags = answer("fit", tmp_path / "plain.csv", "--columns", COLUMNS)["flags"]
    assert "mixed" not in {each["kind"] for each in flags}
    plain.assign(loss=plain["loss"] * (1 + 0.05 * apart)).to_csv(tmp_path / "mixed.csv", index=False)
    flags = answer("fit", tmp_path / "mixed.csv", "--columns", COLUMNS)["flags"]
    assert "side" in {each["subject"] for each in flags if each["kind"] in ("mixed", "experiments")}


def test_pairs_share_scales_to_a_thousandth_and_neither_names_nor_what_scales_were_counted_from():
    """Five tries at LAION's table: D differed in its last digits, a name in every row, and two columns made of D."""
    rows = [
        {"arch": f"B-{n:.0f}", "gmacs": n, "seen": d * (1 + 1e-9 * i), "total": n * d, "acc": 0.5 + 0.01 * i + n / 1e3}
        for n in (4.0, 17.0, 40.0)
        for d in (3e9, 13e9)
        for i in (0, 1)
    ]
    table = pd.DataFrame(rows).assign(data=["a", "b"] * 6, name=[f"Model-{i}" for i in range(12)])
    columns = {"N": "gmacs", "D": "seen", "C": "total*2", "L": "1-acc"}
    result = contrast(table, by="data", baseline="a", columns=columns)
    assert result.table["num_pairs"].tolist() == [6]
    assert result.table["difference"].tolist() == pytest.approx([-0.01])


def test_outliers_are_named_and_dropped_only_when_asked_and_said(theirs, tmp_path):
    grid = theirs[theirs["lr"] == 3e-4].reset_index(drop=True).assign(run_id=[f"run-{i}" for i in range(20)])
    grid.loc[[3, 11], "loss"] *= 1.3
    law = fit(grid, columns=NAMES, y="loss")
    assert sorted(law.outliers) == [3, 11]
    (flag,) = [each for each in law.flags if each.kind == "outliers"]
    assert "run-3" in str(flag)
    assert "run-11" in str(flag)
    clean = fit(grid, columns=NAMES, y="loss", drop_outliers=True)
    assert (law.num_points, clean.num_points) == (20, 18)
    assert "rows 3 (run-3), 11 (run-11)" in str(clean.exclusions) or "run-11" in str(clean.exclusions[-1])
    grid.to_csv(tmp_path / "t.csv", index=False)
    assert "2 rows beyond 6 robust" in say("fit", tmp_path / "t.csv", "--columns", COLUMNS, "--drop-outliers")


def test_a_fit_without_a_likelihood_has_none_and_can_be_looked_through(theirs):
    law = fit(theirs, columns=NAMES, y="loss")
    assert not hasattr(law, "aic")
    assert {"params", "outliers"} <= {name for name, _ in inspect.getmembers(law)}


def test_every_function_that_takes_a_table_takes_columns(theirs):
    grid = theirs[theirs["lr"] == 3e-4].drop(columns=["lr", "note"])
    names = {**NAMES, "C": "flops"}
    assert forecast(grid, "N=1e10,D=1e11", columns=names).table["value"].notna().all()
    assert not frontier(grid, columns=names).table.empty
    assert correlate(grid, x="L", y="flops", columns=names).table.shape[0]
    assert rates(theirs, lr="lr", columns=names).table.shape[0]


def test_a_label_that_no_figure_shows_does_not_cost_the_result(theirs, tmp_path, capsys):
    theirs.to_csv(tmp_path / "t.csv", index=False)
    words = ("fit", tmp_path / "t.csv", "--columns", COLUMNS)
    assert "N=Parameters" in refused(*words, "--figure", tmp_path / "f", "--label", "N")
    assert "--figure" in refused(*words, "--label", "N=Parameters")
    assert "gmacs" in refused(*words, "--figure", tmp_path / "f", "--label", "gmacs=Size")
    assert "alpha" in capsys.readouterr().out
