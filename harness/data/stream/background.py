"""An iterator that is computed ahead in a thread of this process."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """The items of an iterator, in order, up to `depth` of them ahead of the reader.

    Decoding and torch's kernels let go of Python's lock, so that a trainer with one thread and a core to spare hardly
    waits for its images. `close` ends the thread; so do the end of the iterator and of the program.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._state = _State(items, depth)
        self._thread = threading.Thread(target=_run, args=(self._state,), name="loader", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._state, self._thread)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        state = self._state
        with state.changed:
            state.changed.wait_for(lambda: state.done or state.is_over)
            if state.done:
                item = state.done.popleft()
                state.changed.notify_all()
                return item
        if state.error is not None:
            raise state.error
        raise StopIteration

    def close(self) -> None:
        """End the thread after the item that it is at."""
        self._finalizer()


class _State(Generic[T]):
    """What the two threads share."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self.items, self.depth = items, depth
        self.changed = threading.Condition()
        self.done: collections.deque[T] = collections.deque()
        self.error: BaseException | None = None
        self.is_over = False
        self.must_stop = False


def _run(state: _State[T]) -> None:
    try:
        for item in state.items:
            with state.changed:
                state.done.append(item)
                state.changed.notify_all()
                state.changed.wait_for(lambda: len(state.done) < state.depth or state.must_stop)
                if state.must_stop:
                    return
    except BaseException as error:  # whatever it is, the reader raises it
        state.error = error
    finally:
        with state.changed:
            state.is_over = True
            state.changed.notify_all()


def _stop(state: _State[T], thread: threading.Thread) -> None:
    with state.changed:
        state.must_stop = True
        state.changed.notify_all()
    thread.join()
