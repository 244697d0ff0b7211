"""What other tools wrote is read as a table; `fixtures` were made by them. Own exports: tests/harness/log."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import say

from aimscale.analysis import fit, probe_frame, read_table, read_tables
from aimscale.analysis.errors import AnalysisError

FIXTURES = Path(__file__).parent / "fixtures"
SIZES, TOKENS = np.geomspace(1e7, 1e9, 5), np.geomspace(1e8, 1e10, 4)


def loss(n: float, d: float) -> float:
    return 1.8 + 400 * n**-0.34 + 2000 * d**-0.37


@pytest.mark.parametrize(
    ("folder", "columns"),
    [
        ("mlruns", {"N": "model.params", "D": "tokens", "L": "eval/loss", "train_loss": "train/loss"}),
        ("mlflow.sql", {"N": "model.params", "D": "tokens", "L": "eval/loss", "train_loss": "train/loss"}),
        ("tensorboard", {"N": "params", "D": "tokens", "L": "eval/loss", "train_loss": "train/loss"}),
        ("lightning_logs", {"N": "model.params", "D": "tokens"}),
    ],
)
def test_folders_of_runs_are_tables_of_points(folder, columns, tmp_path):
    if folder == "tensorboard":
        pytest.importorskip("tensorboard")  # analysis alone is installed without it
    if folder == "mlflow.sql":
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
            store.executescript((FIXTURES / folder).read_text())
            store.execute("UPDATE runs SET name = 'baseline'")  # names are nobody's identity
            store.commit()
    runs = read_table(tmp_path if folder == "mlflow.sql" else FIXTURES / folder, columns)
    frame = runs.frame.sort_values(["params_total", "images_seen"])
    assert frame["params_total"].tolist() == [1e6] * 2 + [4e6] * 3
    assert frame["images_seen"].tolist() == [1e6, 2e6, 1e6, 2e6, 3e6]
    assert frame["status"].tolist() == ["during", "complete", "during", "during", "complete"]
    assert frame["run_id"].nunique() == 2
    assert set(frame["optimizer"]) == {"adam"}
    for row in frame.itertuples():
        assert row.train_loss == pytest.approx(loss(row.params_total, row.images_seen) + 0.1)
    ends = frame[frame["status"] == "complete"]
    assert ends["val_loss"].tolist() == pytest.approx([loss(1e6, 2e6), loss(4e6, 3e6)])


def test_runs_of_one_name_in_two_folders_are_two(tmp_path):
    """Lightning calls every folder's first run `version_0`; the second folder's runs were dropped as repeats."""
    for name in ("a", "b"):
        shutil.copytree(FIXTURES / "lightning_logs", tmp_path / name)
    both = read_tables([tmp_path / "a", tmp_path / "b"], {"N": "model.params", "D": "tokens"})
    assert (both["run_id"].nunique(), len(both)) == (4, 10)


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
    (left_out,) = frame.exclusions
    assert str(left_out) == "2 rows with 'diverged' in loss"


def test_per_cent_is_a_fraction(tmp_path):
    pd.DataFrame({"n": [1e6, 2e6], "acc": ["26.2 %", "30%"]}).to_csv(tmp_path / "t.csv", index=False)
    frame = read_table(tmp_path / "t.csv", {"N": "n", "L": "1-acc", "dtd:linear": "acc"})
    assert probe_frame(frame)["top1"].tolist() == pytest.approx([0.262, 0.3])
    assert frame["val_loss"].tolist() == pytest.approx([0.738, 0.7])


def test_the_runs_table_leaves_out_what_crashed_and_is_fitted(tmp_path: Path) -> None:
    runs = [
        {"Name": f"run-{i}", "State": "finished", "Notes": "-", "Tags": "a,b", "Created": f"2026-01-01T00:00:{i:02}Z"}
        | {"Runtime": 10.5 * i, "model.params": n, "tokens": d, "val/loss": loss(n, d), "images_seen": 7}
        for i, (n, d) in enumerate((n, d) for n in SIZES for d in TOKENS)
    ]
    crashed = [{**runs[0], "Name": "bad", "State": "crashed", "val/loss": 9.0}]
    path = tmp_path / "wandb_export_2026-01-02T03_04_05.678+00_00.csv"
    pd.DataFrame([*runs, *crashed]).to_csv(path, index=False)
    table = read_table(path, {"N": "model.params", "D": "tokens", "L": "val/loss"})
    result = fit(table, "chinchilla")
    assert result.params["alpha"] == pytest.approx(0.34, abs=1e-3)
    assert [(each.kind, each.number) for each in result.exclusions] == [("status", 1)]
    columns = "N=model.params,D=tokens,L=val/loss"
    assert "20 of 21: 5 sizes, 4 budgets\n" in say("fit", path, "--columns", columns)


def test_the_apis_dictionaries_are_columns(tmp_path: Path) -> None:
    """As W&B's guide writes them, in a CSV; and the lines of a history."""
    runs = {
        "summary": [{"loss": 2.5, "_wandb": {"runtime": 9}}, {"loss": 2.25}],
        "config": [{"model": {"width": 64}, "n": 1000}, {"model": {"width": 128}, "n": 4000}],
        "name": ["one", "two"],
    }
    pd.DataFrame(runs).to_csv(tmp_path / "project.csv")
    table = read_table(tmp_path / "project.csv", {"N": "config.n", "L": "summary.loss"})
    columns = ["run_id", "params_total", "val_loss", "config.model.width"]
    assert table[columns].to_numpy().tolist() == [["one", 1000, 2.5, 64], ["two", 4000, 2.25, 128]]
    line = {"_step": 3, "config": {"n": 5}, "val/loss": 2.0, "tokens": 100}
    pd.DataFrame([line]).to_json(tmp_path / "history.jsonl", orient="records", lines=True)
    table = read_table(tmp_path / "history.jsonl", {"N": "config.n", "D": "tokens", "L": "val/loss"})
    assert table[["params_total", "images_seen", "val_loss"]].to_numpy().tolist() == [[5, 100, 2.0]]
    pd.DataFrame({**runs, "summary": ["nan)", ""]}).to_csv(tmp_path / "damaged.csv")
    with pytest.raises(AnalysisError, match="no dictionary"):
        read_table(tmp_path / "damaged.csv")


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


@pytest.mark.parametrize(
    ("name", "step", "settings"),
    [
        ("training_metrics.json", "iteration", "config.yaml"),  # DINOv3, CAPI and Franca, imitated
        ("metrics.jsonl", "step", "hparams.yaml"),  # lightly-train, imitated
        ("log.txt", "epoch", "args.json"),  # MAE and Pixio, imitated
    ],
)
def test_json_lines_of_any_name_are_runs_with_settings_beside_them(tmp_path, name, step, settings) -> None:
    for size in (22, 86):
        run = tmp_path / f"vit-{size}M"
        write_lines(run / name, [{step: i, "val/loss": loss(size * 1e6, i * 1e8), "lr": 1 / i} for i in (1, 2, 3)])
        (run / settings).write_text(json.dumps({"optim": {"batch": 2048}, "note": "x"}))
    runs = read_table(tmp_path, {"N": r"path:-(\d+M)", "D": f"{step}*1e8", "L": "val/loss"})
    assert sorted(runs["params_total"].unique()) == [22e6, 86e6]
    assert set(runs["optim.batch"]) == {2048}
    assert runs["status"].tolist() == ["during", "during", "complete"] * 2
    assert runs["val_loss"].tolist() == pytest.approx([loss(n, d) for n in (22e6, 86e6) for d in (1e8, 2e8, 3e8)])
    with pytest.raises(AnalysisError, match="no name of a run"):
        read_table(tmp_path, {"N": "path:depth-(.+)"})
    with pytest.raises(AnalysisError, match="regular expression"):
        read_table(tmp_path, {"N": "path:("})


def test_a_trainers_last_state_is_read_once_a_run(tmp_path) -> None:
    """As Hugging Face's Trainer writes it (imitated): a state in every checkpoint, a model's settings beside it."""
    for steps, run in ((200, "done"), (100, "stopped")):
        for step in (100, steps):
            history = [{"step": i, "eval_loss": 5 - i / 100, "epoch": i / 50} for i in range(50, step + 1, 50)]
            folder = tmp_path / run / f"checkpoint-{step}"
            folder.mkdir(parents=True, exist_ok=True)
            state = {"global_step": step, "max_steps": 200, "train_batch_size": 8, "log_history": history}
            (folder / "trainer_state.json").write_text(json.dumps(state))
            (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "architectures": ["X"]}))
    runs = read_table(tmp_path, {"D": "step*train_batch_size", "N": "12*hidden_size**2", "L": "eval_loss"})
    assert sorted(runs.complete()["images_seen"]) == [400, 400, 800, 1200, 1600]
    assert runs["status"].value_counts().to_dict() == {"during": 4, "complete": 1, "unfinished": 1}


def test_numbers_are_found_in_text_by_regular_expressions(tmp_path) -> None:
    """Lines of nanoGPT's output (as its train.py prints them) and of nanochat's."""
    for width in (64, 128):
        lines = [f"step {i}: train loss {4 - i / 500:.4f}, val loss {4.1 - i / 500:.4f}" for i in (0, 250, 500)]
        noise = ["number of parameters: 0.20M", "iter 0: loss 4.2, time 100.00ms, mfu -100.00%"]
        (tmp_path / f"width-{width}.log").write_text("\n".join([*noise, *lines]) + "\n")
    columns = {"step": r"log:^step (\d+):", "L": r"log:val loss (\S+)", "D": "step*16384", "N": r"path:width-(\d+)"}
    runs = read_table(tmp_path, {**columns, "N": columns["N"]})
    assert runs["params_total"].tolist() == [128] * 3 + [64] * 3
    assert runs["images_seen"].tolist() == [0, 250 * 16384, 500 * 16384] * 2
    assert runs["val_loss"].iloc[:3].tolist() == [4.1, 3.6, 3.1]
    (tmp_path / "chat.log").write_text("Step 00250 | Validation bpb: 0.9134\n")
    assert read_table(tmp_path, {"L": r"log:bpb: (\S+)"})["val_loss"].tolist() == [0.9134]
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnalysisError, match="log:val loss"):
        read_table(tmp_path / "empty")


def test_a_panel_of_wandb_is_points(tmp_path) -> None:
    """As the app exports a chart (imitated): a column a run, its least and its largest value beside it."""
    frame = pd.DataFrame({"Step": [1, 2, 3]})
    for n in (10, 40):
        values = [loss(n * 1e6, d * 1e8) for d in (1, 2, 3)]
        for suffix in ("", "__MIN", "__MAX"):
            frame[f"run-{n}M - val_loss{suffix}"] = values if n == 40 else [*values[:2], np.nan]
    frame.to_csv(tmp_path / "panel.csv", index=False)
    runs = read_table(tmp_path / "panel.csv", {"N": r"path:(\d+M)", "D": "Step*1e8"})
    assert runs["status"].tolist() == ["during", "complete", "during", "during", "complete"]
    assert runs["val_loss"].tolist() == pytest.approx(
        [loss(n * 1e6, d * 1e8) for n, ds in ((10, (1, 2)), (40, (1, 2, 3))) for d in ds]
    )


def test_a_sheet_of_excel_is_a_table(tmp_path) -> None:
    pytest.importorskip("openpyxl")
    frame = pd.DataFrame({"n": [1e6, 2e6], "d": [1e9, 1e9], "loss": [3.5, 3.25]})
    frame.to_excel(tmp_path / "t.xlsx", index=False)
    assert read_table(tmp_path / "t.xlsx", {"N": "n", "D": "d", "L": "loss"})["val_loss"].tolist() == [3.5, 3.25]


@pytest.mark.parametrize("done", ["completed", "FINISHED", "STATE_COMPLETED", "SUCCEEDED", "TrialState.COMPLETE", "ok"])
def test_every_tools_word_for_done_is_done(tmp_path, done) -> None:
    states = [done] * 30 + ["failed", "CANCELLED by 1000", "RUNNING"] + ["brewed"]
    rows = [{"N": n, "D": d, "L": loss(n, d), "state": "x"} for n in SIZES for d in np.geomspace(1e8, 1e10, 7)][:34]
    frame = pd.DataFrame(rows).assign(status=states)
    law = fit(frame, "chinchilla", y="L")
    assert law.num_points == 31
    assert [str(each) for each in law.exclusions] == ["3 rows not complete (status)"]
    (flag,) = [each for each in law.flags if each.kind == "status"]
    assert "1 rows with status 'brewed'" in str(flag)
    frame.drop(columns="status").assign(State=[*states[:33], done]).to_csv(tmp_path / "t.csv", index=False)
    assert len(read_table(tmp_path / "t.csv").complete()) == 31
