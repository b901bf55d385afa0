"""Batches of a fixed size: an order enters; the rows of any step leave, for one of several ranks.

Every batch has `batch_size` rows except the last, every rank has the same number of batches of the same sizes, and
each row is in exactly one of them. Ranks that run short are filled up with rows they had before, marked as such.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpuload.errors import ConfigError
from gpuload.order import Order, Ranges, Repeating, Rows, expand


@dataclass(frozen=True)
class FixedSize:
    """One rank's epoch.

    Attributes
    ----------
    order : Order
    batch_size, rank, world_size : int
        Step k of this rank has the places from ``start + (k * world_size + rank) * batch_size``.
    drop_last : bool
        Leave out the steps that are not full on every rank.
    start : int
        Places that earlier steps of this epoch have used up, maybe with another world size.
    shortest, longest : int, optional
        Where each rank has an order of its own: rows in the shortest and in the longest of them.
    """

    order: Order
    batch_size: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    start: int = 0
    shortest: int | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"Expected batch_size of at least 1, got {self.batch_size}.")

    def __len__(self) -> int:
        """Steps that are left, the same on every rank."""
        full = self.batch_size * self.world_size
        if self.drop_last:
            rows = len(self.order) if self.shortest is None else self.shortest
            return max(0, rows - self.start) // full
        return -(-max(0, self._longest - self.start) // full)

    def __call__(self, step: int) -> Rows:
        """The rows of batch `step`."""
        rows, real = expand(self.ranges(step)), self.size(step)[1]
        if not isinstance(self.order, Repeating):
            return Rows(step, None, rows, real)
        return Rows(step, self.order.source(rows), rows, real, place=expand(np.array(self._places(step))))

    def used(self, steps: int) -> int:
        """Places of the order that are used up after `steps` steps of every rank."""
        return self.start + steps * self.world_size * self.batch_size

    def size(self, step: int) -> tuple[int, int]:
        """(rows of this step's batch, how many of them are not fill-up rows)."""
        if not 0 <= step < len(self):
            raise IndexError(f"Expected a step from 0 to {len(self) - 1}, got {step}.")
        first = self.used(step)
        size = min(self.batch_size, self._longest - first)
        return size, min(max(len(self.order) - first - self.rank * self.batch_size, 0), size)

    def ranges(self, step: int) -> Ranges:
        """The rows of batch `step` in order, fill-up rows last: i64[N, 2], half-open."""
        places = self._places(step)
        if not len(self.order):  # a rank without rows is filled up with the first of the table
            return np.array(places, np.int64)
        return np.concatenate([self.order(lo, hi) for lo, hi in places])

    def _places(self, step: int) -> list[tuple[int, int]]:
        """The places of batch `step`, half-open; those of fill-up rows begin again at the start of the order."""
        size, real = self.size(step)
        place = self.used(step) + self.rank * self.batch_size
        found = [(place, place + real)] if real else []
        while real < size:
            more = min(size - real, max(len(self.order), 1))
            found.append((0, more))
            real += more
        return found

    @property
    def _longest(self) -> int:
        return len(self.order) if self.longest is None else self.longest
