"""Processes of runs from a fork server, and those started without one."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from aimscale.sweeps.engine.devices import Machine
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.state.record import RunRecord

# In the fork server and in runs started cold: training is a stand-in that does, once, what the run's seed says.
SITE = """
import json, os, signal, sys, time
from pathlib import Path

if "aimscale.harness.train" in sys.orig_argv:
    import torch
    import aimscale.harness.train.attempt as attempt
    from aimscale.harness.run.directory import RunDir
    sys.path.append({tests!r})
    import stand_in

    imported_by = os.getpid()

    def train(path):
        seed = RunDir(path).load_config().training.seed
        is_first = not (path / "told").exists()
        told = dict(
            imported_by=imported_by, pid=os.getpid(), parent=os.getppid(), group=os.getpgid(0), session=os.getsid(0),
            threads=torch.get_num_threads(), openmp=os.environ["OMP_NUM_THREADS"], claim=os.environ["AIMSCALE_CLAIM"],
            claimed=json.loads((path / "claim").read_text())["token"], argv=sys.argv[1:], cwd=os.getcwd(),
            files=[os.readlink("/proc/self/fd/%d" % i) for i in range(3)], num_files=len(os.listdir("/proc/self/fd")),
            handler=signal.getsignal(signal.SIGTERM),
        )
        with (path / "told").open("a") as file:
            print(json.dumps(told), file=file)
        if seed == 1 and is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == 2 and is_first:
            os._exit(7)
        if seed == 3 and is_first:
            raise RuntimeError("the user's own code is wrong")
        if seed == 5 and is_first:  # by which time the run of seed 4 waits
            os.kill(imported_by, signal.SIGKILL)
            next(path.parent.glob("*_s4_*")).joinpath("cancelled").touch()
        return stand_in.main(str(path), "wait" if seed == 4 else "finish")

    attempt.train = train
"""


@pytest.mark.slow
def test_a_forked_run_lives_and_dies_alone_and_is_told_what_a_cold_one_is(
    write_sweep: Any, launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE.format(tests=str(Path(__file__).parents[1])))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    override = [{"when": {"seed": 6}, "set": {"runtime.num_threads": 2}}]
    sweep = write_sweep(sizes=["rung-32"], seeds=list(range(8)), budgets=[640], override=override)
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    result = launch(sweep, devices=2)
    out = capfd.readouterr().out
    ended = [[each["exit_code"] for each in record.read_attempts()] for record in records]
    assert ended == [[0], [-9, 0], [7, 0], [1, 0], [75], [0], [0], [0]]
    assert [record.read_status().state for record in records] == ["finished"] * 4 + ["preempted"] + ["finished"] * 3
    assert records[4].read_status().reason == "cancelled"
    assert (len(result.finished), result.failed) == (7, ())
    assert out.count("runs start slower now") == 1
    traceback = records[3].attempt_log(1).read_text()
    assert traceback.splitlines()[-1] == "RuntimeError: the user's own code is wrong"
    assert "Traceback" in traceback

    told = [[json.loads(line) for line in (record.path / "told").read_text().splitlines()] for record in records]
    parents = Counter(each["imported_by"] for run in told for each in run)
    assert sorted(parents.values()) == [1, 1, 9], "a cold run, and of two threads"
    for number, (record, run) in enumerate(zip(records, told, strict=True)):
        for attempt, each in enumerate(run, start=1):
            threads = 2 if number == 6 else 1
            assert (each["threads"], each["openmp"]) == (threads, str(threads))
            assert each["parent"] == os.getpid()
            assert each["pid"] == each["group"] == each["session"]
            assert each["claim"] == each["claimed"]
            assert each["argv"] == [str(record.path)]
            assert each["cwd"] == os.getcwd()
            log = str(record.attempt_log(attempt))
            assert (each["files"], each["num_files"]) == (["/dev/null", log, log], 4)  # the last is that of the listing
            assert each["handler"] == signal.SIG_DFL


@pytest.mark.slow
def test_forked_runs_and_cold_ones_hold_the_same_bits(
    write_sweep: Any, write_images: Any, launch: Any, tmp_path: Path
) -> None:
    write_images(tmp_path / "data" / "train", 64, seed=0, side=20)
    write_images(tmp_path / "data" / "validation", 8, seed=1, side=20)
    results = []
    for name, command in (("warm", None), ("cold", Machine(devices=1).command)):
        override = [{"when": {"seed": 1}, "set": {"runtime.device": "cuda"}}]
        sweep = write_sweep(name=name, sizes=["rung-32"], budgets=[128], seeds=[0, 1, 2], override=override)
        result = launch(sweep, devices=1, command=command)
        assert len(result.finished) == 2
        first, elsewhere, last = (RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep))
        status = elsewhere.read_status()
        results.append([(status.state, status.reason_class, status.reason, elsewhere.attempt_log(1).read_text())])
        for record in (first, last):
            (row,) = record.read_rows()
            results[-1].append((row["train_loss"], row["val_loss"], load_file(record.model_file(128))))
            lines = [json.loads(line) for line in record.metrics.read_text().splitlines()]
            results[-1].append([(line["loss"], line["grad_norm"]) for line in lines])
    (warm, *warm_runs), (cold, *cold_runs) = results
    assert warm == cold
    assert warm[1] == "config"
    np.testing.assert_equal(warm_runs, cold_runs)
