"""Batches whose images share a size: the size of every image enters; batches of one bucket each leave.

Each row is in the bucket whose shape (height / width) is nearest. A bucket is cut into batches by itself; the full ones
of all buckets are put into one sequence, the short ones at the end of each bucket follow last. Every rank takes every
world_size-th batch of it, so the sequence is the same for any number of ranks, and any batch of it is known at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuload.errors import ConfigError, expect
from gpuload.images.encoded import is_encoded
from gpuload.images.header_sizes import Sizes, header_sizes
from gpuload.order import Cut, Order, Rows, expand
from gpuload.order.choose import BLOCK
from gpuload.order.draws import stream_key
from gpuload.order.orders import Blocks, InTurn
from gpuload.order.permutation import Permutation
from gpuload.order.ranks import Ranks
from gpuload.order.samplers import PlanSampler
from gpuload.tables import Table
from gpuload.tables.lance import LanceTable

_ROWS = 1 << 16  # of a read of columns
Members = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Buckets:
    """Sizes of batches: ``LanceDataset(..., buckets=Buckets([...]), transforms={"image": Image("bucket")})``.

    Parameters
    ----------
    sizes : sequence of (int, int)
        (height, width) of each bucket, pixels. An image is in the one whose height / width is nearest to its own, by
        ratio; in the first of several with the same.
    of : str
        The column of images, whether batches have it or not.
    height, width : str, optional
        Columns of numbers (or SQL expressions) with their sizes as a person sees them, such as `ingest` writes.
        Without them the headers of all images are read once, and what they say is kept in the user's cache folder.

    An image whose size nobody can tell is in the first bucket; `on_error` says what becomes of it.

    Raises
    ------
    ConfigError
    """

    sizes: Sequence[tuple[int, int]]
    of: str = "image"
    height: str | None = None
    width: str | None = None

    def __post_init__(self) -> None:
        listed = isinstance(self.sizes, (list, tuple)) and len(self.sizes) > 0
        expect(listed, "Buckets as a list of (height, width), at least one", self.sizes)
        for size in self.sizes:
            pair = isinstance(size, (list, tuple)) and len(size) == 2
            good = pair and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size)
            expect(good, "Buckets of (height, width), two positive ints", size)
        found = tuple((int(h), int(w)) for h, w in self.sizes)
        expect(len(set(found)) == len(found), "Buckets with each size once", list(found))
        object.__setattr__(self, "sizes", found)
        expect(isinstance(self.of, str), "Buckets(of=...) as the name of a column", self.of)
        both = (self.height is None) == (self.width is None)
        named = all(isinstance(name, (str, type(None))) for name in (self.height, self.width))
        expect(both and named, "Buckets(height=..., width=...) as two columns, or neither", (self.height, self.width))

    def choose(self, heights: NDArray[Any], widths: NDArray[Any]) -> NDArray[np.int64]:
        """The bucket of images of these sizes in pixels: i64[N]; the first for one without pixels."""
        ratios = np.array([h / w for h, w in self.sizes])
        order = np.argsort(ratios, kind="stable")
        order = order[np.append(True, np.diff(ratios[order]) > 0)]  # the first of those with one ratio
        limits = ratios[order][:-1] * ratios[order][1:]  # half way by ratio, squared: no logarithm to be rounded
        known = (heights > 0) & (widths > 0)
        ratio = np.where(known, heights, 1) / np.where(known, widths, 1)
        found: NDArray[np.int64] = np.where(known, order[np.searchsorted(limits, ratio * ratio)], 0)
        return found


@dataclass(frozen=True)
class Assigned:
    """The rows of each bucket.

    Attributes
    ----------
    rows : u32[N], i64[N] from 2**32 rows on
        Those of one bucket after the other, each in the order of the table.
    ends : i64[K]
        Where each bucket ends in `rows`.
    """

    rows: Members
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, parts: Iterable[NDArray[np.int64]], count: int, buckets: int) -> Assigned:
        """From the bucket of every row, in parts; memory is 6 bytes a row meanwhile, and 4 afterwards."""
        chosen = np.empty(count, np.uint8 if buckets <= 256 else np.uint16 if buckets <= 65536 else np.uint32)
        lo = 0
        for part in parts:
            chosen[lo : lo + len(part)] = part
            lo += len(part)
        rows: Members = np.empty(count, np.uint32) if count <= 1 << 32 else np.empty(count, np.int64)
        counts = np.zeros(buckets, np.int64)
        for lo in range(0, count, _ROWS):
            counts += np.bincount(chosen[lo : lo + _ROWS], minlength=buckets)
        ends = np.cumsum(counts)
        filled = ends - counts
        for lo in range(0, count, _ROWS):
            some = chosen[lo : lo + _ROWS]
            for bucket in np.unique(some).tolist():
                here = np.flatnonzero(some == bucket) + lo
                rows[filled[bucket] : filled[bucket] + len(here)] = here
                filled[bucket] += len(here)
        return cls(rows, ends)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each bucket, i64[K]."""
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True)
class ByBucket:
    """One rank's epoch of batches that share a size each. Its places are batches of the sequence.

    Attributes
    ----------
    sizes : sequence of (int, int)
    assigned : Assigned
    orders : list of Order
        Of the rows of each bucket.
    full : int[M] or Permutation
        The sequence of the full batches, which are counted through from bucket to bucket.
    short : i64[...]
        The buckets whose last batch is short, in the order of those.
    batch_size, rank, world_size, drop_last, start
        As of `FixedSize`.
    """

    sizes: Sequence[tuple[int, int]]
    assigned: Assigned
    orders: list[Order]
    full: NDArray[np.integer[Any]] | Permutation
    short: NDArray[np.int64]
    batch_size: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    start: int = 0

    def __len__(self) -> int:
        if self.drop_last:
            return max(0, self._full - self.start) // self.world_size
        return -(-max(0, self._full + len(self.short) - self.start) // self.world_size)

    def __call__(self, step: int) -> Rows:
        """The rows of batch `step`: as many on every rank."""
        if not 0 <= step < len(self):
            raise IndexError(f"Expected a step from 0 to {len(self) - 1}, got {step}.")
        first, total = self.used(step), self._full + len(self.short)
        size = max(hi - lo for _, lo, hi in map(self._batch, self._sample(first, total)))
        mine = first + self.rank
        bucket, lo, hi = self._batch(min(mine, total - 1))
        real = hi - lo if mine < total else 0
        parts = [self.orders[bucket](lo, hi)] if real else []
        count, filled = len(self.orders[bucket]), real
        while filled < size:  # from the start of the bucket
            more = min(size - filled, count)
            parts.append(self.orders[bucket](0, more))
            filled += more
        begin = int(self.assigned.ends[bucket]) - count
        rows = self.assigned.rows[begin + expand(np.concatenate(parts))].astype(np.int64)
        return Rows(step, None, rows, real, self.sizes[bucket])

    def used(self, steps: int) -> int:
        """Batches of the sequence that are used up after `steps` steps of every rank."""
        return self.start + steps * self.world_size

    @property
    def _full(self) -> int:
        return int((self.assigned.counts // self.batch_size).sum())

    def _sample(self, first: int, total: int) -> Iterator[int]:
        """The batches of a step that may be the largest: one full one is."""
        return iter([first] if first < self._full else range(first, min(first + self.world_size, total)))

    def _batch(self, number: int) -> tuple[int, int, int]:
        """A batch of the sequence: its bucket, and its places in the order of that, half-open."""
        counts = self.assigned.counts
        if number >= self._full:
            bucket = int(self.short[number - self._full])
            return bucket, int(counts[bucket]) // self.batch_size * self.batch_size, int(counts[bucket])
        if isinstance(self.full, Permutation):
            number = int(self.full(np.array([number]))[0])
        else:
            number = int(self.full[number])
        ends = np.cumsum(counts // self.batch_size)
        bucket = int(np.searchsorted(ends, number, "right"))
        lo = (number - int(ends[bucket]) + int(counts[bucket]) // self.batch_size) * self.batch_size
        return bucket, lo, lo + self.batch_size


class BucketSampler(PlanSampler):
    """Batches of one bucket each. Elastic."""

    def __init__(self, buckets: Buckets, shuffle: bool | str, max_pixels: int, ranks: Ranks, seed: int = 0) -> None:
        super().__init__(*ranks.resolve(), bool(shuffle), seed)
        self._buckets, self._max_pixels = buckets, max_pixels
        self._shuffle = "row" if shuffle is True else shuffle

    def key(self) -> dict[str, Any]:
        sizes = ", ".join(f"{height}x{width}" for height, width in self._buckets.sizes)
        words = {"buckets": sizes, "of": self._buckets.of, "height": self._buckets.height, "width": self._buckets.width}
        return {**super().key(), **words, "shuffle": self._shuffle}

    def cut(self, table: Table, batch_size: int, *, drop_last: bool = False, start: int = 0) -> Cut:
        """One rank's epoch over `table`; the sizes of its images are found at the first call."""
        if not isinstance(table, LanceTable):
            raise TypeError(f"Expected a LanceTable for Buckets, got {table!r}.")
        assigned, sizes = self._assigned(table), self._buckets.sizes
        counts = assigned.counts
        orders = [self._within(int(count), size) for count, size in zip(counts, sizes, strict=True)]
        short = np.flatnonzero(counts % batch_size)
        full: NDArray[np.integer[Any]] | Permutation
        if self._shuffle:
            full = Permutation(int((counts // batch_size).sum()), self._seed, self._epoch)
            short = short[Permutation(len(short), self._key("short"), self._epoch)(np.arange(len(short)))]
        else:  # as its last row comes
            full = self._in_turn(assigned, batch_size)
            short = short[np.argsort(assigned.rows[assigned.ends[short] - 1], kind="stable")]
        return ByBucket(sizes, assigned, orders, full, short, batch_size, *self._ranks.resolve(), drop_last, start)

    def _key(self, name: str) -> int:
        return stream_key(self._seed, f"gpuload.Buckets {name}")

    def _within(self, count: int, size: tuple[int, int]) -> Order:
        """The order of the rows of a bucket."""
        if self._shuffle not in ("row", "block"):
            return InTurn(count)
        block = BLOCK if self._shuffle == "block" else 1
        return Blocks(count, block, Permutation(-(-count // block), self._key(f"{size[0]}x{size[1]}"), self._epoch))

    def _in_turn(self, assigned: Assigned, batch_size: int) -> Members:
        """The full batches by the row that completes each."""
        begins = assigned.ends - assigned.counts
        batches = zip(begins.tolist(), (assigned.counts // batch_size).tolist(), strict=True)
        last = [assigned.rows[begin + batch_size - 1 :: batch_size][:count] for begin, count in batches]
        return np.argsort(np.concatenate(last), kind="stable").astype(assigned.rows.dtype)

    def _assigned(self, table: LanceTable) -> Assigned:
        """The rows of each bucket; kept as long as the table is, in this process."""
        known, key = _KNOWN.setdefault(table, {}), self._buckets
        if key not in known:
            parts = (key.choose(heights, widths) for heights, widths in self._sizes(table))
            known[key] = Assigned.of(parts, table.rows, len(key.sizes))
        return known[key]

    def _sizes(self, table: LanceTable) -> Iterator[Sizes]:
        height, width = self._buckets.height, self._buckets.width
        images = table.only([self._buckets.of])  # refuses what is no column
        if height is None or width is None:
            if not is_encoded(kind := images.schema.field(0).type):
                name = self._buckets.of
                raise ConfigError(f"Expected a column of encoded images for Buckets, got {name!r}, which is {kind}.")
            return header_sizes(images, self._max_pixels, shown=self.rank == 0)
        return _column_sizes(table, height, width)

    def __repr__(self) -> str:
        return (
            f"BucketSampler({len(self._buckets.sizes)} buckets, shuffle={self._shuffle!r}, rank={self.rank}, "
            f"world_size={self.world_size}, seed={self._seed})"
        )


_KNOWN: WeakKeyDictionary[LanceTable, dict[Buckets, Assigned]] = WeakKeyDictionary()  # not pickled with a table


def _column_sizes(table: LanceTable, height: str, width: str) -> Iterator[Sizes]:
    """Heights and widths from two columns, in order and in parts."""
    sides = [table.only([name]) for name in (height, width)]
    for name, side in zip((height, width), sides, strict=True):
        kind = side.schema.field(0).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise ConfigError(f"Expected a column of numbers for Buckets, got {name!r}, which is {kind}.")
    for lo in range(0, table.rows, _ROWS):
        ranges, found = np.array([[lo, min(lo + _ROWS, table.rows)]]), []
        for name, side in zip((height, width), sides, strict=True):
            values = side.read(ranges).column(0).to_numpy()
            bad = np.flatnonzero(~(values > 0))  # a null is NaN here
            if len(bad):
                where = int(table.positions(ranges)[bad[0]])
                raise ConfigError(f"Expected column {name!r} above 0, got {values[bad[0]]} at position {where}.")
            found.append(values)
        yield found[0], found[1]


def bucket_sampler(
    buckets: Buckets, given: Any, shuffle: bool | str, granularity: str | None, max_pixels: int, ranks: Ranks, seed: int
) -> BucketSampler:
    """The sampler of buckets.

    Raises
    ------
    ConfigError
        Words that buckets decide themselves.
    """
    if given is not None:
        raise ConfigError(f"Expected buckets or sampler, got both: sampler={given!r}.")
    if granularity == "fragment":
        raise ConfigError("Expected buckets without shard_granularity, got 'fragment': buckets go across fragments.")
    return BucketSampler(buckets, shuffle, max_pixels, ranks, seed)
