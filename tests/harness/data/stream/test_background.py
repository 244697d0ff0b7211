"""A thread that loads ahead: in order, only so far, and gone when nobody reads."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.stream.background import Background


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def settle(condition: object, want: int) -> None:
    for _ in range(200):
        if condition() == want:  # type: ignore[operator]
            break
        time.sleep(0.01)
    assert condition() == want  # type: ignore[operator]


def test_items_come_in_order_and_only_so_many_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    ahead = Background(items(), depth=3)
    settle(lambda: len(made), 3)
    time.sleep(0.05)
    assert len(made) == 3, "loads further ahead than it may"
    assert next(ahead) == 0
    settle(lambda: len(made), 4)
    assert list(ahead) == list(range(1, 20))
    assert list(ahead) == [], "over is over"
    settle(lambda: len(loader_threads()), 0)


def test_what_was_made_before_an_error_comes_first() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("shard x is gone")

    ahead = Background(items(), depth=5)
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(DataError, match="shard x is gone"):
            next(ahead)


@pytest.mark.parametrize("how", ["close", "forget"])
def test_the_thread_ends_with_its_reader(how: str) -> None:
    ahead = Background(iter(range(10**9)), depth=2)
    assert next(ahead) == 0
    assert len(loader_threads()) == 1
    if how == "close":
        ahead.close()
        ahead.close()
    else:
        del ahead
        gc.collect()
    assert not loader_threads()
