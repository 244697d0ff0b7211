"""Damaged sweep files and run files: a verb either works, or prints one sentence and exits with 2."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from aimscale.harness.run.lock import Lock
from aimscale.sweeps.cli.main import HIDDEN, VERBS, main
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.state.record import RunRecord, prepare_directory

FILES = (
    *("config.yaml", "status.json", "results.json", "lock", "claim", "attempts.jsonl", "metrics.jsonl"),
    *("budgets/640/model.safetensors", "../../sweep.yaml", "../../sweep.json", "../../collect.json"),
    *("../../forecasts.jsonl", "../../../../set/dataset.json", "../../../../set/index.parquet"),
)
OF_SWEEP = (
    "plan {sweep}",
    "status {sweep}",
    "status {sweep} --json",
    "collect {sweep}",
    "cancel {sweep}",
    "launch {sweep}",
    "launch {sweep} --dry-run",
    "launch {sweep} --on local --retry",
    "logs {sweep} rung",
    "publish {sweep} . --licence CC0-1.0",
)
OF_RUN = (
    "train {run}",
    "evaluate {run}",
    "probe {run}",
    "baseline raw-pixels --like {run}",
    "weights export {run} {folder}/exported",
    "data info {folder}/set",
    "init {folder}/new.yaml --data {folder}/set --hours 0.01",
    "verify {run}",
)
OF_TABLE = ("fit", "frontier", "rates", "correlate", "contrast", "compare", "forecast", "next", "report")
"""Tried in tests/analysis/test_attacks.py."""
WITHOUT_FILES = {"demo", "doctor", "bench"}


def test_every_verb_that_reads_files_is_tried() -> None:
    tried = {line.split()[0] for line in OF_SWEEP + OF_RUN + OF_TABLE}
    assert (tried | WITHOUT_FILES, tried & WITHOUT_FILES) == ({*VERBS, *HIDDEN}, set())


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
odd_bytes = st.one_of(
    st.binary(max_size=64),
    values.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"", b"[" * 5000, b"{" * 5000, b"1" * 5000, b"\xff\xfe{\x00}\x00", b"null", b"NaN", b"- " * 3000]),
)


def call(line: str, capsys: Any, **places: Path) -> None:
    """Run a verb and assert that it works, or prints one sentence and exits with 2 (1 for failed runs)."""
    words = [word.format(**places) for word in line.split()]
    if "sweep" in places:
        words += ["--root", str(places["root"])]
    try:
        main(words)
    except SystemExit as end:
        said = capsys.readouterr().err.strip()
        problem = (words, end.code, said)
        code = end.code
    else:
        return
    assert code in (0, 1, 2, None), problem
    assert said or code != 2, problem
    assert len(said.splitlines()) <= 3, problem


@pytest.fixture
def finished(write_sweep: Any) -> tuple[Path, Path]:
    """Make a sweep file, and the directory of its one run, which is finished."""
    sweep = write_sweep(sizes=["rung-32"])
    prepare_directory(sweep)
    (run,) = plan(sweep)
    record = RunRecord(sweep.run_dir(run.run_id))
    RunRecord.create(record.path, run.config)
    for budget in run.budgets:
        record.record_row({"run_id": run.run_id, "images_seen": budget, "val_loss": 0.5, "finished_at": 1.0})
    record.write_status(state="finished", images_seen=max(run.budgets))
    lock = Lock(record.claim)
    lock.take(job_id=None, devices=1, nodes="")
    lock.release()
    return sweep.source, record.path


def trying(number: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Call a function with that many examples of these strategies."""
    return lambda function: settings(max_examples=number, deadline=None)(given(**strategies)(function))()


def test_any_content_of_a_runs_files(finished: tuple[Path, Path], capsys: Any) -> None:
    source, run_dir = finished

    @trying(20, name=st.sampled_from(FILES), content=odd_bytes)
    def _(name: str, content: bytes) -> None:
        path = run_dir / name
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        try:
            for line in OF_SWEEP:
                call(line, capsys, sweep=source, root=source.parent / "root")
            for line in OF_RUN:
                call(line, capsys, run=run_dir, folder=source.parent)
        finally:
            path.unlink()
            if before is not None:
                path.write_bytes(before)


PLAIN: dict[str, Any] = {
    "name": "any",
    "sizes": ["rung-32"],
    "budgets": [640],
    "seeds": [0],
    "axes": {"model.head_depth": [1]},
    "variants": {"a": {}},
    "exclude": [],
    "override": [],
    "cost": {"mfu": 0.4},
    "slurm": {"time_limit_min": 10, "extra": {}, "setup": []},
    "base": {
        "model": {"image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": "data/train"}]},
        "optimiser": {"batch_size": 64},
        "validation": {"path": "data/validation"},
        "probes": [],
    },
}


def places(values: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all values of a nested value."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [above, *(place for key, value in inner for place in places(value, (*above, key)))]


def placed(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return `PLAIN` with another value at one path."""
    document = copy.deepcopy(PLAIN)
    holder: Any = document
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return document


def test_any_content_of_a_sweep_file_and_any_value_at_any_place_of_one(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "any.yaml"
    documents = values | st.builds(placed, st.sampled_from(places(PLAIN)[1:]), values)

    @trying(160, content=odd_bytes | documents.map(lambda value: yaml.safe_dump(value).encode()))
    def _(content: bytes) -> None:
        path.write_bytes(content)
        call("plan {sweep}", capsys, sweep=path, root=tmp_path)


def test_a_folder_that_is_no_run_and_a_file_that_is_no_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path) in refused("baseline", "raw-pixels", "--like", tmp_path)
    assert str(tmp_path / "file") in refused("demo", "--root", tmp_path / "file")


def test_pipes_and_devices_in_place_of_files_are_not_read_without_end(finished: tuple[Path, Path], capsys: Any) -> None:
    source, run_dir = finished
    os.mkfifo(source.with_name("pipe.yaml"))
    assert "pipe.yaml is a pipe" in refused("plan", source.with_name("pipe.yaml"))
    os.symlink("/dev/zero", run_dir / "attempts.jsonl")
    for name in ("claim", "lock", "results.json"):
        (run_dir / name).unlink(missing_ok=True)
        os.mkfifo(run_dir / name)
    for reason in ("attempts.jsonl", "results.json"):
        with pytest.raises(SystemExit):
            main(["status", str(source), "--root", str(source.parent / "root")])
        said = capsys.readouterr().out
        assert f"{reason} is a pipe" in said
        assert "next: aimscale report" not in said, "there is nothing to report"
        (run_dir / reason).unlink()
    (run_dir.parents[1] / "sweep.json").unlink()
    os.mkfifo(run_dir.parents[1] / "sweep.json")
    assert "sweep.json is a pipe" in refused("status", run_dir.parents[1])


@pytest.mark.parametrize("trouble", ["read-only", "full"])
def test_a_disk_that_cannot_be_written(
    trouble: str, small_disk: Path, finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, run_dir = finished
    shutil.copytree(run_dir.parents[2], small_disk / "root")
    (small_disk / "root" / "tiny" / "results.csv").write_text("of before")
    (small_disk / "a file").write_bytes(b"")
    if trouble == "full":
        with contextlib.suppress(OSError):
            (small_disk / "a file").write_bytes(bytes(256 * 1024))
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for verb in ("collect", "cancel", "launch", "launch --retry", "status"):
        call(f"{verb} {{sweep}}", capsys, sweep=source, root=small_disk / "root")
    with pytest.raises(SystemExit, match="2"):
        main(["collect", str(source), "--root", str(small_disk / "root")])
    assert {"full": "No space left", "read-only": "Read-only"}[trouble] in capsys.readouterr().err
    assert (small_disk / "root" / "tiny" / "results.csv").read_text() == "of before"
    assert not list(small_disk.rglob(".results*"))
