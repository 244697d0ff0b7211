"""Locks on files, held for a process's life, and the one writer of a run.

The kernel, or the file server, drops a lock when its process is gone. A run has two: `lock`, held by the first rank of
its trainer, and `claim`, held by the worker that started it; `evaluation/` has the same two of the program that
evaluates the run. Nothing is renewed and no clock is read: the holder is alive, even if it stands still.

The holder of a `lock` is a writer. It prepares all files in a folder beside the lock that is named by its token,
`.writer-<token>`, and renames them from there. Whoever takes the work over moves that folder first, so a holder that
lost its lock, cut off from the file server, fails at its next write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from aimscale.aim.errors import UserError
from aimscale.harness.run.timeouts import PATIENCE_S, TELL_S, WAIT_S

_log = logging.getLogger(__name__)

PASSING_ERRORS = {errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EKEYEXPIRED, errno.EACCES}
"""Error numbers that a file server gives for a while: of a handle or a ticket that expired, or a lost connection."""
_descriptors: set[int] = set()
"""Descriptors of the locks that this process holds."""
_writer_folders: dict[Path, Path] = {}
"""Run that this process writes into -> folder of its writer."""


class LockHeld(UserError):
    """Another process holds the lock."""


class LockLost(RuntimeError):
    """Loss of the run to another process; this one must stop writing."""


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
        """Take the lock and record its holder; None if another process has it."""
        descriptor = -1
        try:
            self.path.parent.mkdir(exist_ok=True)  # but not those above, which somebody may have moved
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            if not _locked(descriptor, fcntl.LOCK_EX, patience_s=PATIENCE_S):
                os.close(descriptor)
                return None
            holder = Holder(facts=facts)
            _write_holder(descriptor, holder)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise _refusal(self.path, error) from error
        self._descriptor = descriptor
        _descriptors.add(descriptor)
        return holder

    def note(self, **facts: Any) -> None:
        """Add facts to the record of its holder; that needs no space on a disk, as the file has its block already."""
        if (holder := read_holder(self.path)) and self._descriptor in _descriptors:
            _write_holder(self._descriptor, replace(holder, facts=holder.facts | facts))

    def release(self) -> None:
        """Release the lock; without effect if it is not held."""
        if self._descriptor in _descriptors:
            _descriptors.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1


def _write_holder(descriptor: int, holder: Holder) -> None:
    text = (json.dumps(asdict(holder)) + "\n").encode()
    os.pwrite(descriptor, text, 0)  # readers read one line: the rest of a longer, older text does no harm
    os.ftruncate(descriptor, len(text))


def held_descriptors() -> tuple[int, ...]:
    """Return the descriptors of the locks that this process holds: a child that is given them keeps the locks, too."""
    return tuple(_descriptors)


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
    """Return whether a live process holds the lock; a file that is missing or no file is held by nobody.

    Raises:
        UserError: the file system has no locks.
        OSError: one of `PASSING_ERRORS`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in PASSING_ERRORS:
            raise
        return False
    try:
        return not _locked(descriptor, fcntl.LOCK_SH)
    except OSError as error:
        raise _refusal(path, error) from error
    finally:
        os.close(descriptor)


def read_holder(path: Path) -> Holder | None:
    """Read who holds a lock, or held it last; None if its file cannot be read."""
    with (
        contextlib.suppress(OSError, ValueError, RecursionError),
        open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file,
    ):
        return _HOLDER.validate_json(file.readline(1 << 20))
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
    if error.errno == errno.ELOOP:
        return UserError(f"{path} is a symbolic link, whose target a lock would overwrite; remove it")
    return UserError(f"cannot write into {path.parent} ({error.strerror}); mend that or choose another --root")


@contextlib.contextmanager
def become_writer(run: Path, token: str, beside: Path | None = None) -> Iterator[Path]:
    """Become a writer of a run for the block: from its start on, no earlier holder of the same lock can write.

    Yields the writer's folder. It is removed at the end; after an error it stays until the next holder comes, since
    other ranks may still read there what happened.

    Args:
        beside: folder of the lock, if that is not the run's.
    """
    folder, pid = (beside or run).absolute() / f".writer-{token}", os.getpid()
    folder.mkdir()
    for earlier in {*folder.parent.glob(".writer-*")} - {folder}:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            moved = earlier.rename(folder / earlier.name)
            shutil.rmtree(moved) if moved.is_dir() and not moved.is_symlink() else moved.unlink()
    with writing_through(run, folder):
        yield folder
    if os.getpid() == pid:  # a forked child also leaves this block, but must not remove the folder
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing_through(run: Path, folder: Path) -> Iterator[None]:
    """Write into a run through the folder of its writer, for the block; other ranks write in the writer's name."""
    _writer_folders[run.absolute()] = folder
    try:
        yield
    finally:
        _writer_folders.pop(run.absolute(), None)


def writer_folder(path: Path) -> Path | None:
    """Return the folder through which this process writes into the run of `path`; None if it holds none."""
    if not _writer_folders:
        return None
    path = path.absolute()
    return next((_writer_folders[root] for root in (path, *path.parents) if root in _writer_folders), None)


def check_writer(path: Path) -> None:
    """Check that this process is still the writer of the run that `path` belongs to.

    Raises:
        LockLost: another process took the run over, or somebody moved it.
    """
    folder = writer_folder(path)
    if folder is not None and not folder.exists():
        raise LockLost(f"{folder.parent} was taken over by another process, or moved; this one stops writing")


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock for the block; its file is removed at the end. Yields False if another process holds it and `wait` is
    false.

    Raises:
        TimeoutError: another process has held it for `WAIT_S`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_current = False
    while not is_current:  # else the previous holder has removed the file
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            is_mine = _locked(descriptor, fcntl.LOCK_EX, patience_s=TELL_S if wait else 0.0)
            if wait and not is_mine:
                _log.warning("waiting for another process, which has locked %s (`fuser -v` names it)", path)
                if not (is_mine := _locked(descriptor, fcntl.LOCK_EX, patience_s=WAIT_S)):
                    what = f"another process has locked it for {WAIT_S / 60:.0f} minutes; end it (`fuser -v` names it)"
                    raise TimeoutError(errno.ETIMEDOUT, what, str(path))
            with contextlib.suppress(FileNotFoundError):
                is_current = os.path.samestat(os.fstat(descriptor), path.stat())
        finally:
            if not is_current:
                os.close(descriptor)
    try:
        yield is_mine
    finally:
        if is_mine:
            with contextlib.suppress(OSError):
                path.unlink()
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child forked in the meantime has it open, too
        os.close(descriptor)
