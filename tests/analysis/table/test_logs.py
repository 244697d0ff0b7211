"""What other tools wrote while they trained is read as points; `fixtures` were made by these tools."""

import json
from pathlib import Path

import pandas as pd
import pytest

from aimscale.analysis import probe_frame, read_table
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.names import left_out_of

FIXTURES = Path(__file__).parent / "fixtures"


def loss(n: float, d: float) -> float:
    return 1.8 + 400 * n**-0.34 + 2000 * d**-0.37


@pytest.mark.parametrize(
    ("folder", "columns"),
    [
        ("mlruns", {"N": "model.params", "D": "tokens", "L": "eval/loss", "train_loss": "train/loss"}),
        ("tensorboard", {"N": "params", "D": "tokens", "L": "eval/loss", "train_loss": "train/loss"}),
        ("lightning_logs", {"N": "model.params", "D": "tokens"}),
    ],
)
def test_folders_of_runs_are_tables_of_points(folder, columns):
    frame = read_table(FIXTURES / folder, columns).sort_values(["params_total", "images_seen"])
    assert frame["params_total"].tolist() == [1e6] * 2 + [4e6] * 3
    assert frame["images_seen"].tolist() == [1e6, 2e6, 1e6, 2e6, 3e6]
    assert frame["status"].tolist() == ["during", "complete", "during", "during", "complete"]
    assert frame["run_id"].nunique() == 2
    assert set(frame["optimizer"]) == {"adam"}
    for row in frame.itertuples():
        assert row.train_loss == pytest.approx(loss(row.params_total, row.images_seen) + 0.1)
    ends = frame[frame["status"] == "complete"]
    assert ends["val_loss"].tolist() == pytest.approx([loss(1e6, 2e6), loss(4e6, 3e6)])


def test_marins_lines_are_flattened(tmp_path):
    line = {"config": {"model": {"hidden_dim": 512}}, "summary": {"parameter_count": 5e6, "eval/loss": 3.5}}
    (tmp_path / "tracker_metrics.jsonl").write_text(json.dumps({"run_path": "marin/one", **line}) + "\n")
    frame = read_table(tmp_path / "tracker_metrics.jsonl", {"N": "summary.parameter_count", "L": "summary.eval/loss"})
    names = ["run_id", "params_total", "val_loss", "config.model.hidden_dim"]
    assert frame[names].to_numpy().tolist() == [["marin/one", 5e6, 3.5, 512]]


def test_a_folder_without_runs_is_no_table(tmp_path):
    with pytest.raises(AnalysisError, match=r"results\.parquet"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("german.csv", "n;d;loss;note\n44M;1e9;3,250;a,b\n1,5B;2e9;diverged;\n;3e9;3,5;\n7B;4e9;diverged;x\n"),
        ("plain.csv", "n,d,loss\n44M,1e9,3.25\n1.5B,2e9,diverged\n,3e9,3.5\n7B,4e9,diverged\n"),
        ("tabs.tsv", "n\td\tloss\n44M\t1B\t3.25\n1.5B\t2B\tdiverged\n\t3G\t3.5\n7B\t4B\tdiverged\n"),
    ],
)
def test_numbers_are_read_as_people_write_them_and_words_in_a_loss_are_counted(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    frame = read_table(tmp_path / name, {"N": "n", "D": "d", "L": "loss", "C": "6*n*d"})
    assert frame["params_total"].dropna().tolist() == [44e6]
    assert frame["images_seen"].tolist() == [1e9, 3e9]
    assert frame["flops_train"].dropna().tolist() == [6 * 44e6 * 1e9]
    assert frame["val_loss"].tolist() == [3.25, 3.5]
    (left_out,) = left_out_of(frame)
    assert str(left_out) == "2 rows with 'diverged' in loss"


def test_per_cent_is_a_fraction(tmp_path):
    pd.DataFrame({"n": [1e6, 2e6], "acc": ["26.2 %", "30%"]}).to_csv(tmp_path / "t.csv", index=False)
    frame = read_table(tmp_path / "t.csv", {"N": "n", "L": "1-acc", "dtd:linear": "acc"})
    assert probe_frame(frame)["top1"].tolist() == pytest.approx([0.262, 0.3])
    assert frame["val_loss"].tolist() == pytest.approx([0.738, 0.7])
