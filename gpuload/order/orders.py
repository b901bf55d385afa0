"""Orders of one table's rows: a number of rows and a permutation enter; the rows at any places leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuload.order import Ranges, coalesce
from gpuload.order.permutation import Permutation


@dataclass(frozen=True)
class InTurn:
    """Every row as it lies."""

    rows: int

    def __len__(self) -> int:
        return self.rows

    def __call__(self, lo: int, hi: int) -> Ranges:
        return np.array([[lo, hi]], np.int64)


@dataclass(frozen=True)
class ShuffledBatches:
    """Runs of `size` rows in the order of `shuffled`, a permutation of the full ones; a short one stays last."""

    rows: int
    size: int
    shuffled: Permutation

    def __len__(self) -> int:
        return self.rows

    def __call__(self, lo: int, hi: int) -> Ranges:
        run, within = np.divmod(np.arange(lo, hi), self.size)
        full = run < self.shuffled.n
        run[full] = self.shuffled(run[full])
        return coalesce(run * self.size + within)


@dataclass(frozen=True)
class Blocks:
    """Blocks of `size` rows in the order of `shuffled`, a permutation of all blocks, the short one among them. Blocks
    of one row are a shuffle of the rows."""

    rows: int
    size: int
    shuffled: Permutation

    def __len__(self) -> int:
        return self.rows

    def __call__(self, lo: int, hi: int) -> Ranges:
        place = np.arange(lo, hi)
        short = self.rows % self.size
        if short:  # what stands behind the short block moves up by what that lacks
            first = int(self.shuffled.inverse(np.array([self.rows // self.size]))[0]) * self.size
            place[place >= first + short] += self.size - short
        block, within = np.divmod(place, self.size)
        return coalesce(self.shuffled(block) * self.size + within)


class Fragments:
    """Whole fragments, one after the other.

    Parameters
    ----------
    first : i64[F]
        The first row of each, in the order wanted.
    rows : i64[F]
        How many it has.
    """

    def __init__(self, first: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        self._first, self._ends = first, np.cumsum(rows)
        self._begins = self._ends - rows

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __call__(self, lo: int, hi: int) -> Ranges:
        a, b = np.searchsorted(self._ends, lo, "right"), np.searchsorted(self._begins, hi, "left")
        begins, ends = self._begins[a:b], self._ends[a:b]
        moved = self._first[a:b] - begins
        ranges = np.stack([np.maximum(begins, lo) + moved, np.minimum(ends, hi) + moved], axis=1)
        return ranges[ranges[:, 0] < ranges[:, 1]]
