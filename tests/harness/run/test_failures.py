"""Why a run ended, in one sentence and one class; and the flag that signals raise."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aimscale.aim.config import ModelConfigError
from aimscale.harness.data import DataError
from aimscale.harness.run import failures
from aimscale.harness.run.failures import (
    EXIT_TIMEOUT_S,
    STOP_SIGNALS,
    NoMemoryError,
    StandstillError,
    classify,
    describe_full_disk,
    disk_sentence,
    is_shared,
    run_worker,
    stop_signals,
)
from aimscale.harness.run.lock import LockLost
from aimscale.harness.step.checkpoint import CheckpointError

Run = Callable[..., list[int]]


@pytest.mark.parametrize(
    ("error", "reason_class", "words"),
    [
        (MemoryError(), "oom", "MemoryError"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "oom", "CUBLAS"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "oom", "CUDA"),
        (NoMemoryError("out of memory (tried to allocate 2 GiB); use more ranks"), "oom", "use more ranks"),
        (DataError("shard 3 is broken; mend it"), "data", "shard 3 is broken; mend it"),
        (CheckpointError("no space; make room"), "node", "no space; make room"),
        (ModelConfigError("unknown size"), "config", "unknown size"),
        (LockLost("another process took over"), "node", "another process"),
        (OSError("Input/output error"), "node", "OSError: Input/output error"),
        (RuntimeError("NCCL error in:\n  unhandled system error"), "node", "NCCL error in: unhandled system error"),
        (RuntimeError("[gloo] Connection reset by peer"), "node", "another rank is gone"),
        (ValueError("a bug"), "code", "ValueError: a bug"),
    ],
)
def test_every_failure_has_a_class_and_one_sentence(error: BaseException, reason_class: str, words: str) -> None:
    found, sentence = classify(error)
    assert found == reason_class
    assert words in sentence
    assert "\n" not in sentence


def test_stop_signals_raise_a_flag_and_give_back_the_handlers_of_before(request: pytest.FixtureRequest) -> None:
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, which is obeyed
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, hang_up))
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert {signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT} == set(STOP_SIGNALS)
    for number in STOP_SIGNALS:
        with stop_signals() as flag:
            assert not flag.is_raised
            os.kill(os.getpid(), number)
            assert flag.is_raised
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_second_ctrl_c_waits_for_no_save_and_nohup_is_obeyed() -> None:
    with stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not flag.is_raised
    finally:
        signal.signal(signal.SIGHUP, before)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a/status.json")


def test_what_all_nodes_share_is_no_fault_of_the_node_that_met_it(tmp_path: Path) -> None:
    full = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert is_shared(full, tmp_path)  # a full disk may name no file
    full.filename = str(tmp_path / "logs" / "a")
    assert is_shared(full, tmp_path)
    full.filename = "/proc/elsewhere"
    assert not is_shared(full, tmp_path)
    assert is_shared(CheckpointError("damaged"), tmp_path)
    assert is_shared(LockLost("taken over"), tmp_path)
    assert not is_shared(StandstillError("a loader process was stopped"), tmp_path)
    assert not is_shared(RuntimeError("CUDA error: an illegal memory access"), tmp_path)


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("no images"), 2), (NoMemoryError("too little"), 1), (LockLost("taken over"), 1), (FULL, 1)],
)
def test_a_worker_says_what_is_wrong_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def work(paths: list[Path]) -> int:
        raise error

    timers: list[float] = []
    monkeypatch.setattr(failures, "exit_after", timers.append)
    monkeypatch.setattr(sys, "argv", ["worker", "run"])
    with pytest.raises(SystemExit) as ended:
        run_worker(work, "worker RUN_DIR")
    assert ended.value.code == code
    said = disk_sentence(error) if isinstance(error, OSError) else str(error)
    assert capsys.readouterr().err == f"aimscale: {said}\n"
    assert timers == [EXIT_TIMEOUT_S], "an exit that hangs must end, too"
    monkeypatch.setattr(sys, "argv", ["worker"])
    with pytest.raises(SystemExit, match="usage: python -m worker RUN_DIR"):
        run_worker(work, "worker RUN_DIR")


@pytest.mark.parametrize(
    ("blocks", "free", "files", "files_free", "words"),
    [
        (10**9, 255, 10**6, 10**5, r"is full \(1,044,480 bytes free\)"),
        (10**9, 256, 10**6, 10**5, ""),
        (64, 0, 10**6, 10**5, r"is full \(0 bytes free\)"),
        (64, 1, 10**6, 10**5, ""),
        (10**9, 10**8, 10**6, 0, "as many files as it can"),
        (10**9, 10**8, 0, 0, ""),
        (0, 0, 0, 0, ""),
    ],
)
def test_a_full_disk_is_told_by_its_blocks_and_its_files(
    blocks: int, free: int, files: int, files_free: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems without a limit tell zeros of both."""
    disk = SimpleNamespace(f_blocks=blocks, f_bavail=free, f_frsize=4096, f_files=files, f_favail=files_free)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert re.search(words or "^$", describe_full_disk(Path("/somewhere")))
    monkeypatch.undo()
    assert describe_full_disk(Path("/no such folder")) == ""
