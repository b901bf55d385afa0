"""Batches read together: the ranges of several batches enter, one table and each batch's places in it leave.

Scattered rows cost Lance by the call and by the order: it reads them as they are stored and copies every byte once more
to give another order. So four batches share a read, as it is stored; whoever takes pointers to the images puts them in
order for nothing. CPU time of a batch of 128 photos of 107 KB: 24.2 ms alone, 22.0 as stored, 16.2 four at a time,
15.8 eight at a time, 12.7 in order (benchmarks/bench_together.py).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuload.tables import Ranges, Table, coalesce, expand

AT_ONCE = 4  # batches of a read; they stay in memory until the last of them is done with
_SCATTERED = 4  # mean rows of a run below which batches gain by a read together, as `tables.lance` chooses its calls
_PIECE = 32  # rows of a run that one thread of Lance decodes: 0.70 of the time of 128 in one, on two cores

Rows = tuple[pa.Table, NDArray[np.int64]]  # a table and the places of a batch's rows in it, i64[rows of the batch]


def read_many(table: Table, batches: Sequence[Ranges]) -> tuple[pa.Table, list[NDArray[np.int64]]]:
    """The rows of several batches in one read: each once, as they are stored.

    Returns
    -------
    rows : pa.Table
        Its columns may come in several chunks.
    index : list of i64[rows of the batch]
        For each batch, where in `rows` its rows are; a row may be there twice.
    """
    wanted = [expand(ranges) for ranges in batches]
    rows, where = np.unique(np.concatenate(wanted), return_inverse=True)
    ends = np.cumsum([len(batch) for batch in wanted])
    return table.read(_pieces(coalesce(rows))), np.split(where.astype(np.int64), ends[:-1])


def read_together(table: Table, batches: Iterable[Ranges], at_once: int = AT_ONCE) -> Iterator[Callable[[], Rows]]:
    """One function a batch, which reads its rows; scattered ones share a read with their neighbours.

    The functions may be called from any thread, each once: the first call of a group reads for all. The first batch is
    alone, so that it comes early. Runs of neighbours are read batch by batch, since a longer one gains nothing.
    """
    group: list[Ranges] = []
    size = 1
    for ranges in batches:
        group.append(ranges)
        if len(group) == size or len(expand(ranges)) >= _SCATTERED * len(ranges):
            yield from _Group(table, group).parts()
            group, size = [], at_once
    if group:
        yield from _Group(table, group).parts()


class _Group:
    """Batches that share a read, kept until each has had its rows."""

    def __init__(self, table: Table, batches: list[Ranges]) -> None:
        self._table, self._batches = table, batches
        self._lock = threading.Lock()
        self._rows: tuple[pa.Table, list[NDArray[np.int64]]] | None = None
        self._failed = False
        self._left = len(batches)

    def parts(self) -> list[Callable[[], Rows]]:
        return [functools.partial(self._part, k) for k in range(len(self._batches))]

    def _part(self, k: int) -> Rows:
        with self._lock:
            if self._rows is None and not self._failed:
                try:
                    self._rows = read_many(self._table, self._batches)
                except Exception:  # whose it is shows where each reads its own
                    self._failed = True
            if self._rows is not None:
                rows, index = self._rows[0], self._rows[1][k]
                self._left -= 1
                if not self._left:
                    self._rows = None
                return rows, index
        rows, own = read_many(self._table, [self._batches[k]])
        return rows, own[0]


def _pieces(ranges: Ranges) -> Ranges:
    """The same rows in ranges of at most `_PIECE`: i64[N, 2]."""
    if not len(ranges) or (ranges[:, 1] - ranges[:, 0]).max() <= _PIECE:
        return ranges
    starts = [np.arange(lo, hi, _PIECE) for lo, hi in ranges.tolist()]
    ends = [np.minimum(start + _PIECE, hi) for start, hi in zip(starts, ranges[:, 1], strict=True)]
    return np.stack([np.concatenate(starts), np.concatenate(ends)], axis=1)
