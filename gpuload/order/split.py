"""Train and validation: a share of 0..1 enters, the positions of the rows that lie in it leave.

A row lies where its position is hashed to, by a key that no seed changes. So shares that do not overlap have no row in
common, those that meet have every row, and a row stays in its share when others are appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuload.errors import ConfigError
from gpuload.order.draws import Draws

Split = tuple[float, float]  # half-open

_AT_ONCE = 1 << 20  # rows hashed at a time: 20 ms, 16 MB


def make_split(given: Any) -> Split | None:
    """``(lo, hi)`` as two floats, None for None.

    Raises
    ------
    ConfigError
        It is no such pair, or not 0 <= lo < hi <= 1.
    """
    if given is None:
        return None
    pair = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
    if not pair or not all(isinstance(end, Real) and not isinstance(end, bool) for end in given):
        raise ConfigError(f"Expected split as (lo, hi), such as (0.0, 0.9) and (0.9, 1.0), got {given!r}.")
    lo, hi = float(given[0]), float(given[1])
    if not 0 <= lo < hi <= 1:
        raise ConfigError(f"Expected split=(lo, hi) with 0 <= lo < hi <= 1, got {given!r}.")
    return lo, hi


def positions_in(split: Split, rows: int) -> NDArray[np.int64]:
    """The positions among `rows` rows that lie in `split`, sorted: i64[about (hi - lo) * rows]."""
    starts = range(0, rows, _AT_ONCE)
    found = [keep_in(split, np.arange(start, min(start + _AT_ONCE, rows))) for start in starts]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def keep_in(split: Split, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of `positions` that lie in `split`, in their order."""
    lo, hi = split
    place = Draws(0, 0, positions).uniform("split", 1)[:, 0]  # never 0 or 1
    found: NDArray[np.int64] = positions[(lo <= place) & (place < hi)]
    return found
