"""Logs of other people's tools as one frame of points: Weights & Biases and marin's JSON lines, TensorBoard's event
files, MLflow's and Lightning's folders.
"""

from __future__ import annotations

import ast
import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from aimscale.analysis.errors import AnalysisError

_RUN_NAMES = ("Name", "name", "run_path")
"""Columns that name a run of W&B, in its export, in the table that its guide makes with its API, and in marin's."""


def from_wandb(frame: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Give nested cells columns such as `config.model.width`, and map names of W&B's as `read_table`'s `columns` do."""
    if is_api := {*frame} >= {"summary", "config"} and not {*frame}.isdisjoint(_RUN_NAMES):
        try:  # a CSV has dictionaries as text
            told = frame[["config", "summary"]].map(lambda c: ast.literal_eval(c) if isinstance(c, str) else c)
        except (ValueError, SyntaxError) as error:
            raise AnalysisError(
                f"{path}: 'config' or 'summary' is no dictionary ({error}); write the runs to a .jsonl or .parquet file"
            ) from error
        frame = frame.assign(**told)
    for name in frame.columns[frame.dtypes.map(str) == "object"]:
        cells = [cell if isinstance(cell, dict) else {} for cell in frame[name]]
        if any(cells):
            inner = pd.json_normalize(cells).set_index(frame.index).add_prefix(f"{name}.")
            frame = frame.drop(columns=name).join(inner[[each for each in inner if each not in frame]])
    if not (is_api or "_step" in frame or {*frame} >= {"Name", "State"}):
        return frame, {}
    called = [name for name in _RUN_NAMES if name in frame and "run_id" not in frame]
    if "State" in frame:
        frame = frame.assign(status=frame["State"].where(frame["State"] != "finished", "complete"))
    return frame, {"run_id": called[0]} if called else {}


def run_logs(folder: Path) -> pd.DataFrame:
    """Read a folder of runs as points: a row per run and step, with its settings.

    The last row of a run has the last value of every metric and the status `complete`, those before it `during`.
    """
    frames = []
    for run, settings, points, status in (each for reader in _READERS for each in reader(folder) if len(each[2])):
        points = points.sort_index()
        points.iloc[-1] = points.ffill().iloc[-1]
        statuses = [*["during"] * (len(points) - 1), status]
        told = {name: value for name, value in settings.items() if name not in points}
        frames.append(points.reset_index().assign(**told, run_id=run, status=statuses))
    if not frames:
        known = "results.parquet nor runs of TensorBoard, MLflow or Lightning"
        raise AnalysisError(f"{folder} holds neither {known}; give another folder, or `aimscale collect` a sweep")
    return pd.concat(frames, ignore_index=True)


_Run = tuple[str, dict[str, Any], pd.DataFrame, str]
"""Identity of a run (its folder, or MLflow's id: names may stand twice), settings, metrics by step, and status."""


def _mlflow_store(folder: Path) -> Iterator[_Run]:
    """Read MLflow's database, `mlflow.db`."""
    for file in sorted(folder.glob("**/mlflow.db")):
        with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as store:
            read = {name: pd.read_sql(f"SELECT * FROM {name}", store) for name in ("runs", "params", "metrics")}
        for run in read["runs"].to_dict("records"):
            params, metrics = (read[name][read[name]["run_uuid"] == run["run_uuid"]] for name in ("params", "metrics"))
            points = metrics.pivot_table(index="step", columns="key", values="value", aggfunc="last")
            settings = {key: _value(value) for key, value in zip(params["key"], params["value"], strict=True)}
            yield run["run_uuid"], settings, points, "complete" if run["status"] == "FINISHED" else "unfinished"


def _mlflow_files(folder: Path) -> Iterator[_Run]:
    """Read MLflow's folder of files, `mlruns`: lines `time value step` in a file for every metric."""
    for meta in sorted(folder.glob("**/meta.yaml")):
        files = [each for each in sorted(meta.parent.glob("metrics/**/*")) if each.is_file()]
        names = [each.relative_to(meta.parent / "metrics").as_posix() for each in files]
        values = [pd.read_csv(each, sep=" ", header=None).groupby(2)[1].last() for each in files]
        points = pd.DataFrame(dict(zip(names, values, strict=True))).rename_axis("step")
        settings = {each.name: _value(each.read_text()) for each in meta.parent.glob("params/*")}
        status = "complete" if yaml.safe_load(meta.read_text()).get("status") == 3 else "unfinished"  # FINISHED
        yield meta.parent.name, settings, points, status


def _lightning(folder: Path) -> Iterator[_Run]:
    """Read the folders of Lightning's CSV logger: `metrics.csv`, and `hparams.yaml` beside it."""
    for file in sorted(folder.glob("**/metrics.csv")):
        points = pd.read_csv(file).groupby("step").last()
        yield file.parent.as_posix(), _hparams(file.parent), points, "complete"


def _tensorboard(folder: Path) -> Iterator[_Run]:
    """Read the scalars of TensorBoard's event files, and settings that `add_hparams` or Lightning wrote."""
    files = sorted({each.parent for each in folder.glob("**/events.out.tfevents.*")})
    if not files:
        return
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    except ImportError as error:
        raise AnalysisError(f"{folder} holds event files of TensorBoard; pip install tensorboard") from error
    for parent in files:
        events = EventAccumulator(str(parent), size_guidance={"scalars": 0}).Reload()
        settings = _hparams(parent)
        for tag, content in events.summary_metadata.items():
            if tag == "_hparams_/session_start_info":
                given = HParamsPluginData.FromString(content.plugin_data.content).session_start_info.hparams
                settings |= {name: getattr(value, value.WhichOneof("kind")) for name, value in sorted(given.items())}
        scalars = {tag: {each.step: each.value for each in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        yield parent.as_posix(), settings, pd.DataFrame(scalars).rename_axis("step"), "complete"


def _hparams(folder: Path) -> dict[str, Any]:
    """Read Lightning's hyperparameters, nested ones under dotted names."""
    file = folder / "hparams.yaml"
    told = yaml.load(file.read_text(), yaml.BaseLoader) if file.is_file() else None  # texts, whatever Python tags say
    return {str(name): _value(value) for name, value in pd.json_normalize(told).iloc[0].items()} if told else {}


def _value(text: Any) -> Any:
    """Read a hyperparameter, which was written as a text."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


_READERS = (_mlflow_store, _mlflow_files, _lightning, _tensorboard)
