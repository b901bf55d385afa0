"""The line's middle: a step of the plan enters, a finished `Batch` leaves.

plan ─ranges─▶ read, columns, text ─Draft─▶ slices ─▶ decode, resize ─▶ collect ─▶ Batch
       threads: 2 (one reads while the other converts)   num_threads (one per core)   consumer's

On a GPU the slices are larger and two threads hand them to the decoder, each with streams of its own; the consumer's
stream waits for events, the consumer for nothing.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from gpuload.batch import Batch
from gpuload.clock import Clock
from gpuload.device import Side, one_torch_thread, span
from gpuload.errors import DecodeError, RowError, TextError
from gpuload.fields.columns import Views, byte_views, image_bytes, strings, to_tensor
from gpuload.fields.schema import Column
from gpuload.fields.text import Tokens
from gpuload.images import resize
from gpuload.images.decode import Crop, Decoder, Ragged
from gpuload.images.decode.encoded import Encoded
from gpuload.images.transform import Image
from gpuload.stages import Budget, flat_map, ordered_map

READ_THREADS = 2
_SLICE_BYTES = 1 << 20  # encoded; with _SLICE_ROWS it bounds a thread's arena
_SLICE_ROWS = 8  # images; the cost of handing over a slice vanishes behind eight decodes
_CUDA_SLICE_BYTES = 64 << 20  # encoded: some ten times as much on the GPU, four slices at a time
_NATIVE = Image(size=None, dtype=torch.uint8)
ON_ERROR = ("raise", "skip", "mask")
_COUNTED = {"skip": "rows_skipped", "mask": "rows_masked"}


@dataclass
class Read:
    """What one step reads: its rows' positions, how many are not fill-up rows, and how to get the table."""

    step: int
    rows: NDArray[np.int64]
    real: int
    table: Any  # () → pa.Table


@dataclass
class Draft:
    """A batch that is not finished: its images are still bytes, or on their way into `out`."""

    step: int
    rows: NDArray[np.int64]
    real: int
    columns: dict[str, Any]
    views: dict[str, Views] = field(default_factory=dict)
    nulls: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: list[tuple[int, str, RowError]] = field(default_factory=list)
    slices: int = 0
    size: int = 0  # bytes that were read
    events: list[Any] = field(default_factory=list)  # what the consumer's stream has to wait for
    made: dict[str, Any] = field(default_factory=dict)  # column → event after its memory was allocated
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Slice:
    draft: Draft
    column: Column | None
    lo: int = 0
    hi: int = 0
    size: int = 0  # bytes still encoded


class Pipeline:
    """Turns reads into batches on threads; one per iteration of a dataset, counting into the dataset's counters."""

    def __init__(
        self,
        columns: list[Column],
        tokens: dict[str, Tokens],
        decoder: Decoder,
        *,
        seed: int,
        epoch: int,
        on_error: str,
        threads: int,
        ahead: int,
        ahead_bytes: int,
        counts: Counter[str],
        clocks: dict[str, Clock],
    ) -> None:
        self._columns, self._tokens, self._decoder = columns, tokens, decoder
        self._images = [column for column in columns if column.role == "image"]
        self._seed, self._epoch, self._on_error = seed, epoch, on_error
        self._threads, self._ahead, self._counts, self._clocks = threads, max(1, ahead), counts, clocks
        self._count_lock = threading.Lock()
        self._side = Side(decoder.device)
        self._in_flight = 0  # batches being decoded, or decoded and not yet taken
        self._ahead_bytes = ahead_bytes
        self._budget: Budget[Read]

    def run(self, reads: Iterable[Read]) -> Iterator[Batch]:
        """Batches in the order of `reads`. Closing the generator ends every thread."""
        self._budget = budget = Budget(reads, self._ahead_bytes)
        drafts = ordered_map(
            self._prepare,
            budget,
            threads=READ_THREADS,
            ahead=max(READ_THREADS, self._ahead // 2),
            name="read",
            clock=self._clocks["read"],
            initializer=one_torch_thread,
            size=lambda draft: draft.size,
        )
        slices = flat_map(self._cut, drafts, lambda: self._in_flight < min(self._ahead, budget.limit()))
        done = ordered_map(
            self._decode,
            slices,
            threads=self._threads,
            name="decode",
            clock=self._clocks["decode"],
            initializer=one_torch_thread,
            size=lambda part: part.size,
        )
        try:
            for part in done:
                part.draft.slices -= 1
                if not part.draft.slices:
                    self._in_flight -= 1
                    budget.leave()
                    yield self._finish(part.draft)
                del part
        finally:
            done.close()

    @span("gpuload.read")
    def _prepare(self, read: Read) -> Draft:
        """Everything of a batch but its pixels."""
        table: pa.Table = read.table()
        draft = Draft(read.step, read.rows, read.real, {}, size=table.nbytes)
        for column in self._columns:
            data = table.column(column.name)
            if column.role == "image":
                draft.views[column.name] = self._views(draft, column.name, data)
                draft.columns[column.name] = None
            elif column.role == "text":
                self._tokenize(draft, column.name, data)
            elif column.role == "tensor":
                draft.columns[column.name], nulls = to_tensor(data)
                if nulls is not None:
                    draft.nulls[column.name] = torch.from_numpy(nulls)
            else:
                draft.columns[column.name] = data.to_pylist()
        rooms = [c.transform for c in self._images if isinstance(c.transform, Image) and c.transform.shape]
        self._weigh(draft, sum(image.dtype.itemsize * math.prod(image.shape or ()) for image in rooms))
        self._count(bytes_read=draft.size, nulls=sum(int(n.sum()) for n in draft.nulls.values()))
        return draft

    def _views(self, draft: Draft, name: str, data: pa.ChunkedArray) -> Views:
        encoded, paths = image_bytes(data)
        views = byte_views(encoded)
        for i, path in enumerate(paths or []):  # Hugging Face images made from files store the path alone
            if views[i] is None and path:
                if os.path.isfile(path):
                    views[i] = np.fromfile(path, np.uint8)
                else:
                    cause = f"Expected image bytes or an existing file, got no bytes and the path {path!r}"
                    draft.errors.append((i, name, DecodeError(cause)))
        return views

    def _tokenize(self, draft: Draft, name: str, data: pa.ChunkedArray) -> None:
        texts = [text or "" for text in strings(data)]
        while True:
            try:
                with self._clocks["tokenize"].timed():
                    ids, mask = self._tokens[name](texts)
                break
            except TextError as error:  # one row at a time; the others stay whole
                draft.errors.append((error.row, name, error))
                texts[error.row] = ""
        draft.columns[name], draft.columns[f"{name}_mask"] = ids, mask

    def _cut(self, draft: Draft) -> list[Slice]:
        """The slices of the batch, which threads fill independently of each other."""
        slices = [Slice(draft, None)] if self._side.cuda else []  # what is no image has a way of its own
        for column in self._images:
            views = draft.views[column.name]
            if isinstance(column.transform, Image) and column.transform.shape:
                if not views:
                    self._room(draft, column.name, column.transform)
            else:
                draft.columns[column.name] = [None] * len(views)
            sizes = [0 if view is None else len(view) for view in views]
            rows, most = self._slice(sizes)
            lo, size = 0, 0
            for i, this in enumerate(sizes):
                size += this
                if i + 1 - lo >= rows or size >= most or i + 1 == len(views):
                    slices.append(Slice(draft, column, lo, i + 1, size))
                    lo, size = i + 1, 0
        slices = slices or [Slice(draft, None)]
        draft.slices = len(slices)
        self._in_flight += 1
        return slices

    def _slice(self, sizes: list[int]) -> tuple[int, int]:
        """Images and bytes of a slice at most.

        On a GPU the whole batch, or a half, a quarter, an eighth of it: a decoder there is made for calls of one size.
        """
        if not self._side.cuda:
            return min(_SLICE_ROWS, -(-len(sizes) // (2 * self._threads))), _SLICE_BYTES
        size, parts = sum(sizes), 1
        while size > parts * _CUDA_SLICE_BYTES and parts < len(sizes):
            parts *= 2
        return -(-len(sizes) // parts), sys.maxsize

    def _room(self, draft: Draft, name: str, image: Image) -> Any:
        """Where the pixels of a column go: allocated by the slice that comes first, on its stream."""
        with draft.lock:
            if draft.columns[name] is None:
                layout = torch.channels_last if image.channels_last else torch.contiguous_format
                shape = (len(draft.rows), *(image.shape or ()))
                made = torch.empty(shape, dtype=image.dtype, memory_format=layout, device=self._side.device)
                draft.columns[name], draft.made[name] = made, self._side.mark()
            if name in draft.made:  # not a list
                self._side.share(draft.columns[name], draft.made[name])
            return draft.columns[name]

    @span("gpuload.decode")
    def _decode(self, part: Slice) -> Slice:
        """Pixels of one slice, into the batch."""
        if part.column is None:
            tensors = {name: v for name, v in part.draft.columns.items() if name not in part.draft.views}
            part.draft.events.append(self._side.upload(tensors))
            part.draft.columns.update(tensors)
            return part
        draft, name, lo, hi = part.draft, part.column.name, part.lo, part.hi
        image = part.column.transform if isinstance(part.column.transform, Image) else _NATIVE
        wanted = functools.partial(image.regions, seed=self._seed, epoch=self._epoch, rows=draft.rows[lo:hi])
        crop = Crop(wanted, image.shape[1:], image.fast) if image.shape else None
        ragged = self._decoder.decode(draft.views[name][lo:hi], orient=image.orient, crop=crop)
        draft.errors.extend((lo + i, name, error) for i, error in ragged.errors.items())
        if isinstance(self._decoder, Encoded):  # bytes stay bytes
            views = draft.views[name][lo:hi]
            draft.columns[name][lo:hi] = [None if i in ragged.errors else view for i, view in enumerate(views)]
            return part
        with ragged:
            self._resize(part, ragged, image, wanted)
            draft.events.append(self._side.mark())
        draft.views[name][lo:hi] = [None] * (hi - lo)  # the encoded bytes may go
        return part

    def _resize(self, part: Slice, ragged: Ragged, image: Image, wanted: Any) -> None:
        """From the decoder's memory into the batch's, on the thread's current stream."""
        assert part.column is not None
        draft, name, lo, hi = part.draft, part.column.name, part.lo, part.hi
        heights, widths = ragged.sizes()
        regions, flips = ragged.regions, ragged.flips
        if regions is None or flips is None:
            regions, flips = wanted(np.maximum(heights, 1), np.maximum(widths, 1))
        out = self._room(draft, name, image)
        if image.shape is not None:
            with self._clocks["resize"].timed(), span("gpuload.resize"):
                resize.resize_normalize(ragged, regions, flips, image, out[lo:hi])
        else:
            for i in range(hi - lo):
                if heights[i]:
                    out[lo + i] = resize.native(ragged, i, bool(flips[i]), image)
                    self._weigh(draft, out[lo + i].nbytes)

    def _weigh(self, draft: Draft, pixels: int) -> None:
        """Tell the budget what a batch takes: what was read, and `pixels` bytes for every row."""
        self._budget.weigh(draft.size + pixels * len(draft.rows))

    def _finish(self, draft: Draft) -> Batch:
        """The policy for bad rows, and the batch."""
        self._side.hand_over(draft.columns, draft.events)
        for column in self._images:
            if isinstance(draft.columns[column.name], list) and not isinstance(self._decoder, Encoded):
                draft.columns[column.name] = _stacked(draft.columns[column.name], column.transform, self._side.device)
        valid = np.arange(len(draft.rows)) < draft.real
        bad = np.zeros(len(draft.rows), np.bool_)
        errors: dict[int, tuple[str, RowError]] = {}
        for i, name, error in draft.errors:
            errors.setdefault(i, (name, error))  # a missing file beats the null that it left
            bad[i] = True
        if errors and self._on_error == "raise":
            i = min(errors)
            name, error = errors[i]
            hint = 'Set on_error="skip" or "mask" to go on without the row.'
            raise error.at(int(draft.rows[i]), name, hint)
        counted = int((bad & valid).sum())
        self._count(batches=1, rows=draft.real, **{_COUNTED.get(self._on_error, "rows_bad"): counted})
        batch = Batch(
            draft.columns,
            torch.from_numpy(draft.rows),
            torch.from_numpy(valid & ~bad),
            self._epoch,
            draft.step,
            draft.nulls,
        )
        return batch.keep(~bad) if bad.any() and self._on_error == "skip" else batch

    def _count(self, **numbers: int) -> None:
        with self._count_lock:
            self._counts.update(numbers)


def _stacked(images: list[torch.Tensor | None], transform: Any, device: torch.device) -> Any:
    """One tensor where all sizes agree, else the list; what could not be decoded becomes zeros."""
    image = transform if isinstance(transform, Image) else _NATIVE
    shapes = {tuple(pixels.shape) for pixels in images if pixels is not None}
    blank = next(iter(shapes)) if len(shapes) == 1 else (image.channels, 1, 1)
    filled = [torch.zeros(blank, dtype=image.dtype, device=device) if pixels is None else pixels for pixels in images]
    return torch.stack(filled) if len(shapes) <= 1 and filled else filled
