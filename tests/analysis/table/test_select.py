"""Several tables as one, rows by condition, and which rows make one experiment."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis.display import human, told_apart
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.plots.style import series_of
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.schema import FOLDER
from aimscale.analysis.table.select import fresh_part, lower_envelope, main_part, mixture_flags, read_tables, select


def write(folder, frame):
    folder.mkdir()
    frame.to_parquet(folder / "results.parquet")
    return folder


def test_tables_are_joined_and_a_shared_run_counts_once(known_study, tmp_path):
    main = known_study({"sizes": ["s1", "s2"]})
    other = known_study({"sizes": ["s2"]}, {"sizes": ["s2"], "prefix": "none"})
    half = main.assign(status=np.where(main["size"] == "s2", "unfinished", "complete"))
    half.loc[half["size"] == "s2", "val_loss"] = np.nan
    df = read_tables([write(tmp_path / "main", half), write(tmp_path / "other", other)])
    assert len(df) == len(main) + len(other) // 2
    assert df["val_loss"].notna().all()
    assert set(df[FOLDER]) == {str(tmp_path / "main"), str(tmp_path / "other")}
    assert (df.frame.groupby(["run_id", "images_seen"]).size() == 1).all()
    with pytest.raises(AnalysisError):
        read_tables([])


def test_rows_are_chosen_by_words_numbers_and_letters(known_study):
    df = known_study({"sizes": ["s1", "s2", "s3"]}, {"sizes": ["s1"], "prefix": "none"})
    assert set(select(Runs(df), ["prefix=none"])["size"]) == {"s1"}
    assert set(select(Runs(df), ["size!=s1"])["size"]) == {"s2", "s3"}
    assert set(select(Runs(df), ["size=s1|s2", "D>=16000"])["images_seen"]) == {16000, 32000, 64000}
    assert set(select(Runs(df), ["seed = 1.0"])["seed"]) == {1}
    assert len(select(Runs(df), ["images_seen<8000"])) == len(df) // 5
    for condition in ("prefix", "prefx=none", "prefix=uniform", "prefix>=2", "seed<=one"):
        with pytest.raises(AnalysisError, match=condition):
            select(Runs(df), [condition])


def mixed(frame, variables):
    return [(flag.subject, flag.number) for flag in mixture_flags(Runs(frame), list(variables))]


def test_the_main_experiment_is_the_one_with_most_cells(known_study):
    grid, direction = {"sizes": ["s1", "s2", "s3"], "seeds": [0]}, {"sizes": ["s1"], "seeds": list(range(20))}
    df = known_study(grid, direction | {"prefix": "none"}, {"sizes": ["s1"], "uniques": [1000]})
    assert Runs(df).design_columns() == ["prefix"]
    part, words = main_part(Runs(df))
    assert (set(part["prefix"]), words, len(df) - len(part)) == ({"paired"}, "prefix paired", 100)
    fresh, words = fresh_part(Runs(part))
    assert (set(fresh["unique_images"]), words) == ({64000}, "64,000 unique images")
    assert mixed(df, "ND") == [("prefix", 2), ("unique_images", 2)]
    assert mixed(known_study(grid), "ND") == []
    assert mixed(known_study(grid), "N") == [("images_seen", 5)]
    assert mixed(known_study(grid), "D") == [("params_total", 3)]
    assert mixed(known_study(grid), "C") == []
    assert mixed(part, "NDU") == []


def test_a_pool_seen_many_times_gives_way_to_rows_that_see_theirs_few_times(known_study):
    worn = {"seeds": [0], "uniques": [1000]}
    fresh = [{"seeds": [0], "budgets": [seen], "uniques": [seen]} for seen in (4000, 8000, 16000, 32000)]
    part, words = fresh_part(Runs(known_study(worn, *fresh)))
    assert (words, len(part)) == ("at most 4 passes over their pool", 30)
    assert part["epochs"].max() == 4
    assert set(fresh_part(Runs(known_study(worn, *fresh[:1])))[0]["unique_images"]) == {1000}
    assert mixed(known_study(*fresh), "ND") == []
    assert mixed(known_study(*fresh, worn), "ND") == [("unique_images", 5)]


def test_words_settings_and_folders_of_others_tell_experiments_apart(known_study):
    one, other = known_study({"seeds": [0]}), known_study({"seeds": [1], "effect": 0.02})
    for frame, folder, words in ((one, "a", "adam"), (other, "b", "muon")):
        frame[FOLDER], frame["optimizer"], frame["dropout"], frame["clip"] = folder, words, 0.1 * (words == "muon"), 1
        frame["width"], frame["lr"] = np.sqrt(frame["params_total"]), 1e-3 * (1 + frame["seed"])
        frame["run"] = [f"{row.size}-{row.seed}-{folder}" for row in frame.itertuples()]
    both = pd.concat([one, other], ignore_index=True)
    assert Runs(both).experiment_columns() == ["optimizer"]  # the first of three that part the rows alike
    alone = both[["params_total", "images_seen", "val_loss", "optimizer", "width", "run", "lr"]]
    assert Runs(alone).experiment_columns() == ["optimizer"]
    assert mixed(alone, "ND") == [("optimizer", 2)]
    assert mixed(both.drop(columns=["optimizer", "dropout", "lr"]), "ND") == [(FOLDER, 2)]
    assert mixed(alone.drop(columns=["optimizer", "lr"]).assign(**{FOLDER: both[FOLDER]}), "ND") == [(FOLDER, 2)]


@pytest.mark.parametrize("name", [FOLDER, "sweep"])
def test_sweeps_of_one_experiment_are_no_mixture(known_study, name):
    """Nor are those that share no cell, of which the rows cannot tell."""
    one, other = known_study({"seeds": [0]}), known_study({"seeds": [1]})
    assert mixed(pd.concat([one.assign(**{name: "a"}), other.assign(**{name: "b"})], ignore_index=True), "ND") == []
    empty = other.assign(**{name: "b", "val_loss": np.nan})
    assert mixed(pd.concat([one.assign(**{name: "a"}), empty], ignore_index=True), "ND") == []
    apart = known_study({"seeds": [1], "budgets": [5000, 9000], "effect": 0.02})
    assert mixed(pd.concat([one.assign(**{name: "a"}), apart.assign(**{name: "b"})], ignore_index=True), "ND") == []


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "board").glob("*.csv")), ids=lambda p: p.stem)
def test_no_public_table_of_one_experiment_is_called_a_mixture_or_tuned(path):
    df = read_tables([path], {"L": "loss"})
    assert mixed(df, "ND") == ([("U", 27)] if path.stem == "data-constrained-all" else [])
    assert len(usable_rows(Runs(df), best_by="val_loss").rows) == len(df)


def test_sizes_that_print_alike_stay_two():
    near = pd.DataFrame({"params_total": [1.0001e9, 1.0002e9, 1e5, 2e9], "images_seen": 1e9, "val_loss": 1.0})
    assert list(Runs(near).with_size()["size"]) == ["1.0001e+09", "1.0002e+09", "1e+05", "2e+09"]
    assert told_apart([1234567890, 1234567891, 5.0], human, 3) == ["1.23456789B", "1.234567891B", "5"]
    labels, _ = series_of(near.assign(params_total=near["params_total"] + [0, 1 - 1e5, 0, 0]), "params_total")
    assert len(set(labels)) == 4


def test_a_series_of_several_sizes_is_called_by_its_ends():
    sizes = [24e3, 31e3, 48e3, 57e3, 92e3, 134e3, 224e3, 299e3, 453e3]
    labels, values = series_of(pd.DataFrame({"params_total": sizes}), "params_total")
    assert list(labels[:3]) == ["24k–31k", "24k–31k", "48k"]
    assert values["24k–31k"] == pytest.approx(np.sqrt(24e3 * 31e3))


def test_the_envelope_keeps_what_no_cheaper_row_undercuts():
    df = pd.DataFrame({"flops_train": [1.0, 2, 3, 4, 5], "val_loss": [5.0, np.nan, 6, 4, 4]}).sample(frac=1)
    assert sorted(lower_envelope(Runs(df))["flops_train"]) == [1, 4]
    running = pd.DataFrame({"flops_train": [1.5], "val_loss": [0.1], "status": "unfinished"})
    assert sorted(lower_envelope(Runs(pd.concat([df, running], ignore_index=True)))["flops_train"]) == [1, 4]


def test_rows_that_are_chosen_by_their_loss_are_flagged():
    """`--where envelope` selected on the loss, and printed intervals without a word."""
    rng = np.random.default_rng(0)
    flops = np.repeat(10.0 ** np.arange(5), 4)
    frame = pd.DataFrame({"flops_train": flops, "val_loss": 3 - 0.1 * np.log10(flops) + rng.normal(0, 0.05, 20)})
    chosen = select(Runs(frame), ["envelope"])
    assert [flag.kind for flag in mixture_flags(Runs(chosen), ["C"])] == ["by_loss"]
    assert [flag.kind for flag in mixture_flags(Runs(frame), ["C"])] == []
