"""Batches read together: the ranges of several batches enter, one table and each batch's places in it leave.

Scattered rows cost Lance by the call and by the order: it reads them as they are stored and copies every byte once more
to give another order. So two batches share a read, as it is stored; whoever takes pointers to the images puts them in
order for nothing. CPU time of reading a batch of 128 photos of 107 KB, two cores: 24.2 ms alone, 22.0 as stored, 18.9
two at a time, 16.2 four at a time, 15.8 eight at a time; in order 12.7. But what was read long before it is decoded has
left the cache: whole batches of 64, decoded, at 0.95 of the rate of in order alone, 1.01 two at a time, 0.94 four at a
time (nine rounds).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuload.errors import ReadError
from gpuload.order import Ranges, coalesce, expand
from gpuload.tables import Selection, Table, scattered, size
from gpuload.tables.reading import until

AT_ONCE = 2  # batches of a read; they stay in memory until the last of them is done with
MOST_BYTES = 64 << 20  # of a read of several; in one batch as large, what a call costs is nothing beside its bytes
_PIECE = 32  # rows of a run that one thread of Lance decodes: 0.70 of the time of 128 in one, on two cores


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


def read_together(
    table: Table,
    batches: Iterable[Ranges],
    at_once: int = AT_ONCE,
    most_bytes: int = MOST_BYTES,
    stop: threading.Event | None = None,
) -> Iterator[Callable[[], Selection]]:
    """One function a batch, which reads its rows; scattered ones share a read with their neighbours.

    The functions may be called from any thread, each once: the first call of a group reads for all, the others wait
    for it, so that two groups are read at a time by `at_once` + 1 threads. Batches are alone until one has been read,
    which says how large they are; runs of neighbours are always alone, since a longer one gains nothing.

    Parameters
    ----------
    at_once : int
        Batches of a read, at most.
    most_bytes : int
        What a read of several may hold, by the mean row of the last read.
    stop : threading.Event, optional
        Set when nobody wants the rest: a store that is away is not asked again.
    """
    seen = _Seen()
    group: list[Ranges] = []
    rows = 0
    for ranges in batches:
        group.append(ranges)
        rows += size(ranges)
        full = len(group) >= at_once or rows + size(ranges) > seen.rows_in(most_bytes)  # another one would be too much
        if full or not scattered(ranges):
            yield from _Group(table, group, seen, stop or threading.Event()).parts()
            group, rows = [], 0
    if group:
        yield from _Group(table, group, seen, stop or threading.Event()).parts()


@dataclass
class _Seen:
    """The last read."""

    rows: int = 0
    bytes: int = 0

    def rows_in(self, size: int) -> int:
        """Rows that `size` bytes hold; none while nothing was read."""
        return size * self.rows // max(self.bytes, 1)


class _Group:
    """Batches that share a read, which is kept until each has had its rows."""

    def __init__(self, table: Table, batches: list[Ranges], seen: _Seen, stop: threading.Event) -> None:
        self._table, self._batches, self._seen, self._stop = table, batches, seen, stop
        self._lock = threading.Lock()
        self._found: tuple[pa.Table, Sequence[NDArray[np.int64] | None]] | None = None
        self._failed = False
        self._away: ReadError | None = None  # nobody waits for the store a second time
        self._left = len(batches)

    def parts(self) -> list[Callable[[], Selection]]:
        return [functools.partial(self._part, k) for k in range(len(self._batches))]

    def _part(self, k: int) -> Selection:
        with until(self._stop):
            return self._selection(k)

    def _selection(self, k: int) -> Selection:
        with self._lock:
            if self._found is None and not self._failed:
                self._read()
            if self._found is not None:
                rows, index = self._found
                self._left -= 1
                if not self._left:
                    self._found = None
                return Selection(rows, index[k])
        if self._away is not None:
            raise self._away.at(tuple(self._table.positions(self._batches[k]).tolist()))
        rows, index = read_many(self._table, [self._batches[k]])
        return Selection(rows, index[0])

    def _read(self) -> None:
        alone = self._batches[0] if len(self._batches) == 1 else None
        try:
            if alone is not None and not scattered(alone):  # runs of neighbours come in their order
                rows = self._table.read(_pieces(alone))
                self._found = rows, [None]
            else:
                self._found = read_many(self._table, self._batches)
        except Exception as error:  # each then reads its own, so that the error comes where it belongs
            self._failed = True
            self._away = error if isinstance(error, ReadError) and error.waited else None
        else:
            self._seen.rows, self._seen.bytes = len(self._found[0]), self._found[0].nbytes


def _pieces(ranges: Ranges) -> Ranges:
    """The same rows in ranges of at most `_PIECE`: i64[N, 2]."""
    if not len(ranges) or (ranges[:, 1] - ranges[:, 0]).max() <= _PIECE:
        return ranges
    starts = [np.arange(lo, hi, _PIECE) for lo, hi in ranges.tolist()]
    ends = [np.minimum(start + _PIECE, hi) for start, hi in zip(starts, ranges[:, 1], strict=True)]
    return np.stack([np.concatenate(starts), np.concatenate(ends)], axis=1)
