"""Tables of others: their formats, their names, columns that can be computed, and the best of what they tuned."""

import contextlib
import re

import numpy as np
import pandas as pd
import pytest
from commands import answer, say

from aimscale.analysis import contrast, correlate, fit, read_table, read_tables
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
