"""Loader processes: what they hand out stays what it is, they outlive signals and nothing else, and leave nothing."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import operator
import os
import pickle
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import until

from aimscale.harness.data import DataError
from aimscale.harness.data.store.processes import PRELOADED, WorkerDiedError
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.stream import Batch, TrainStream
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.failures import STOP_SIGNALS, start_fork_server

Configure = Callable[..., RunConfig]


@pytest.fixture
def stream(configure: Configure) -> TrainStream:
    return TrainStream(configure())


def micro_batches(stream: TrainStream, number: int, workers: int) -> Iterator[Batch]:
    """Of six images each."""
    steps = train_batches(stream, start=0, stop=6 * number, batch_size=12, micro_batch=6, num_workers=workers)
    return (batch for step in steps for batch in step)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie counts."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_stay_what_they_are_however_many_are_held(stream: TrainStream, workers: int) -> None:
    held = list(micro_batches(stream, 40, workers))
    gc.collect()
    for batch in held:
        expected = stream.batch(batch.positions.numpy())
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.prefix_lengths, expected.prefix_lengths)
    assert torch.cat([batch.positions for batch in held]).tolist() == list(range(240))


@pytest.mark.parametrize(("workers", "most"), [(0, 5), (1, 8)])
def test_memory_of_batches_that_are_let_go_is_used_again(stream: TrainStream, workers: int, most: int) -> None:
    assert len({batch.images.data_ptr() for batch in micro_batches(stream, 60, workers)}) <= most


def test_the_loader_draws_nothing_of_torch(stream: TrainStream) -> None:
    before = torch.get_rng_state()
    list(micro_batches(stream, 4, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_too_little_shared_memory_is_refused_before_a_worker_dies_of_it(
    stream: TrainStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(DataError, match="/dev/shm"):
        next(micro_batches(stream, 4, 1))


def test_the_server_has_one_thread_and_outlives_the_trainers_signals(stream: TrainStream) -> None:
    start_fork_server([PRELOADED])
    server: int = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    for signum in STOP_SIGNALS:
        os.kill(server, signum)
    assert len(list(micro_batches(stream, 4, 1))) == 4
    assert multiprocessing.forkserver._forkserver._forkserver_pid == server  # type: ignore[attr-defined]
    assert len(os.listdir(f"/proc/{server}/task")) == 1


def test_a_dead_worker_is_an_error_and_ends_the_others(stream: TrainStream) -> None:
    batches = micro_batches(stream, 10_000, 2)
    next(batches)
    workers = multiprocessing.active_children()
    os.kill(workers[0].pid or 0, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="exit code -9"):
        list(batches)
    until(lambda: all(is_gone(process.pid or 0) for process in workers))


@pytest.mark.parametrize("kind", [TypeError, DataError])
def test_an_error_in_a_worker_keeps_its_type_and_says_where(
    configure: Configure, small_set: Path, tmp_path: Path, kind: type[Exception]
) -> None:
    shutil.copytree(small_set, tmp_path / "data")
    stream = TrainStream(configure(path=tmp_path / "data"))
    if kind is DataError:
        (tmp_path / "data" / next(iter(stream.datasets[0].index.shard_sizes))).unlink()
    else:
        stream.datasets[0].read_many = operator.index  # type: ignore[assignment, method-assign]
    with pytest.raises(kind) as caught:
        list(micro_batches(stream, 10, 1))
    assert "stream.py" in caught.value.__notes__[0]


def test_an_iterator_that_is_left_early_ends_its_processes(stream: TrainStream) -> None:
    batches = train_batches(stream, start=0, stop=10**9, batch_size=8, micro_batch=4, num_workers=2)
    next(batches)
    children = multiprocessing.active_children()
    assert len(children) == 2
    batches.close()
    assert not any(process.is_alive() for process in children)


_PROGRAM = """
import multiprocessing, pickle, sys, time
from aimscale.harness.data.stream.loader import train_batches

stream = pickle.loads(sys.stdin.buffer.read())
kept = train_batches(stream, start=0, stop=10**9, batch_size=8, micro_batch=4, num_workers=2)
next(kept)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("is_killed", [False, True])
def test_workers_end_with_a_program_that_forgets_them_or_is_killed(stream: TrainStream, is_killed: bool) -> None:
    command = [sys.executable, "-c", _PROGRAM, "600" if is_killed else "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write(pickle.dumps(stream))
        program.stdin.close()
        workers = [int(pid) for pid in program.stdout.readline().split()]
        if is_killed:
            program.kill()
        assert program.wait(60) == (-signal.SIGKILL if is_killed else 0)
    assert len(workers) == 2
    until(lambda: all(is_gone(pid) for pid in workers))


def test_memory_that_cuda_does_not_lock_changes_nothing_else(
    stream: TrainStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA keeps the error for the next kernel; no GPU is here, so that its part is played."""
    pending: list[int] = []

    def register(*_: int) -> int:
        pending.append(1)
        return 712

    def launch(*_: object, device: str) -> None:
        if pending:
            raise RuntimeError(f"CUDA error {pending.pop()}")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: types.SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch, "ones", launch)
    steps = train_batches(stream, start=0, stop=12, batch_size=12, micro_batch=6, pin_memory=True)
    assert len(next(steps)) == 2
    launch(device="cuda")  # as the first step does
