"""Random numbers and permutations that are functions of (key, counter) alone: O(1) at any position, on any machine.

A key names a purpose ("crop of seed 3"); a counter is a position of the stream. No generator state exists, so
nothing has to be saved, split over workers or replayed.
"""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: multiples of it spread over all 64 bits
_MASK = (1 << 64) - 1
_HIGH_HALF = np.uint64(32)  # a hash is shifted down by this, so that adding a half cannot overflow
_ROUND_KEYS = [np.uint64(number * int(_GOLDEN) & _MASK) for number in range(1, 7)]
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@functools.lru_cache(64, typed=True)  # a step asks for the same few
def make_key(*words: int | str) -> int:
    """Compute the 64-bit key of a purpose, e.g. `make_key("crop", seed)`."""
    text = "\x1f".join(f"{type(word).__name__}:{word}" for word in words)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_bits(key: int | U64, counter: npt.ArrayLike) -> U64:
    """Compute 64 random bits for every counter; `key` may be an array that broadcasts with `counter`."""
    keys = np.asarray(key, dtype=np.uint64)
    counters = np.atleast_1d(np.asarray(counter, dtype=np.uint64))  # arrays wrap around silently, scalars would warn
    mixed = _mix(counters * _GOLDEN + keys)
    mixed += keys
    return _mix(mixed)


def random_uniform(key: int | U64, counter: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Compute random numbers uniform on [0, 1), in steps of 2^-53, for every counter."""
    return np.asarray(random_bits(key, counter) >> np.uint64(11), dtype=np.float64) * 2.0**-53


def permute(values: npt.ArrayLike, size: int, key: int | U64) -> I64:
    """Apply a random permutation of range(size), chosen by `key`, to every value; an array of keys holds one for each.

    A Feistel network on the smallest nearly square grid that holds `size` cells; the few results outside of range(size)
    walk on along their cycle (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    out = np.array(values, dtype=np.uint64, ndmin=1)
    assert (out < size).all(), "permute: a value lies outside of range(size)"
    if size == 1:
        return out.astype(np.int64)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), out.shape)
    num_columns = math.isqrt(size - 1) + 1
    num_rows = -(-size // num_columns)
    out = _feistel(out, num_rows, num_columns, keys)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = _feistel(out[outside], num_rows, num_columns, keys[outside])
    return out.astype(np.int64)


def _feistel(values: U64, num_rows: int, num_columns: int, keys: U64) -> U64:
    """Apply one pass of a Feistel network to the cells of a grid: a hash of each half shifts the other in turn."""
    row, column = np.divmod(values, np.uint64(num_columns))
    (changed, size), (other, other_size) = (row, np.uint64(num_rows)), (column, np.uint64(num_columns))
    for round_key in _ROUND_KEYS:
        hashed = other * _GOLDEN
        hashed += keys
        hashed += round_key
        changed += np.right_shift(_mix(hashed), _HIGH_HALF, out=hashed)
        changed %= size
        changed, size, other, other_size = other, other_size, changed, size
    return row * np.uint64(num_columns) + column


def _mix(x: U64) -> U64:
    """Apply SplitMix64's finaliser (Steele, Lea and Flood 2014), in place."""
    x ^= x >> _SHIFTS[0]
    x *= _FACTORS[0]
    x ^= x >> _SHIFTS[1]
    x *= _FACTORS[1]
    x ^= x >> _SHIFTS[2]
    return x
