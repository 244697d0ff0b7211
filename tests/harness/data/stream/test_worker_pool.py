"""Loader processes: what they hand out stays what it is, they outlive signals and nothing else, and leave nothing."""

from __future__ import annotations

import gc
import multiprocessing
import operator
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.positions import TrainStream
from aimscale.harness.data.stream.worker_pool import WorkerDiedError, WorkerPool
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.failures import classify

Configure = Callable[..., RunConfig]


@pytest.fixture
def stream(configure: Configure) -> TrainStream:
    return TrainStream(configure())


def parts(number: int, size: int = 6) -> list[range]:
    return [range(first, first + size) for first in range(0, number * size, size)]


def in_ring(pool: WorkerPool, batch: Batch) -> bool:
    assert isinstance(batch.images, torch.Tensor)
    memory = pool._ring.memory
    first = memory.array(()).ctypes.data
    return first <= batch.images.data_ptr() < first + len(memory.bytes)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie counts."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("not within 30 s")


def test_batches_stay_what_they_are_however_many_are_held(stream: TrainStream) -> None:
    pool = WorkerPool(stream, num_workers=2, micro_batch=6, num_micro=2)
    held, where = [], []
    for batch in pool.load(parts(40)):
        held.append(batch)
        where.append(in_ring(pool, batch))
    assert where[0], "the first ones need no copy"
    assert not all(where), "the workers keep slots of their own"
    pool.close()
    gc.collect()
    for batch in held:
        expected = stream.batch(batch.positions.numpy())
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.prefix_len, expected.prefix_len)
    assert torch.cat([batch.positions for batch in held]).tolist() == list(range(240))


def test_a_thread_uses_memory_again_that_nobody_shows(stream: TrainStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aimscale.harness.data.stream.loader.PIXELS_AT_A_TIME", 1)

    def steps() -> Iterator[Batch]:
        return (batch for (batch,) in train_batches(stream, start=0, stop=240, batch_size=6, micro_batch=6))

    assert len({batch.images.data_ptr() for batch in steps()}) <= 5, "in use, ahead and being made"
    held = list(steps())
    assert torch.equal(torch.cat([batch.images for batch in held]), stream.batch(range(240)).images)


def test_slots_are_used_again_and_nothing_is_copied_when_batches_are_let_go(stream: TrainStream) -> None:
    pool = WorkerPool(stream, num_workers=1, micro_batch=6, num_micro=1)
    places = []
    batch = None
    for batch in pool.load(parts(60)):
        assert in_ring(pool, batch)
        places.append(batch.images.data_ptr())
    assert len(set(places)) < 10
    pool.close()
    assert batch is not None
    assert torch.equal(batch.images, stream.batch(range(354, 360)).images), "valid after the end of the pool"


def test_a_ring_that_is_too_small_for_a_step_copies(stream: TrainStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aimscale.harness.data.stream.worker_pool._MAX_BYTES", 1)
    steps = list(train_batches(stream, start=0, stop=96, batch_size=48, micro_batch=4, num_workers=2))
    images = torch.cat([batch.images for step in steps for batch in step])
    assert torch.equal(images, stream.batch(range(96)).images)


def test_what_one_worker_decoded_the_others_need_not(configure: Configure) -> None:
    stream, fresh = TrainStream(configure()), TrainStream(configure())
    known = stream._sources[0].pixels._known
    assert not known.any()
    for _ in train_batches(stream, start=0, stop=160, batch_size=16, micro_batch=4, num_workers=2):
        pass
    assert known.all(), "a worker's pixels are not seen by its parent"

    def refuse(samples: Any) -> list[bytes]:
        assert len(samples) == 0, "decoded again"
        return []

    stream.datasets[0].read_many = refuse  # type: ignore[method-assign]
    mine = 160 + np.flatnonzero(stream.locate(np.arange(160, 400))[0] == 0)
    assert torch.equal(stream.batch(mine).images, fresh.batch(mine).images)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_workers_outlive_the_trainers_signals(stream: TrainStream, signum: signal.Signals) -> None:
    pool = WorkerPool(stream, num_workers=2, micro_batch=6, num_micro=1)
    batches = pool.load(parts(30))
    next(batches)
    for _ in range(3):
        for process in pool._processes:
            os.kill(process.pid or 0, signum)
        next(batches)
    assert sum(1 for _ in batches) == 26
    pool.close()
    assert all(process.exitcode == 0 for process in pool._processes)


@pytest.mark.parametrize(("signum", "reason"), [(signal.SIGKILL, "out of memory"), (signal.SIGUSR1, "SIGUSR1")])
def test_a_dead_worker_is_an_error_that_says_how_it_died(
    stream: TrainStream, signum: signal.Signals, reason: str
) -> None:
    pool = WorkerPool(stream, num_workers=2, micro_batch=6, num_micro=1)
    batches = pool.load(parts(10_000))
    next(batches)
    os.kill(pool._processes[0].pid or 0, signum)
    with pytest.raises(WorkerDiedError, match=reason) as caught:
        for _ in batches:
            pass
    assert classify(caught.value)[0] == ("oom" if signum == signal.SIGKILL else "code")
    pool.close()
    assert all(is_gone(process.pid or 0) for process in pool._processes)


def test_an_error_in_a_worker_keeps_its_type_and_says_where(
    configure: Configure, small_set: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_set, tmp_path / "data")
    for kind in (TypeError, DataError):
        stream = TrainStream(configure(sources=[{"path": str(tmp_path / "data")}]))
        if kind is DataError:
            (tmp_path / "data" / stream.datasets[0].shards[0].name).unlink()
        else:
            stream.datasets[0].read_many = operator.index  # type: ignore[assignment, method-assign]
        with pytest.raises(kind) as caught:
            list(train_batches(stream, start=0, stop=60, batch_size=20, micro_batch=20, num_workers=1))
        assert "in a loader process" in caught.value.__notes__[0]
        assert "positions.py" in caught.value.__notes__[0]


def test_an_iterator_that_is_left_early_ends_its_processes(stream: TrainStream) -> None:
    batches = train_batches(stream, start=0, stop=10**9, batch_size=8, micro_batch=4, num_workers=2)
    next(batches)
    children = multiprocessing.active_children()
    assert len(children) == 2
    batches.close()
    assert not multiprocessing.active_children()


def hold_batches(stream: TrainStream, pids: Any) -> None:
    """Start a loader, tell its workers' ids, and end without closing it."""
    global _kept
    _kept = train_batches(stream, start=0, stop=10**9, batch_size=8, micro_batch=4, num_workers=2)
    next(_kept)
    for process in multiprocessing.active_children():
        pids.put(process.pid)


def hold_batches_for_ever(stream: TrainStream, pids: Any) -> None:
    hold_batches(stream, pids)
    time.sleep(600)


def test_a_program_that_forgets_its_loader_ends(stream: TrainStream) -> None:
    context = multiprocessing.get_context("fork")
    pids = context.SimpleQueue()
    program = context.Process(target=hold_batches, args=(stream, pids))
    program.start()
    workers = [pids.get(), pids.get()]
    program.join(30)
    assert program.exitcode == 0
    wait_until(lambda: all(is_gone(pid) for pid in workers))


def test_workers_end_when_the_trainer_is_killed(stream: TrainStream) -> None:
    context = multiprocessing.get_context("fork")
    pids = context.SimpleQueue()
    program = context.Process(target=hold_batches_for_ever, args=(stream, pids))
    program.start()
    workers = [pids.get(), pids.get()]
    program.kill()
    program.join()
    wait_until(lambda: all(is_gone(pid) for pid in workers))
