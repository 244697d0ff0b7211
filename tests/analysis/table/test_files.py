"""Tables, logs and what lies beside them may be a stranger's: nothing runs, and no link leads out of a folder."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.published import read_baselines
from aimscale.analysis.report.page import write_report
from aimscale.analysis.table import files
from aimscale.analysis.table.read import read_table
from aimscale.analysis.table.schema import written_aside
from aimscale.analysis.table.select import read_curves, read_tables


def lightning(folder: Path) -> None:
    (folder / "metrics.csv").write_text("step,loss\n1,2.0\n2,1.0\n")


def bomb_of_aliases(folder: Path) -> None:
    lightning(folder)
    lines = ["a0: &a0 {x: y}", *(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 40))]
    (folder / "hparams.yaml").write_text("\n".join(lines))


def circle_of_aliases(folder: Path) -> None:
    lightning(folder)
    (folder / "hparams.yaml").write_text("a: &a {b: *a}")


def python_in_yaml(folder: Path) -> None:
    lightning(folder)
    (folder / "hparams.yaml").write_text("a: !!python/object/apply:os.system ['touch made']\n[")


def link_of_settings(folder: Path) -> None:
    lightning(folder)
    (folder / "hparams.yaml").symlink_to("/etc/passwd")


def linked_table(folder: Path) -> None:
    (folder / "results.parquet").symlink_to("/etc/passwd")


def pipe_for_metrics(folder: Path) -> None:
    os.mkfifo(folder / "metrics.csv")


def pipe_for_table(folder: Path) -> None:
    os.mkfifo(folder / "results.parquet")


def pickled_events(folder: Path) -> None:
    """No records of protocol buffers, but a pickle that would make a folder."""
    (folder / "events.out.tfevents.1.host").write_bytes(pickle.dumps(MakesFolder()))


def events_of_another(folder: Path) -> None:
    (folder / "events.out.tfevents.1.host").symlink_to("/etc/passwd")


def flipped_events(folder: Path) -> None:
    path = min((Path(__file__).parent / "fixtures" / "tensorboard" / "small").iterdir())
    whole = bytearray(path.read_bytes())
    whole[9] ^= 1  # of the first record's length
    (folder / path.name).write_bytes(whole)


def database_that_is_none(folder: Path) -> None:
    (folder / "mlflow.db").write_bytes(pickle.dumps(MakesFolder()))


def database_of_another(folder: Path) -> None:
    (folder / "mlflow.db").symlink_to("/etc/passwd")


def python_in_meta(folder: Path) -> None:
    shutil.copytree(Path(__file__).parent / "fixtures" / "mlruns", folder / "mlruns")
    meta = next((folder / "mlruns").glob("*/*/meta.yaml"))
    meta.write_text("status: !!python/object/apply:os.mkdir ['made']\n[")


def metric_of_another(folder: Path) -> None:
    shutil.copytree(Path(__file__).parent / "fixtures" / "mlruns", folder / "mlruns")
    metric = next(each for each in (folder / "mlruns").glob("*/*/metrics/**/*") if each.is_file())
    metric.unlink()
    metric.symlink_to("/etc/passwd")


class MakesFolder:
    """What makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("made",)


def sparse_table(folder: Path) -> None:
    (folder / "results.parquet").touch()
    os.truncate(folder / "results.parquet", 10**10)


def rows_without_end(folder: Path) -> None:
    """A run of one value: a million rows in few bytes."""
    pq.write_table(pa.table({"val_loss": np.ones(10**6)}), folder / "results.parquet", compression="zstd")


def words_without_end(folder: Path) -> None:
    """One word of 100 kB in every row."""
    table = pa.table({"size": pa.array(["x" * 10**5]).take(pa.array(np.zeros(3000, int)))})
    pq.write_table(table, folder / "results.parquet", compression="zstd")
    assert (folder / "results.parquet").stat().st_size < 10**6


@pytest.mark.parametrize(
    "make",
    [bomb_of_aliases, circle_of_aliases, python_in_yaml, link_of_settings, linked_table, pipe_for_metrics,
     pipe_for_table, sparse_table, rows_without_end, words_without_end, pickled_events, events_of_another,
     flipped_events, database_that_is_none, database_of_another, python_in_meta, metric_of_another],
)  # fmt: skip
def test_a_hostile_folder_is_refused_by_the_report(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "MAX_VALUES", 10**5)
    monkeypatch.setattr(files, "MAX_BYTES", 10**8)
    (tmp_path / "folder").mkdir()
    make(tmp_path / "folder")
    with pytest.raises(AnalysisError) as caught:
        write_report("folder", "page.html")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_lies_beside_a_table_is_not_followed_out_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = {"run_id": "a", "N": [1e5, 2e5, 4e5], "D": [1e5, 2e5, 4e5], "L": [2.0, 1.9, 1.8], "size": "s"}
    pd.DataFrame(rows).to_parquet(folder / "results.parquet")
    (tmp_path / "outside").write_text("{}")
    readers: dict[str, Callable[[], object]] = {
        "collect.json": lambda: write_report(folder, tmp_path / "page.html"),
        "curves.parquet": lambda: read_curves([folder]),
        "baselines.parquet": lambda: read_baselines(read_tables(folder)),
        "forecasts.jsonl": lambda: write_report(folder, tmp_path / "page.html"),
    }
    for name, read_it in readers.items():
        (folder / name).symlink_to(tmp_path / "outside")
        with pytest.raises(AnalysisError, match=name):
            read_it()
        (folder / name).unlink()


def test_a_setting_of_thousands_of_signs_is_a_mistake_in_one_sentence(tmp_path: Path) -> None:
    rows = [{"name": "a", "summary": "-" * 100_000 + "1", "config": "{}"}]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(AnalysisError, match="no dictionary"):
        read_table(tmp_path / "t.csv")


def test_a_link_at_the_name_that_temporary_files_had_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / f".t.csv.{os.getpid()}.part").symlink_to(tmp_path / "victim")
    names = set()
    for _ in range(2):
        with written_aside(tmp_path / "t.csv") as aside:
            aside.write_text("N,D,L")
            names.add(aside.name)
    assert len(names) == 2
    assert (tmp_path / "victim").read_text() == "precious"


def test_hyperparameters_may_stand_twice_by_an_alias(tmp_path: Path) -> None:
    lightning(tmp_path)
    (tmp_path / "hparams.yaml").write_text("a: &a [1, 2]\nb: {c: *a, d: 3}\n")
    assert read_table(tmp_path)["b.d"].tolist() == [3.0, 3.0]
