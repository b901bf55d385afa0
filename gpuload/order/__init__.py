"""Which rows, when: pure functions with random access; nothing in this folder reads a row.

Order  place → rows    orders.py: in turn · batches · rows · blocks · fragments;  weighted.py: by weights;
                       mix.py: of several tables, in the turns of turns.py
Cut    step → Rows     cut.py: batches of a fixed size, the same number on every rank;  buckets.py: of one image size

A sampler (samplers.py) makes both from a few numbers. Another order or cut is a file of its own beside these, and one
line where it is chosen (choose.py). What travels between them is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ranges = NDArray[np.int64]  # i64[N, 2]: half-open, in the order wanted


class Order(Protocol):
    """A sequence of rows, of which any part is known at once. The rows of several tables count through, one table
    after the other."""

    def __len__(self) -> int:
        """Places."""

    def __call__(self, lo: int, hi: int) -> Ranges:
        """The rows at places `lo` to `hi`, 0 <= lo <= hi <= len."""


class Repeating(ABC):
    """An `Order` in which a row may come twice: its place counts in what is drawn for it, not its position."""

    @abstractmethod
    def __len__(self) -> int:
        """Places."""

    @abstractmethod
    def __call__(self, lo: int, hi: int) -> Ranges:
        """The rows at places `lo` to `hi`."""

    def source(self, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """The table of each of these rows; None where there is one."""
        return None


@dataclass(frozen=True)
class Rows:
    """The rows of one batch.

    Attributes
    ----------
    step : int
    source : i64[N] or None
        The table of each row; None where there is one.
    row : i64[N]
        Its index in the table, fill-up rows last.
    real : int
        How many are not fill-up rows.
    size : tuple of int or None
        (height, width) of the batch's pictures, where the cut decides it.
    place : i64[N] or None
        The place of each in its epoch's order, where a row may come twice: what its draws are a function of.
    """

    step: int
    source: NDArray[np.int64] | None
    row: NDArray[np.int64]
    real: int
    size: tuple[int, int] | None = None
    place: NDArray[np.int64] | None = None


class Cut(Protocol):
    """One rank's batches of an epoch, from some place of its order on."""

    def __len__(self) -> int:
        """Steps that are left, the same on every rank."""

    def __call__(self, step: int) -> Rows:
        """The rows of a batch, 0 <= step < len."""

    def used(self, steps: int) -> int:
        """Places of the order that are used up when every rank has taken `steps` steps: where another cut goes on."""


def expand(ranges: Ranges) -> NDArray[np.int64]:
    """The members of half-open ranges, one after the other: i64[sum of lengths]."""
    ranges = np.asarray(ranges, np.int64).reshape(-1, 2)
    lengths = ranges[:, 1] - ranges[:, 0]
    before = np.cumsum(lengths) - lengths
    members: NDArray[np.int64] = np.arange(int(lengths.sum())) + np.repeat(ranges[:, 0] - before, lengths)
    return members


def coalesce(positions: NDArray[np.int64]) -> Ranges:
    """The fewest half-open ranges that list these positions in this order."""
    if not len(positions):
        return np.empty((0, 2), np.int64)
    cut = np.flatnonzero(np.diff(positions) != 1) + 1
    first = positions[np.concatenate([[0], cut])]
    last = positions[np.concatenate([cut - 1, [len(positions) - 1]])]
    return np.stack([first, last + 1], axis=1)
