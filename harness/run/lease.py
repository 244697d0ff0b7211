"""The lease of a run: who executes it now (`lease.json`), renewed by a heartbeat.

The lease decides who may start; the fence (`harness.run.fence`) decides whose writes count. A lease that was judged
stale by mistake therefore costs the earlier holder its run, and never costs a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import TypeAdapter

from aimscale.aim.errors import UserError
from aimscale.harness.run.fence import LeaseLost, fenced
from aimscale.harness.run.files import locked, process_started, read_as, write_json

BEAT_S = 10.0
"""A holder renews its lease this often."""
STALE_S = 120.0
"""A lease not renewed for this long is stale (at once when its holder is known to be gone)."""
WATCH_BEATS = 2.5
"""A lease that looks stale is watched for so many beats before it is taken over: clocks may have been set."""
START_S = 60.0
"""Processes that start a run at the same moment wait so long for each other."""
WRITER = ".writer-"
"""Prefix of a holder's own folder; the token follows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """`lease.json`: the process that executes the run."""

    token: str
    """Of its own folder."""
    host: str
    pid: int
    process_started: str | None
    """Start time of that process, which makes the pid unique."""
    heartbeat: float
    """Unix time of the last renewal by the holder's clock, for people: the file's own time counts."""
    machine: str | None = None
    """This start of that host and its space of process ids: containers and cloned machines share names."""
    group: str | None = None
    """Names the ranks that started with it."""
    job_id: str | None = None
    """Slurm's job, where there is one."""


_HOLDER = TypeAdapter(Holder)


class LeaseHeld(UserError):
    """Another process is executing this run."""


class Lease:
    """The right to write into a run directory, held from `start` to `release`."""

    def __init__(self, path: Path, *, also: Iterable[Path] = (), group: str | None = None) -> None:
        """`path` is `lease.json`; `also` are folders beside its own that the holder writes into; `group` names the
        ranks that this process starts with, which join the fence by it (`join_fence`)."""
        self._path, self._run = path, path.parent
        self._fences = [self._run, *also]
        token = uuid.uuid4().hex
        self.folder = self._run / f"{WRITER}{token}"
        """The holder's own, which every rank's fence needs."""
        self._holder = Holder(
            token=token,
            host=socket.gethostname(),
            pid=os.getpid(),
            process_started=process_started(os.getpid()),
            heartbeat=time.time(),
            machine=_machine(),
            group=group,
            job_id=os.environ.get("SLURM_JOB_ID"),
        )
        self._lost = False
        self._last_beat = 0.0
        self._stop = threading.Event()
        self._fence = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def start(self) -> None:
        """Take the lease and renew it until `release`; waits a little where the last holder only seems to be gone.

        Raises:
            LeaseHeld: another live process holds it.
        """
        lock, deadline = self._path.with_suffix(".lock"), running_time() + START_S
        while running_time() < deadline:
            with locked(lock, wait=False) as is_mine:
                if is_mine:
                    self._take()
                    self._thread.start()
                    return
            time.sleep(0.1)
        raise LeaseHeld(
            f"another process has been taking {self._run} over for {START_S:.0f} s; look for one that hangs"
        )

    def _take(self) -> None:
        self._refuse_if_held()
        self.folder.mkdir()
        # From here on no earlier holder can change anything.
        for earlier in self._run.glob(f"{WRITER}*"):
            if earlier != self.folder:
                with contextlib.suppress(FileNotFoundError):
                    earlier.rename(self.folder / f"earlier{earlier.name}")
        self._fence.enter_context(fenced(self._fences, self.folder))
        self._beat()

    def _refuse_if_held(self) -> None:
        holder = read_lease(self._path)
        if holder is None or _has_died(holder):
            return
        seen = _mtime(self._path)
        if _is_stale(self._path) and not _is_here(holder):
            time.sleep(WATCH_BEATS * BEAT_S)
            if _mtime(self._path) == seen:
                return
        raise LeaseHeld(
            f"{self._run} is being executed by process {holder.pid} on {holder.host}; wait for it or cancel it "
            f"(a lease is free {STALE_S:.0f} s after its holder died)"
        )

    def check(self) -> None:
        """Call before anything is written for good, and often.

        Raises:
            LeaseLost: another process took over, or the lease could not be renewed for so long that one may.
        """
        if not self._lost and running_time() - self._last_beat > STALE_S - BEAT_S:
            with contextlib.suppress(OSError):
                self._beat()  # this process may have stood still without another taking over
        if self._lost:
            raise LeaseLost(f"{self._run} was taken over by another process; this one stops")
        silence_s = running_time() - self._last_beat
        if silence_s > STALE_S - BEAT_S:
            raise LeaseLost(f"the lease of {self._run} could not be renewed for {silence_s:.0f} s; this process stops")

    def release(self) -> None:
        """Give the lease up, and the fence with it."""
        if os.getpid() != self._holder.pid:
            return  # a forked child has the object, not the right
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError), locked(self._path.with_suffix(".lock"), wait=False):
            self._path.rename(self.folder / "released")  # fails where another has taken over
        shutil.rmtree(self.folder, ignore_errors=True)
        self._fence.close()

    def _beat(self) -> None:
        """Renew the lease, through the fence."""
        now = running_time()
        try:
            holder = dataclasses.replace(self._holder, heartbeat=time.time())
            write_json(self._path, dataclasses.asdict(holder), durable=False)
        except LeaseLost:
            self._lost = True
            return
        self._last_beat = now

    def _renew(self) -> None:
        while not self._lost and not self._stop.wait(BEAT_S):
            # A disk that is full or away may be back at the next beat; `check` looks at how long ago the last one was.
            with contextlib.suppress(OSError):
                self._beat()


def read_lease(path: Path) -> Holder | None:
    """The holder named in a `lease.json`; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    return read_as(path, _HOLDER)


def is_held(path: Path) -> bool:
    """Whether a live process holds the lease, as far as can be told without waiting."""
    holder = read_lease(path)
    if holder is None or _has_died(holder):
        return False
    return _is_here(holder) or not _is_stale(path)


def _has_died(holder: Holder) -> bool:
    """Whether a holder on this machine is gone for certain. Elsewhere nothing is: a Slurm job that starts again, say,
    is no proof that the node of its first start is not still at work."""
    return _is_here(holder) and process_started(holder.pid) != holder.process_started


def _is_here(holder: Holder) -> bool:
    return holder.host == socket.gethostname() and holder.machine in (None, _machine())


def _machine() -> str:
    """This start of this machine and this space of process ids: containers and cloned hosts share names."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _is_stale(path: Path) -> bool:
    """Whether a lease was not renewed for long, by the file system's own clock, which all hosts share."""
    clock = path.with_suffix(".lock")  # goes with the lease
    try:
        clock.open("ab").close()
        os.utime(clock)
        now = clock.stat().st_mtime
    except OSError:
        now = time.time()  # a reader that may not write
    return not -STALE_S < now - _mtime(path) < STALE_S


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def running_time() -> float:
    """Seconds that no setting of a clock changes and that count while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@contextlib.contextmanager
def join_fence(path: Path, group: str, also: Iterable[Path] = ()) -> Iterator[Path]:
    """Write, for the block, by the right of this group's first rank, which takes the lease `path`; yields its folder.

    Raises:
        LeaseHeld: it did not take it.
    """
    deadline = running_time() + START_S + WATCH_BEATS * BEAT_S
    while (holder := read_lease(path)) is None or holder.group != group:
        if running_time() > deadline:
            raise LeaseHeld(f"the first rank did not take the lease {path}; its own log says why")
        time.sleep(0.1)
    folder = path.parent / f"{WRITER}{holder.token}"
    with fenced([path.parent, *also], folder):
        yield folder
