"""The line's middle: what a step reads enters, a finished `Batch` leaves. It knows no kind of column by name.

reads ─Read─▶ read: Arrow, fields' values ─Draft─▶ slices ─▶ decode: fields' work ─▶ finish: policy ─▶ Batch
              threads: a quarter of the cores,     num_threads (one a core)          consumer's
              2 to 4 (storage is waited for)

On a GPU a slice is a whole batch and two threads hand them to the decoder, each with streams of its own; the
consumer's stream waits for events, the consumer for nothing.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.badrows import BadRows
from gpuload.batch import Batch
from gpuload.clock import Clock
from gpuload.device import Streams, one_torch_thread, span
from gpuload.errors import ConfigError, RowError, stopped
from gpuload.fields import Fails, Field, Geometry, Work
from gpuload.order.draws import Draws, Named
from gpuload.stages import Budget, Room, flat_map, ordered_map
from gpuload.tables import Selection
from gpuload.tables.malloc import give_back

_SLICE_BYTES = 1 << 20  # encoded
_SLICE_ROOM = 64 << 20  # that decoding a slice takes; ordinary photos stay below, and images of 20 MP come one by one
_SLICE_ROWS = 8  # images; the cost of handing over a slice vanishes behind eight decodes
_CUDA_SLICE_BYTES = 64 << 20  # encoded
_CUDA_SLICES = 8  # of `ahead_bytes`: two calls with two arenas each, of which each may be a quarter larger, take five
ON_ERROR = ("raise", "skip", "mask", "replace")
_COUNTED = {"skip": "rows_skipped", "mask": "rows_masked", "replace": "rows_replaced"}
_GO_ON = 'Set on_error="replace", "mask" or "skip" to go on without the row.'
_EMPTY = (
    'on_error="skip" would leave nothing of this batch, and other ranks would wait for its step. Set '
    'on_error="replace" or "mask", which keep every batch.'
)


def read_threads(cores: int) -> int:
    """Threads that read: two at least, for one waits for storage while the other converts."""
    return min(4, max(2, cores // 4))


@dataclass
class Read:
    """What one step reads: its rows' positions, how many are not fill-up rows, and how to get them; the place of each
    in the order, where a row may come twice, and its table, where there are several."""

    step: int
    rows: NDArray[np.int64]
    real: int
    selection: Callable[[], Selection]
    place: NDArray[np.int64] | None = None
    source: NDArray[np.int64] | None = None


@dataclass
class Draft:
    """A batch that is not finished: some of its columns are still being decoded."""

    step: int
    rows: NDArray[np.int64]
    real: int
    draws: Draws
    source: NDArray[np.int64] | None = None
    values: dict[str, Any] = field(default_factory=dict)
    nulls: dict[str, torch.Tensor] = field(default_factory=dict)
    fails: Fails = field(default_factory=list)
    geometry: dict[str, Geometry] = field(default_factory=dict)
    last: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    works: list[Work] = field(default_factory=list)
    slices: int = 0
    size: int = 0  # bytes that were read
    events: list[Any] = field(default_factory=list)  # what the consumer's stream has to wait for


@dataclass(frozen=True)
class Slice:
    draft: Draft
    work: Work | None  # None: the values that are finished, which go to the device
    lo: int = 0
    hi: int = 0
    size: int = 0  # bytes still encoded
    room: int = 0  # bytes that decoding takes


class Pipeline:
    """Turns reads into batches on threads; one per iteration of a dataset, counting into the dataset's counters.

    Parameters
    ----------
    fields : list of Field
    order : list of str
        Names of a batch's columns in their order.
    streams : Streams
    seed, epoch : int
        Of the draws.
    on_error : {"raise", "skip", "mask", "replace"}
    alone : bool
        No other rank has a batch at the same step.
    after : sequence of callable
        (batch, draws) → batch: run on every batch when it is finished, on the consumer's stream.
    whole : bool
        Slices are whole batches, not a few rows.
    ahead : int
        Batches under way at most, from the beginning of their reading until they are taken.
    ahead_bytes : int
        Bytes of these batches, encoded and finished, by the largest so far, and of what is being decoded, by the
        headers. One batch and one image are always allowed; what does not fit beside them waits.
    counts : Counter
    clocks : dict of str to Clock
        With the numbers of threads of the stages "read" and "decode".
    bad_rows : BadRows
        Takes what could not become tensors.
    sources : sequence of str
        Names of the tables, where there are several.
    """

    def __init__(
        self,
        fields: list[Field],
        order: Sequence[str],
        streams: Streams,
        *,
        seed: int,
        epoch: int,
        on_error: str,
        alone: bool,
        after: Sequence[Callable[[Batch, Named], Batch]],
        whole: bool,
        ahead: int,
        ahead_bytes: int,
        counts: Counter[str],
        clocks: dict[str, Clock],
        bad_rows: BadRows,
        sources: Sequence[str] = (),
    ) -> None:
        self._fields, self._order, self._streams = fields, list(order), streams
        self._seed, self._epoch, self._on_error = seed, epoch, on_error
        self._alone, self._after, self._whole, self._sources = alone, tuple(after), whole, sources
        self._ahead, self._ahead_bytes, self._counts, self._clocks = max(1, ahead), ahead_bytes, counts, clocks
        self._bad_rows = bad_rows
        self._count_lock = threading.Lock()
        self._budget: Budget[Read]
        self._room: Room

    def run(self, reads: Iterable[Read]) -> Iterator[Batch]:
        """Batches in the order of `reads`. Closing the generator ends every thread."""
        most = self._ahead_bytes
        least = most // 4  # for decoding, also where batches would take all
        self._budget = budget = Budget(reads, most - least, self._ahead)
        self._room = Room(lambda: max(least, most - budget.taken()))  # without `self`: that would be a cycle
        drafts = ordered_map(
            self._prepare,
            budget,
            threads=self._clocks["read"].threads,
            name="read",
            clock=self._clocks["read"],
            initializer=one_torch_thread,
            size=lambda draft: draft.size,
        )
        done = ordered_map(
            self._work,
            flat_map(self._cut, drafts),
            threads=self._clocks["decode"].threads,
            name="decode",
            clock=self._clocks["decode"],
            initializer=one_torch_thread,
            size=lambda part: part.size,
        )
        try:
            for part in done:
                part.draft.slices -= 1
                if not part.draft.slices:
                    budget.leave()
                    done.ready()  # starts what may be under way while the loop works
                    batch = self._finish(part.draft)
                    if batch.size:
                        yield batch
                    del batch
                del part
        finally:
            done.close()

    def _prepare(self, read: Read) -> Draft:
        """Everything of a batch but what is work for slices."""
        with span("gpuload.read"):
            return self._draft(read)

    def _draft(self, read: Read) -> Draft:
        rows = read.selection()
        draws = Draws(self._seed, self._epoch, read.rows if read.place is None else read.place)
        draft = Draft(read.step, read.rows, read.real, draws, read.source, size=rows.nbytes)
        refused = 0
        for each in self._fields:
            taken = each.take(rows, draws, draft.geometry)
            draft.values.update(taken.values)
            draft.nulls.update({name: torch.from_numpy(flags) for name, flags in taken.nulls.items()})
            draft.fails += taken.fails
            draft.geometry.update(taken.geometry)
            draft.last.update(taken.last)
            draft.size += taken.read
            refused += taken.refused
            if taken.work is not None:
                draft.works.append(taken.work)
        for _, _, error in draft.fails:
            error.bare()
        self._budget.weigh(draft.size + sum(work.size for work in draft.works))
        nulls = sum(int(flags.sum()) for flags in draft.nulls.values())
        self._count(bytes_read=draft.size, images_refused=refused, nulls=nulls)
        return draft

    def _cut(self, draft: Draft) -> list[Slice]:
        """The slices of the batch, which threads fill independently of each other."""
        slices = [Slice(draft, None)] if self._streams.cuda else []  # what is finished has a way of its own
        for work in draft.works:
            rows, most, room = self._slice(work)
            ends, taken = np.cumsum(work.cost), np.cumsum(work.room)
            lo, before, used = 0, 0, 0
            while lo < len(ends):
                hi = min(lo + rows, int(np.searchsorted(ends, before + most)) + 1, len(ends))
                if int(taken[hi - 1]) - used > room:
                    hi = max(lo + 1, int(np.searchsorted(taken, used + room, "right")))
                end, full = int(ends[hi - 1]), int(taken[hi - 1])
                slices.append(Slice(draft, work, lo, hi, end - before, full - used))
                lo, before, used = hi, end, full
        slices = slices or [Slice(draft, None)]
        draft.slices = len(slices)
        return slices

    def _slice(self, work: Work) -> tuple[int, int, int]:
        """Rows, encoded bytes and bytes for decoding of a slice at most.

        On a GPU the whole batch, or a half, a quarter, an eighth of it: a decoder there is made for calls of one size.
        """
        count = len(work.cost)
        if not self._whole:
            threads = self._clocks["decode"].threads
            rows = max(1, min(_SLICE_ROWS, -(-count // (2 * threads))))
            return rows, _SLICE_BYTES, min(_SLICE_ROOM, self._ahead_bytes // threads)
        most = self._ahead_bytes // _CUDA_SLICES
        size, room, parts = int(work.cost.sum()), int(work.room.sum()), 1
        while (size > parts * _CUDA_SLICE_BYTES or room > parts * most * 3 // 4) and parts < count:
            parts *= 2  # three quarters: parts are not alike
        return max(1, -(-count // parts)), sys.maxsize, most

    def _work(self, part: Slice) -> Slice:
        """One slice, into the batch."""
        draft = part.draft
        with span("gpuload.decode"):
            if part.work is None:
                draft.events.append(self._streams.upload(draft.values))
                return part
            with self._room.of(part.room):
                fails, event = part.work.run(part.lo, part.hi)
                if part.room * self._clocks["decode"].threads > self._ahead_bytes and not self._whole:
                    give_back()  # the allocator keeps up to 1 GiB of what one thread freed, and of another's, too
            for _, _, error in fails:
                error.bare()
            draft.fails.extend(fails)
            draft.events.append(event)
        return part

    def _finish(self, draft: Draft) -> Batch:
        """The policy for bad rows, and the batch."""
        for event in draft.events:
            self._streams.after(event)
        for work in draft.works:
            draft.values.update(work.finish())
        columns = {name: draft.values[name] for name in self._order}
        self._streams.keep(columns)
        columns.update({name: make(columns[name]) for name, make in draft.last.items()})
        valid = np.arange(len(draft.rows)) < draft.real
        bad = np.zeros(len(draft.rows), np.bool_)
        errors: dict[int, tuple[str, RowError]] = {}
        for i, name, error in draft.fails:
            errors.setdefault(i, (name, error))  # the first: a missing file beats the null that it left
            bad[i] = True
        for i, name, error in sorted(draft.fails, key=lambda fail: fail[:2]):
            if valid[i]:  # a row that only fills up a rank is another rank's
                where = self._source(draft, i)
                self._bad_rows.add(int(draft.rows[i]), name, error, self._epoch, where, on_error=self._on_error)
        empty = self._on_error == "skip" and bool(bad.all())
        if errors and (self._on_error == "raise" or (empty and not self._alone)):
            i = min(errors)
            name, error = errors[i]
            where = f"The row is of source {source!r}. " if (source := self._source(draft, i)) is not None else ""
            raise error.at(int(draft.rows[i]), name, where + (_EMPTY if empty else _GO_ON))
        counted = int((bad & valid).sum())
        self._count(batches=int(not empty), rows=draft.real, **{_COUNTED.get(self._on_error, "rows_bad"): counted})
        batch = Batch(
            columns,
            torch.from_numpy(draft.rows),
            torch.from_numpy(valid & ~bad),
            self._epoch,
            draft.step,
            draft.nulls,
            regions={name: torch.from_numpy(each.regions) for name, each in draft.geometry.items()},
            original_sizes={name: torch.from_numpy(each.sizes) for name, each in draft.geometry.items()},
            source=None if draft.source is None else torch.from_numpy(draft.source),
        )
        if bad.any() and self._on_error == "replace":
            batch = batch.replace(bad)
        elif bad.any() and self._on_error == "skip":
            batch = batch.keep(~bad)
        if not self._after or not batch.size:
            return batch
        kept = draft.draws.rows if batch.size == len(draft.rows) else draft.draws.rows[~bad]
        return self._mixed(batch, Draws(self._seed, self._epoch, kept))

    def _source(self, draft: Draft, i: int) -> str | None:
        """The name of the table that row i is of, where there are several."""
        return None if draft.source is None else self._sources[draft.source[i]]

    def _mixed(self, batch: Batch, draws: Draws) -> Batch:
        """What whole batches go through in the end."""
        with span("gpuload.after"):
            for k, function in enumerate(self._after):
                try:
                    found: Any = function(batch, Named(draws, (f"after{k}",)))
                except StopIteration as error:
                    raise stopped(f"after={function!r}") from error
                if not isinstance(found, Batch):
                    raise ConfigError(f"Expected a gpuload.Batch from {function!r} in after, got {found!r}.")
                batch = found
        return batch

    def _count(self, **numbers: int) -> None:
        with self._count_lock:
            self._counts.update(numbers)
