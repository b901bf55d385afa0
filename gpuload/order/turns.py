"""Whose turn it is: shares of several sources enter; the source at any place leaves, and how many turns it had before.

After every n places a source has had n times its share of them, less than one turn more or less. No formula does that
for more than two sources; taking turns by the earliest deadline does (Tijdeman, "The chairman assignment problem",
Discrete Mathematics 32, 1980): at most 1 - 1/(2S-2) turns early or late with S sources. It goes on from state to state,
so the states at every 16,384th place are kept, and repeats itself after as many places as the shares' common
denominator says: with weights such as 0.7 and 0.3 after ten.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpuload import kernels  # type: ignore[attr-defined, unused-ignore]  # mypy cannot follow package-dir
from gpuload.errors import ConfigError

_CHUNK = 1 << 14  # places between two states: 0.1 ms to go through
_KEPT = 8  # chunks whose places are in memory, 160 KiB each
_MOST = 1024  # sources: times 2**51 is a number of 64 bits
_FINEST = 1 << 50  # the common denominator at most: a share is then off by 2**-51, which 10**14 places do not show


def shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """Whole numbers in the ratio of `weights`: i64[S], positive, their sum is 2**50 at most.

    Raises
    ------
    ConfigError
        More than 1024 of them, or one that is so much smaller than the others that it would be none.
    """
    if len(weights) > _MOST:
        raise ConfigError(f"Expected at most {_MOST} sources, got {len(weights)}.")
    exact = [_fraction(weight) for weight in weights]
    parts = [weight / sum(exact) for weight in exact]
    total = math.lcm(*(part.denominator for part in parts))
    if total > _FINEST:
        total = _FINEST
        found = [part.numerator * total // part.denominator for part in parts]
        found[found.index(max(found))] += total - sum(found)
    else:
        found = [int(part * total) for part in parts]
    if min(found) < 1:
        raise ConfigError(f"Expected weights of one magnitude, got {list(weights)}.")
    return np.array(found, np.int64)


def _fraction(weight: float) -> Fraction:
    """What was meant by a decimal number: 7/10 by 0.7."""
    simple = Fraction(weight).limit_denominator(1 << 20)
    return simple if float(simple) == float(weight) else Fraction(weight)


class Turns:
    """The turns of S sources from place 0 to infinity.

    Parameters
    ----------
    shares : i64[S]
        Positive; their sum divides places into periods.
    """

    def __init__(self, shares: NDArray[np.int64]) -> None:
        total = int(shares.sum())
        self._shares = shares
        periods = -(-_CHUNK // total)  # short ones are put together
        self._period = total * periods
        self._each = shares * periods  # i64[S]: turns of each in a period
        start = np.zeros(len(shares), np.int64)
        self._states = [(start, start)]  # (lag, taken) at the beginning of each chunk as far as it is known
        self._chunks: OrderedDict[int, tuple[NDArray[np.uint16], NDArray[np.int64]]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, lo: int, hi: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places `lo` to `hi`: the source of each, i64[n], and how many turns this had before, i64[n]."""
        sources, indices = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while lo < hi:
            period, place = divmod(lo, self._period)
            chunk, first = divmod(place, _CHUNK)
            source, index = self._chunk(chunk)
            last = min(len(source), first + hi - lo)
            sources.append(source[first:last].astype(np.int64))
            indices.append(index[first:last] + period * self._each[sources[-1]])
            lo += last - first
        return np.concatenate(sources), np.concatenate(indices)

    def place(self, source: int, index: int) -> int:
        """The place of a source's turn, after `index` earlier ones."""
        period, turn = divmod(index, int(self._each[source]))
        total, share = int(self._shares.sum()), int(self._shares[source])
        chunk = max(0, turn - 1) * total // share // _CHUNK  # it is not earlier
        while True:
            found, before = self._chunk(chunk)
            here = np.flatnonzero((found == source) & (before == turn))
            if len(here):
                return period * self._period + chunk * _CHUNK + int(here[0])
            chunk += 1

    def taken(self, places: int) -> NDArray[np.int64]:
        """The turns of each source in the first `places`: i64[S]."""
        period, place = divmod(places, self._period)
        chunk, rest = divmod(place, _CHUNK)
        found: NDArray[np.int64] = period * self._each
        if place:
            source, _ = self._chunk(chunk) if rest else (np.empty(0, np.uint16), None)
            found = found + self._state(chunk)[1] + np.bincount(source[:rest], minlength=len(found))
        return found

    def earliest(self, source: int, index: int) -> float:
        """A place that is not later than that of a source's turn; nothing is gone through for it."""
        return (index - 1) * float(self._shares.sum()) / float(self._shares[source])

    def _chunk(self, number: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """The places of a chunk: sources, and their turns before."""
        with self._lock:
            if number in self._chunks:
                self._chunks.move_to_end(number)
                return self._chunks[number]
        lag, taken = (part.copy() for part in self._state(number))
        found = take_turns(self._shares, lag, taken, self._length(number))
        with self._lock:
            self._chunks[number] = found
            while len(self._chunks) > _KEPT:
                self._chunks.popitem(last=False)
        return found

    def _state(self, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(lag, taken) where a chunk begins."""
        with self._lock:
            while len(self._states) <= chunk:
                lag, taken = (part.copy() for part in self._states[-1])
                take_turns(self._shares, lag, taken, self._length(len(self._states) - 1))
                self._states.append((lag, taken))
            return self._states[chunk]

    def _length(self, chunk: int) -> int:
        return min(_CHUNK, self._period - chunk * _CHUNK)


def take_turns(
    shares: NDArray[np.int64], lag: NDArray[np.int64], taken: NDArray[np.int64], count: int
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """The sources of the next `count` places and their turns before, u16[count] and i64[count]; `lag` and `taken`,
    i64[S], move on."""
    library = kernels.tables_library()
    if library is None:
        return take_turns_twin(shares, lag, taken, count)
    source, index = np.empty(count, np.uint16), np.empty(count, np.int64)
    kernels.run_turns(library, shares, lag, taken, source, index)
    return source, index


def take_turns_twin(
    shares: NDArray[np.int64], lag: NDArray[np.int64], taken: NDArray[np.int64], count: int
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """`take_turns` in Python, a hundred times as long: where nothing could be compiled."""
    share, late, before = shares.tolist(), lag.tolist(), taken.tolist()
    total, slack = sum(share), 2 * len(share) - 2
    sources, indices = [], []
    for _ in range(count):
        late = [a + b for a, b in zip(late, share, strict=True)]
        ready = [s for s in range(len(share)) if slack * late[s] >= total]
        turn = min(ready, key=lambda s: float((slack - 1) * total - slack * late[s]) / float(share[s]), default=0)
        late[turn] -= total
        sources.append(turn)
        indices.append(before[turn])
        before[turn] += 1
    lag[:], taken[:] = late, before
    return np.array(sources, np.uint16), np.array(indices, np.int64)


@lru_cache(maxsize=8)
def turns(shares: tuple[int, ...]) -> Turns:
    """The turns of these shares, which several plans may use."""
    return Turns(np.array(shares, np.int64))
