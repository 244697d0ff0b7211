"""Processes beside a trainer: nothing of its threads is in them, its signals do not end them, they share memory."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Pipe
from pathlib import Path

import numpy as np
import pytest

from aimscale.aim.errors import UserError
from aimscale.harness.data.processes import SharedArray, SharedMemory, start_process, start_server
from aimscale.harness.data.stream.worker_pool import _Ring

_PROGRAM = """
import multiprocessing.forkserver, os, threading
from aimscale.harness.data.processes import start_process

lock = threading.Lock()
lock.acquire()
os.register_at_fork(after_in_child=lock.acquire)  # as libraries do whose threads are not in a fork
process = start_process(int)
process.join()
server = multiprocessing.forkserver._forkserver._forkserver_pid
print(process.exitcode, len(os.listdir(f"/proc/{server}/task")))
"""


def test_no_thread_and_no_main_module_is_in_a_process(tmp_path: Path) -> None:
    program, folder = tmp_path / "without-a-guard.py", tmp_path / ("long" * 20)
    program.write_text(_PROGRAM)
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for how in ([str(program)], ["-"]):
        done = subprocess.run(
            [sys.executable, *how],
            env={**environment, "TMPDIR": str(folder)},  # longer than a socket's path may be
            input=_PROGRAM,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stdout == "0 1\n", "exit code of the process, threads of the server"
        assert done.stderr == ""


def test_a_long_temporary_folder_stops_no_pool(tmp_path: Path) -> None:
    program = (
        "from concurrent.futures import ProcessPoolExecutor as Pool\n"
        "from aimscale.harness.data.processes import server_context\n"
        "print(Pool(1, server_context('json')).submit(int).result())"
    )
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_the_server_outlives_the_trainers_signals() -> None:
    multiprocessing.forkserver._forkserver._stop()
    start_server()
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT):
        os.kill(server, signum)
    process = start_process(int)
    process.join(60)
    assert process.exitcode == 0
    assert multiprocessing.forkserver._forkserver._forkserver_pid == server


def test_memory_is_shared_with_a_process_that_is_given_it() -> None:
    ring = _Ring.make(1, 2)
    process = start_process(ring.stop)
    process.join(60)
    assert ring.is_stopped
    assert ring.slot(0).tolist() == [0, 0]


def test_more_memory_than_can_be_passed_is_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"more pieces of memory than a process can be given .*num_workers to 0"):
        start_process(print, *(SharedMemory(1) for _ in range(300)))
    process = start_process(int)
    process.join(60)
    assert process.exitcode == 0


def test_memory_stays_as_long_as_a_view() -> None:
    view = SharedMemory(1 << 20).array((4, 5), offset=16)
    view[:] = 3
    assert view.sum() == 60


def test_a_large_array_is_shared_and_a_small_one_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "teller.py").write_text(
        "def tell(arrays, pipe):\n"
        "    for _ in range(2):\n"
        "        pipe.send([(len(array.values), array.values[0], array.values[-1]) for array in arrays])\n"
        "        pipe.recv()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arrays = [SharedArray(np.arange(number)) for number in (5, 1 << 18)]
    ours, theirs = Pipe()
    start_process(importlib.import_module("teller").tell, arrays, theirs)
    theirs.close()
    assert ours.recv() == [(5, 0, 4), (1 << 18, 0, (1 << 18) - 1)]
    assert arrays[0]._memory is None
    assert arrays[1]._memory is not None
    arrays[1]._memory.bytes[0] = 7
    ours.send(None)
    assert ours.recv() == [(5, 0, 4), (1 << 18, 7, (1 << 18) - 1)]
    ours.send(None)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_a_loader_process_keeps_what_a_batch_frees() -> None:
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", first + _BATCHES], capture_output=True, check=True).stdout)
        for first in ("", "from aimscale.harness.data.processes import keep_freed_memory as k; k()\n")
    )
    assert given_back > 10_000, "the test measures nothing here"
    assert kept < 1_000


_BATCHES = """
import resource
import numpy as np

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def batch():
    [np.ones(375 * 500 * 3, dtype=np.uint8) for _ in range(32)]

batch()
before = faults()
for _ in range(5):
    batch()
print(faults() - before)
"""
