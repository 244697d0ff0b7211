"""Logs of other people's runs as a table: MLflow, Lightning, Hugging Face, TensorBoard, JSON lines of any name, and
text by regular expressions."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from aimscale.analysis.display import option
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.files import check_file, files_of
from aimscale.analysis.table.schema import STEPS

MAX_YAML_BYTES, MAX_YAML_VALUES = 10**7, 10**5
CONFIGURATIONS = ("hparams.yaml", "config.yaml", "args.yaml", "config.json", "args.json", "hparams.json")
"""Names of the files of settings that programs write beside a log."""
TRAINER_STATE = "trainer_state.json"
FROM_LOG = "log:"
"""What a column begins with that a regular expression finds in the lines of a log."""
_LOG_SUFFIXES = (".log", ".txt", ".out")
_Run = tuple[str, dict[str, Any], pd.DataFrame, str]
"""Identity of a run (its folder, or MLflow's id: names may stand twice), settings, metrics by step, and status."""


def run_logs(folder: Path, patterns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read a folder of runs as points: a row per run and step, with its settings.

    The last row of a run has the last value of every metric and the status `complete`, those before it `during`. Of
    what several loggers wrote into one folder the first of `_LOG_READERS` that reads it counts.

    Args:
        patterns: column -> regular expression that finds its value, as its one group, in the lines of text logs; with
            any, those are all that is read.
    """
    runs = dict[str, _Run]()
    readers = [lambda at: _text_logs(at, patterns)] if patterns else _LOG_READERS
    for reader in readers:
        of_reader = [run for run in reader(folder) if len(run[2])]
        runs |= {run[0]: run for run in of_reader if run[0] not in runs}
    if not runs:
        what = "a line that these patterns find" if patterns else "runs of TensorBoard, MLflow, Lightning, Hugging Face"
        raise AnalysisError(
            f"{folder} holds neither results.parquet nor {what}{'' if patterns else ' or JSON lines'}; give another "
            f"folder, `aimscale collect` a sweep, or find numbers in text by {option('columns', 'L=log:val loss (.+)')}"
        )
    return pd.concat([step_rows(*run) for run in runs.values()], ignore_index=True)


def step_rows(run: str, settings: Mapping[str, Any], metrics: pd.DataFrame, status: str) -> pd.DataFrame:
    """Make a row per step of a run."""
    metrics = metrics.sort_index()
    metrics.iloc[-1] = metrics.ffill().iloc[-1]
    statuses = [*["during"] * (len(metrics) - 1), status]
    settings = {name: value for name, value in settings.items() if name not in {*metrics, metrics.index.name}}
    return metrics.reset_index().assign(**settings, run_id=run, status=statuses)


def _mlflow_store(folder: Path) -> Iterator[_Run]:
    """Read MLflow's database, `mlflow.db`."""
    for file in files_of(folder, "**/mlflow.db"):
        with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as store:
            read = {name: pd.read_sql(f"SELECT * FROM {name}", store) for name in ("runs", "params", "metrics")}
        for run in read["runs"].to_dict("records"):
            params, metrics = (read[name][read[name]["run_uuid"] == run["run_uuid"]] for name in ("params", "metrics"))
            points = metrics.pivot_table(index="step", columns="key", values="value", aggfunc="last")
            settings = {key: _value(value) for key, value in zip(params["key"], params["value"], strict=True)}
            yield run["run_uuid"], settings, points, "complete" if run["status"] == "FINISHED" else "unfinished"


def _mlflow_files(folder: Path) -> Iterator[_Run]:
    """Read MLflow's folder of files, `mlruns`: lines `time value step` in a file for every metric."""
    for meta in files_of(folder, "**/meta.yaml"):
        files = [*files_of(meta.parent, "metrics/**/*")]
        names = [each.relative_to(meta.parent / "metrics").as_posix() for each in files]
        values = [pd.read_csv(each, sep=" ", header=None).groupby(2)[1].last() for each in files]
        points = pd.DataFrame(dict(zip(names, values, strict=True))).rename_axis("step")
        settings = {each.name: _value(each.read_text()) for each in files_of(meta.parent, "params/*")}
        status = "complete" if _mapping(meta).get("status") == "3" else "unfinished"  # FINISHED
        yield meta.parent.name, settings, points, status


def _lightning(folder: Path) -> Iterator[_Run]:
    """Read the folders of Lightning's CSV logger: `metrics.csv`, and `hparams.yaml` beside it."""
    for file in files_of(folder, "**/metrics.csv"):
        points = pd.read_csv(file).groupby("step").last()
        yield file.parent.as_posix(), _settings(file.parent), points, "complete"


def _hugging_face(folder: Path) -> Iterator[_Run]:
    """Read the last `trainer_state.json` of every run of Hugging Face's Trainer, in it or in its last checkpoint."""
    states = dict[Path, tuple[dict[str, Any], Path]]()
    for file in files_of(folder, f"**/{TRAINER_STATE}"):
        state = _mapping(file)
        run = file.parent.parent if re.fullmatch(r"checkpoint-\d+", file.parent.name) else file.parent
        if run not in states or states[run][0].get("global_step", 0) <= state.get("global_step", 0):
            states[run] = state, file.parent
    for run, (state, parent) in states.items():
        is_over = state.get("global_step", 0) >= state.get("max_steps", 0)
        settings = {**_settings(parent), **({} if parent == run else _settings(run))}
        settings |= {name: v for name, v in state.items() if name in ("train_batch_size", "total_flos", "max_steps")}
        yield run.as_posix(), settings, _by_step(state.get("log_history", [])), "complete" if is_over else "unfinished"


def _json_lines(folder: Path) -> Iterator[_Run]:
    """Read files of a JSON object a line, whatever their name: lightly-train's `metrics.jsonl`, `training_metrics.json`
    of DINOv3, CAPI and Franca, `log.txt` of MAE and Pixio."""
    by_folder = dict[Path, list[tuple[Path, pd.DataFrame]]]()
    for file in (each for suffix in (".jsonl", ".json", ".ndjson", *_LOG_SUFFIXES) for each in _logs(folder, suffix)):
        rows = [] if file.name in (*CONFIGURATIONS, TRAINER_STATE) else _objects(file)
        points = _by_step(rows if file.suffix != ".json" or len(rows) > 1 else [])  # of one object: a description
        if len(points):
            by_folder.setdefault(file.parent, []).append((file, points))
    for parent, logs in by_folder.items():
        for file, points in logs:
            yield (parent if len(logs) == 1 else file).as_posix(), _settings(parent), points, "complete"


def _text_logs(folder: Path, patterns: Mapping[str, str]) -> Iterator[_Run]:
    """Find the columns of patterns in the lines of text logs; what a line lacks keeps its value of the line before."""
    try:
        searches = {name: re.compile(pattern) for name, pattern in patterns.items()}
    except re.error as error:
        raise AnalysisError(f"{option('columns')}: {error.pattern!r:.80} is no regular expression: {error}") from error
    for file in (each for suffix in _LOG_SUFFIXES for each in _logs(folder, suffix)):
        rows = list[dict[str, str]]()
        for line in file.read_text(errors="replace").splitlines():
            matches = {name: match for name, search in searches.items() if (match := search.search(line))}
            rows += [{name: match[match.re.groups and 1] for name, match in matches.items()}] * bool(matches)
        points = pd.DataFrame(rows, columns=[*searches], dtype=object).rename_axis("line")
        yield file.as_posix(), _settings(file.parent), points.ffill(), "complete"


def _logs(folder: Path, suffix: str) -> Iterable[Path]:
    return files_of(folder, f"**/*{suffix}")


def _objects(file: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a file's lines; up to the first that is something else, such as half a line."""
    rows = list[dict[str, Any]]()
    with file.open(errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line) if line.lstrip().startswith("{") else None
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                break
            rows.append(row)
    return rows


def _by_step(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Make a table of metrics (numbers) by step of the lines of a log; empty where they count no steps."""
    frame = pd.json_normalize(rows).select_dtypes("number")
    step = next((name for name in STEPS if name in frame and frame[name].notna().any()), None)
    return frame.groupby(step).last() if step is not None and frame.shape[1] > 1 else pd.DataFrame()


def _tensorboard(folder: Path) -> Iterator[_Run]:
    """Read the scalars of TensorBoard's event files, and settings that `add_hparams` or Lightning wrote."""
    files = sorted({each.parent for each in files_of(folder, "**/events.out.tfevents.*")})
    if not files:
        return
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    except ImportError as error:
        raise AnalysisError(f"{folder} holds event files of TensorBoard; pip install tensorboard") from error
    for parent in files:
        events = EventAccumulator(str(parent), size_guidance={"scalars": 0}).Reload()
        settings = _settings(parent)
        for tag, content in events.summary_metadata.items():
            if tag == "_hparams_/session_start_info":
                given = HParamsPluginData.FromString(content.plugin_data.content).session_start_info.hparams
                settings |= {name: getattr(value, value.WhichOneof("kind")) for name, value in sorted(given.items())}
        scalars = {tag: {each.step: each.value for each in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        yield parent.as_posix(), settings, pd.DataFrame(scalars).rename_axis("step"), "complete"


def _settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a run from files beside its log, nested ones under dotted names."""
    flat = dict[str, Any]()
    for file in (each for name in CONFIGURATIONS for each in files_of(folder, name)):
        values = pd.json_normalize(_mapping(file))
        cells = {str(name): values[name].iloc[0] for name in values} if len(values) else {}
        flat |= {name: _value(cell) for name, cell in cells.items() if not isinstance(cell, list | dict)}
    return flat


def _mapping(path: Path) -> dict[str, Any]:
    """Read a mapping of a YAML file, as texts whatever Python tags say, or of a JSON file."""
    check_file(path, MAX_YAML_BYTES)
    text = path.read_text()
    values = json.loads(text) if path.suffix == ".json" else yaml.load(text, yaml.BaseLoader) or {}
    if not isinstance(values, dict) or (path.suffix != ".json" and _num_values(values, {}) > MAX_YAML_VALUES):
        raise AnalysisError(f"{path} is no mapping, or has more than {MAX_YAML_VALUES} values; write it again")
    return values


def _num_values(value: Any, sizes: dict[int, int]) -> int:
    """Count the values of a document, each alias as what it stands for; one that contains itself has too many."""
    if isinstance(value, dict | list) and id(value) not in sizes:
        sizes[id(value)] = MAX_YAML_VALUES + 1  # until it is counted
        inner = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = sum(_num_values(each, sizes) for each in inner)
    return sizes.get(id(value), 1)


def _value(setting: Any) -> Any:
    """Read a hyperparameter, which was written as a text."""
    try:
        return setting if isinstance(setting, bool | np.bool_) else float(setting)
    except (TypeError, ValueError):
        return setting


_LOG_READERS = (_mlflow_store, _mlflow_files, _lightning, _hugging_face, _json_lines, _tensorboard)
"""Readers of run folders, in order: of what several loggers wrote into a folder, the first counts."""
