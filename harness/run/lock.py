"""A lock on a file, held for a process's life: the kernel, or the file server, drops it when the process is gone.

A run has two: `lock`, held by the first rank of its trainer, and `claim`, held by the worker that started it. Nothing
is renewed and no clock is read: the holder is alive, even if it stands still. A holder that lost its lock, cut off from
the file server, is stopped by the fence (`harness.run.fence`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from aimscale.aim.errors import UserError

PATIENCE_S = 1.0
"""Seconds for which a lock is tried: `is_held` takes it for microseconds, which must not look like another holder."""
_descriptors: set[int] = set()
"""Descriptors of the locks that this process holds."""


class LockHeld(UserError):
    """Another process holds the lock."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Process that holds a lock, or held it last, as written in the lock's file."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Random name of this holding of the lock."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further facts that the holder recorded."""


_HOLDER = TypeAdapter(Holder)


class Lock:
    """Exclusive lock on a file; the file stays, and says who held it last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def take(self, **facts: Any) -> Holder | None:
        """Take the lock and record its holder; None if another process has it.

        Raises:
            UserError: the file system cannot be written, or has no locks.
        """
        descriptor = -1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            if not _locked(descriptor, fcntl.LOCK_EX, patience_s=PATIENCE_S):
                os.close(descriptor)
                return None
            holder = Holder(facts=facts)
            text = (json.dumps(asdict(holder)) + "\n").encode()
            os.pwrite(descriptor, text, 0)  # readers read one line: the rest of a longer, older text does no harm
            os.ftruncate(descriptor, len(text))
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise _refusal(self.path, error) from error
        self._descriptor = descriptor
        _descriptors.add(descriptor)
        return holder

    def release(self) -> None:
        """Release the lock; without effect if it is not held."""
        if self._descriptor in _descriptors:
            _descriptors.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1


def _leave_to_parent() -> None:
    """Close the parent's locks in a forked child, which must neither keep nor release them."""
    while _descriptors:
        os.close(_descriptors.pop())


os.register_at_fork(after_in_child=_leave_to_parent)


@contextlib.contextmanager
def hold_lock(path: Path, **facts: Any) -> Iterator[Holder]:
    """Hold a lock for the block.

    Raises:
        LockHeld: another process has it.
        UserError: as `Lock.take` says.
    """
    lock = Lock(path)
    mine = lock.take(**facts)
    if mine is None:
        other = read_holder(path)
        who = f"process {other.pid} on {other.host}" if other else "another process"
        raise LockHeld(f"{path.parent} is being executed by {who}; wait for it or cancel it")
    try:
        yield mine
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Return whether a live process holds the lock; a file that cannot be opened is held by nobody.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _locked(descriptor, fcntl.LOCK_SH)
    except OSError as error:
        raise _refusal(path, error) from error
    finally:
        os.close(descriptor)


def read_holder(path: Path) -> Holder | None:
    """Read who holds a lock, or held it last; None if its file cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return _HOLDER.validate_json(path.read_bytes().partition(b"\n")[0])
    return None


def _locked(descriptor: int, kind: int, patience_s: float = 0.0) -> bool:
    """Try for `patience_s` to lock a file without blocking."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)


def _refusal(path: Path, error: OSError) -> UserError:
    """Turn a failure to lock into a sentence for the user."""
    if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        return UserError(
            f"the file system of {path.parent} has no locks ({error.strerror}), without which two machines could "
            f"execute one run; mount it with flock or choose another --root"
        )
    return UserError(f"cannot write into {path.parent} ({error.strerror}); mend that or choose another --root")
