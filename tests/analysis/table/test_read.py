"""The results table: a round trip keeps every value, foreign tables map, and bad ones are refused in one sentence."""

import json

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.read import read_table
from aimscale.analysis.table.schema import COLUMNS, results_table, write_table
from aimscale.analysis.table.select import probe_frame

PROBE = {"task": "digits", "kind": "linear", "blocks": [1, 2], "num_classes": 10, "n": 100, "top1": 0.5, "margin": 3}
ROWS = [
    {"run_id": "a", "status": "complete", "images_seen": 100, "params_total": 10, "val_loss": 0.5, "probes": [PROBE]},
    {"run_id": "b", "status": "failed", "images_seen": 100, "params_total": None, "val_loss": None, "novel": [1]},
]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_round_trip_keeps_types_probes_and_unknown_keys(tmp_path, suffix):
    path = tmp_path / f"results{suffix}"
    write_table(results_table(ROWS), path)
    assert list(tmp_path.iterdir()) == [path]
    frame = read_table(path).frame
    assert list(frame.columns) == [column.name for column in COLUMNS]
    assert frame["images_seen"].dtype == np.int64
    assert frame["params_total"].dtype == np.float64
    assert np.isnan(frame["params_total"][1])
    assert json.loads(frame["extra"][1]) == {"novel": [1]}
    probes = probe_frame(frame)
    assert len(probes) == 1
    assert (probes["run_id"][0], probes["top1"][0], list(probes["blocks"][0])) == ("a", 0.5, [1, 2])
    assert json.loads(probes["extra"][0]) == {"margin": 3}
    write_table(results_table([ROWS[0] | {"novel": np.nan, "probes": [PROBE | {"top5": np.nan}]}]), path)
    again = read_table(path).frame
    assert (json.loads(again["extra"][0]), "NaN" in path.read_text(errors="ignore")) == ({"novel": None}, False)


def test_a_value_that_does_not_fit_is_refused_by_name():
    for name, row in (("images_seen", {"images_seen": 1.5}), ("probes", {"probes": [{"top1": "high"}]})):
        with pytest.raises(AnalysisError, match=f"'{name}'"):
            results_table([row])


@pytest.mark.parametrize(
    ("name", "content", "subject"),
    [
        ("absent.csv", None, "absent.csv"),
        ("empty.csv", "", "empty.csv"),
        ("headed.csv", "N,val_loss\n", "headed.csv"),
        ("words.csv", "N,val_loss\n1,0.5\nhigh,2\n", "'high' in row 2"),
        ("quote.csv", 'N,val_loss\n1,"2\n', "quote.csv"),
        ("cut.parquet", "PAR1 and then nothing", "cut.parquet"),
        ("cut.jsonl", '{"a": 1}\n{"a": ', "cut.jsonl"),
        ("results.xlsx", "x", "cannot read"),
        ("results.dta", "x", ".parquet, .csv, .tsv, .jsonl or .xlsx"),
        ("probes.csv", "val_loss,probes\n0.5,[1]\n", "'probes' of row 1"),
    ],
)
def test_bad_tables_are_refused_in_one_sentence(tmp_path, name, content, subject):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(AnalysisError) as caught:
        read_table(path)
    assert subject in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_newer_schema_is_refused(tmp_path):
    newer = results_table(ROWS).replace_schema_metadata({"aimscale_schema_version": "99"})
    write_table(newer, tmp_path / "results.parquet")
    with pytest.raises(AnalysisError, match="99"):
        read_table(tmp_path)


def test_a_missing_letter_is_asked_for_with_the_formula_that_counts_it(tmp_path):
    pd.DataFrame({"N": [1e6, 2e6], "flops": [1e15, 2e15], "loss": [3.0, 2.5]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(AnalysisError, match=r'columns=\{"D": "C/\(6\*N\)"\}'):
        fit(read_table(tmp_path / "t.csv", {"C": "flops", "L": "loss"}), "chinchilla")


def test_names_and_hashes_that_look_like_numbers_stay_texts(tmp_path):
    frame = pd.DataFrame({"run_id": ["1e5", "002"], "config_hash": ["24476e35", "12345678"], "val_loss": [1.0, 2.0]})
    frame.to_csv(tmp_path / "table.csv", index=False)
    frame.to_csv(tmp_path / "table.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "table.jsonl", orient="records", lines=True)
    for file in tmp_path.iterdir():
        found = read_table(file).frame
        assert (
            found[["run_id", "config_hash"]].to_numpy().tolist() == frame[["run_id", "config_hash"]].to_numpy().tolist()
        )
