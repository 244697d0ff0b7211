"""Tables and options that nobody means: every verb answers or says one sentence, and none waits or grows."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aimscale.analysis import plot_points, save, write_report
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.schema import results_table, write_table
from aimscale.sweeps.cli.main import main

VERBS = (
    "fit {} --hold-out N",
    "frontier {}",
    "forecast {} --law chinchilla --at N=1e9,D=1e9",
    "correlate {} --x val_loss --y N",
    "correlate {}",
    "contrast {} --by seed",
    "contrast {} --by kind",
    "compare {}",
    "next {} --law chinchilla --target N=1e7,D=1e7 --budget 1e-3",
)
REPORT = "report {} --out page.html"
PROBE = {"task": "pets", "kind": "linear", "top1": 0.5}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")


@pytest.fixture
def table(grid) -> pd.DataFrame:
    probes = [json.dumps([PROBE | {"top1": 1 - loss, "n": 100, "chance": 0.1}]) for loss in grid["val_loss"]]
    seeds = np.arange(len(grid)) % 2
    return grid.assign(seed=seeds, setup=[f'{{"optimiser.lr": {s}}}' for s in seeds], probes=probes, schema_version=1)


def said(line: str, capsys) -> str:
    """What a verb answers (an empty text), or the sentence that it ends with."""
    code = 0
    try:
        main([word if word != "''" else "" for word in line.split()])
    except SystemExit as end:
        code = end.code or 0
    told = capsys.readouterr().err.strip() if code else ""
    assert code in (0, 2), (line, told)
    assert bool(told) == bool(code)
    assert len(told) < 1500, (line, told)
    return told


HUGE = 10**400
CELLS = {
    "params_total": [float("inf"), "x" * 10_000, -1, 10**30, 1e308, 1e-320, None],
    "images_seen": [0, 2**63 - 1, HUGE, "1,5", True],
    "flops_train": [1e-320, 1e308, "[1]"],
    "val_loss": [1e308, 1e-320, "abc", None, -1],
    "unique_images": ["x", 0, 1e308],
    "seed": ["a", None, 1e308],
    "status": ["", "failed", 3],
    "size": [None, 3],
    "setup": ["3", "x", "[1]", "[" * 9000, '{"a": [1]}', f'{{"a": {HUGE}}}', '{"optimiser.lr": "x"}'],
    "probes": [
        *("3", "[1]", "null", "[" * 9000, '[{"kind": "x", "top1": 1}]', '[{"task": [1], "kind": "x"}]'),
        *(f'[{{"task": "a", "kind": "b", "top1": {v}}}]' for v in ("null", "2", '"x"', "[1]", HUGE, "Infinity")),
        *(f'[{{"task": "a", "kind": "b", "top1": 0.5, "blocks": {v}}}]' for v in ("7", '"x"', "[null]")),
    ],
}


@pytest.mark.parametrize("column", CELLS)
def test_any_cell_in_some_rows_or_in_all(column, table, capsys):
    for number, cell in enumerate(CELLS[column]):
        step = (1, 4)[number % 2]
        damaged = table.astype(object)
        damaged.loc[damaged.index[::step], column] = cell
        damaged.to_csv("t.csv", index=False)
        said(VERBS[(2 * number + step) % len(VERBS)].format("t.csv"), capsys)


@pytest.mark.parametrize("column", ["params_total", "images_seen", "val_loss", "lr_peak", "recipe", "status"])
def test_any_cell_of_tuned_runs_and_of_two_recipes(column, grid, capsys):
    rates = [grid.assign(lr_peak=0.01 * 2.0**k, val_loss=grid["val_loss"] * (1 + 0.01 * k**2)) for k in (-1, 0, 1)]
    damaged = pd.concat(rates, ignore_index=True)
    damaged = damaged.assign(recipe=np.where(damaged["lr_peak"] > 0.01, "new", "old")).astype(object)
    for number, cell in enumerate([None, -1, 0, "x", 1e308, 1e-320, True]):
        damaged.loc[damaged.index[:: 1 + 3 * (number % 2)], column] = cell
        damaged.to_csv("t.csv", index=False)
        said(("rates {}", "contrast {} --by recipe --as-law")[number % 3 // 2].format("t.csv"), capsys)


def test_any_type_of_parquet(table, capsys):
    whole = pa.Table.from_pandas(table.drop(columns=["probes", "setup"]), preserve_index=False)
    num = len(table)
    odd = {
        "binary": pa.array([b"\xff%d" % (i % 3) for i in range(num)]),
        "struct": pa.array([{"a": i} for i in range(num)]),
        "list": pa.array([[i] for i in range(num)]),
        "time": pa.array(range(num), pa.timestamp("s")),
        "null": pa.nulls(num),
    }
    for column in ("params_total", "size", "seed", "status", "probes", "setup", "theirs"):
        for number, (name, values) in enumerate(odd.items()):
            kept = whole.drop_columns([column]) if column in whole.column_names else whole
            pq.write_table(kept.append_column(column, values), f"{name}.parquet")
            said(VERBS[2 * number].format(f"{name}.parquet"), capsys)
    twice = pa.Table.from_arrays([*whole.columns, whole["val_loss"]], [*whole.column_names, "val_loss"])
    pq.write_table(twice, "twice.parquet")
    assert "twice" in said(VERBS[0].format("twice.parquet"), capsys)


def test_what_is_no_file_is_not_waited_for_nor_read_without_end(table, capsys):
    for suffix in (".csv", ".parquet", ".jsonl"):
        os.mkfifo(f"pipe{suffix}")
        os.symlink("/dev/zero", f"zero{suffix}")
        with open(f"sparse{suffix}", "wb") as file:
            file.truncate(1 << 40)
        for verb in (*VERBS, REPORT) if suffix == ".csv" else VERBS[:1]:
            assert f"pipe{suffix} is a pipe" in said(verb.format(f"pipe{suffix}"), capsys)
        for name in ("zero", "sparse"):
            assert name in said(VERBS[0].format(f"{name}{suffix}"), capsys)
    table.to_parquet("results.parquet")
    os.mkfifo("collect.json")
    assert "collect.json is a pipe" in said(REPORT.format("results.parquet"), capsys)
    os.unlink("collect.json")
    os.mkfifo("baselines.parquet")
    assert "baselines" in said("compare results.parquet", capsys)


def test_no_library_warns_of_how_it_is_called(table, capsys):
    """pandas deprecates calls that it then takes away."""
    table.assign(probes=None).to_csv("t.csv", index=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="aimscale")
        for verb in ("fit {}", "forecast {} --law chinchilla --at N=1e9,D=1e9", "compare {}", REPORT):
            assert not said(verb.format("t.csv"), capsys)


def test_what_is_no_file_is_written_to_and_a_links_target_is_written(grid, capsys):
    """As root, `report --out /dev/null` replaced the device by a page."""
    grid[:2].to_csv("t.csv")
    os.mkfifo("page.html")
    reader = os.open("page.html", os.O_RDONLY | os.O_NONBLOCK)
    write_table(results_table([]), Path("page.html").rename("table.csv"))
    assert os.read(reader, 100).startswith(b'"schema_version"')
    assert Path("table.csv").is_fifo()
    Path("real.html").write_text("old")
    os.symlink("real.html", "link.html")
    assert not said("report t.csv --out link.html", capsys)
    assert Path("link.html").is_symlink()
    assert Path("real.html").read_text().startswith("<!doctype html>")
    for write in (lambda: write_report("t.csv", "a\0b.html"), lambda: save(plot_points(grid, "N"), "a\0b")):
        with pytest.raises(AnalysisError, match="NUL"):
            write()


ALL = "--fix E=0 --fix A=1 --fix B=1 --fix alpha=0.3 --fix beta=0.3"


@pytest.mark.parametrize(
    ("line", "subject"),
    [
        (f"fit t.csv {ALL}", "held"),
        ("fit t.csv --figure ''", "figure"),
        ("frontier t.csv --figure ..", "figure"),
        ("fit t.csv --fix E", "'E'"),
        ("fit t.csv --fix alfa=1", "did you mean alpha"),
        ("fit t.csv --fix alpha=x:1", "alpha=x:1"),
        ("fit t.csv --law chinchila", "chinchilla"),
        ("fit t.csv --objective hubr_log", "huber_log"),
        ("fit t.csv --y val_los", "val_loss"),
        ("fit t.csv --where prams_total=1", "params_total"),
        ("fit t.csv --where probes=1", "probes"),
        ("fit t.csv --columns N=9**9**9", "9**9**9"),
        ("contrast t.csv --by probes", "lists"),
        ("correlate t.csv --x ''", "''"),
        ("correlate t.csv --x val_loss --y N --partial val_loss", "val_loss"),
        ("correlate t.csv --within val_loss", "val_loss"),
        ("forecast t.csv --law power_offset:N --at N=,D=", "N="),
        ("forecast t.csv --law power:C --at N=1e9", "C=1e9"),
        ("forecast t.csv --at D=1e9", "N=1e9"),
        ("next t.csv --target N=1e9 --budget 1", "D=1e9"),
        ("fit t.csv --law power:D --figure t.csv/a", "t.csv"),
        ("fit t.csv --law power:D --hold-out D:-1", "--hold-out"),
        ("frontier t.csv --at nan", "--at"),
        ("correlate t.csv --x L --y odd", "odd"),
        ("fit utf16.csv", "utf16.csv"),
        ("report binary.csv", "binary.csv"),
        ("compare probes.csv", "'x'"),
        ("frontier names.jsonl", r"\x0b"),
    ],
)
def test_what_makes_no_sense_is_named(line, subject, table, capsys):
    table.to_csv("t.csv", index=False)
    table.to_csv("utf16.csv", encoding="utf-16")
    table.assign(probes='[{"task": "t", "kind": "knn", "top1": "x"}]').to_csv("probes.csv", index=False)
    Path("binary.csv").write_bytes(bytes(range(256)) * 10)
    Path("names.jsonl").write_text('{"\x0b": null}')
    assert subject in said(line, capsys)
