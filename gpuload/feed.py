"""Images stay encoded: what `LanceDataset` takes enters; its rows leave in the same order for a decoder elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from numpy.typing import NDArray

from gpuload.batch import Batch, pick_rows
from gpuload.dataset import LanceDataset
from gpuload.errors import ConfigError, DecodeError, RowError
from gpuload.fields.boxes import Boxes
from gpuload.fields.mask import Mask
from gpuload.fields.numbers import to_tensor
from gpuload.images import Encoded, headers, pillow
from gpuload.images.decode.cpu import CpuDecoder
from gpuload.images.transform import Image
from gpuload.iteration import Batches


class Undecoded(LanceDataset):
    """A `LanceDataset` whose images are u8[n] arrays, views of Arrow's memory; None for one that was judged broken.

    `formats` are what the later decoder reads, in the words of `images.KINDS`; anything else, and what headers and
    ends of files give away, falls under `on_error`.
    """

    def __init__(self, uri: Any, batch_size: int, formats: tuple[str, ...], **options: Any) -> None:
        for name, transform in (options.get("transforms") or {}).items():
            if isinstance(transform, (Image, Boxes, Mask)):
                got = f"got {type(transform).__name__} for {name!r}"
                raise ConfigError(f"Expected only Text in transforms, {got}: DALI decodes images.")
        self._formats = formats
        super().__init__(uri, batch_size, device="cpu", **options)

    def keep_last(self, keep: bool) -> None:
        """Whether rows that do not fill a batch on every rank are read, which DALI decides later than the dataset."""
        self._options = dataclasses.replace(self._options, drop_last=not keep)

    def forms(self) -> dict[str, tuple[torch.dtype, int]]:
        """Name → (dtype, dimensions of a sample) of every column that is an image or a tensor, masks included."""
        self._open()
        found: dict[str, tuple[torch.dtype, int]] = {}
        for column in self._columns:
            if column.role == "bytes":
                found[column.name] = (torch.uint8, 1)
            elif column.role == "text":
                found[column.name] = found[f"{column.name}_mask"] = (torch.int64, 1)
            elif column.role == "tensor":
                like, _ = to_tensor(pa.chunked_array([], column.type))
                found[column.name] = (like.dtype, like.dim() - 1)
        return found

    def broken(self, batch: Batch, hint: str) -> RowError | None:
        """The first image of `batch` that the CPU decoder refuses, as the error that names it."""
        for column in self._columns:
            if column.role != "bytes":
                continue
            values = batch[column.name]
            encoded, errors = Encoded.of(values), dict[int, DecodeError]()
            table = headers.read(encoded)
            pillow.open_rest(encoded, table, self.max_pixels, errors)
            errors |= CpuDecoder(self.max_pixels).decode(encoded, table).errors
            found = [i for i in errors if values[i] is not None]
            if found:
                return errors[min(found)].at(int(batch.rows[min(found)]), column.name, hint)
        return None

    def images(self, batch: Batch) -> Iterator[tuple[int, str, NDArray[np.uint8]]]:
        """(row of the batch, column, bytes) of every image of `batch` that is there, row by row."""
        names = [column.name for column in self._columns if column.role == "bytes"]
        for i in range(batch.size):
            yield from ((i, name, batch[name][i]) for name in names if batch[name][i] is not None)


class Feed:
    """Hands the batches of an `Undecoded` out one call at a time, and keeps their memory alive.

    Attributes
    ----------
    outputs : list of str
        Names of what a call returns, in order.
    error : Exception or None
        Met ahead of the consumer; see `serve`.
    """

    def __init__(self, dataset: Undecoded, outputs: list[str], depth: int) -> None:
        self._dataset, self.outputs, self._depth = dataset, outputs, depth
        self._running: Batches | None = None
        self._told = False  # an epoch, since this one began
        self._held: deque[Batch] = deque()  # handed out and maybe not yet used up
        self._fill = self._stopping = self._deferring = False
        self.error: Exception | None = None

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    @property
    def batch_size(self) -> int:
        return self._dataset.batch_size

    def __call__(self) -> tuple[Any, ...]:
        """The next batch: per output a list of u8[n] arrays (images) or one array [B, ...]; no image is copied."""
        try:
            batch = self._next()
        except Exception as error:
            self._running = None
            if not self._deferring or isinstance(error, StopIteration):
                raise
            self.error = error
            raise StopIteration from None
        if self._fill and batch.size < self._dataset.batch_size:
            batch = _filled(batch, self._dataset.batch_size)
        self._held.append(batch)
        while len(self._held) > self._depth + 1:
            self._held.popleft()
        return tuple(_fed(batch[name]) for name in self.outputs)

    def __len__(self) -> int:
        """Batches of this rank's epoch."""
        return len(self._dataset)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that begins with the next call after StopIteration or `reset`."""
        self._told = True
        self._dataset.set_epoch(epoch)

    def rewind(self) -> None:
        """Nobody will take what is pending: an epoch that was fed to its end, but not taken, comes again."""
        if self._held and not self._told and (self._running is None or not self._running.alive):
            self._dataset.set_epoch(self._held[0].epoch)

    def reset(self) -> None:
        """The next call begins the epoch. Batches inside the pipeline are not called back."""
        self._end()
        self._stopping, self.error = False, None

    def state_dict(self, pending: int = 0) -> dict[str, Any]:
        """The place after the last batch fed, or `pending` batches before it: those that the pipeline still holds.

        `DALILanceIterator.state_dict` knows that number. The state is `LanceDataset`'s: either resumes the other's.
        """
        state = self._dataset.state_dict()
        behind = pending
        if 0 < pending <= len(self._held) and self._held[-pending].epoch == state["epoch"]:
            behind = state["step"] - self._held[-pending].step  # more, where batches of bad rows alone were left out
        behind = min(behind, state["taken"])
        return {**state, "step": state["step"] - behind, "taken": state["taken"] - behind}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue after the saved batch, with the next call."""
        self._dataset.load_state_dict(saved)
        self.reset()

    def stats(self) -> dict[str, Any]:
        return self._dataset.stats()

    def close(self) -> None:
        """End the threads. The source can be used again."""
        self._end()
        self._dataset.close()

    def stop(self) -> None:
        """The next call ends the epoch."""
        self._stopping = True

    def take(self) -> Batch:
        """The oldest batch that was fed and not taken."""
        return self._held.popleft()

    def serve(self, depth: int) -> None:
        """Hand out to one consumer that takes. An error ends the epoch and waits in `error`, so that the batches before
        it are not lost."""
        self._depth, self._deferring = max(self._depth, depth), True

    @property
    def pending(self) -> int:
        """Batches that were fed and not taken."""
        return len(self._held)

    def broken(self, batch: Batch, hint: str) -> RowError | None:
        """The first image of `batch` that the CPU decoder refuses, as the error that names it."""
        return self._dataset.broken(batch, hint)

    def images(self, batch: Batch) -> Iterator[tuple[int, str, NDArray[np.uint8]]]:
        """(row of the batch, column, bytes) of every image of `batch` that is there, row by row."""
        return self._dataset.images(batch)

    def _next(self) -> Batch:
        if self._stopping:
            self._end()
            self._stopping = False
            raise StopIteration
        if self._running is None:
            self._running, self._told = iter(self._dataset), False
        batch: Batch = next(self._running)
        return batch

    def _end(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = None


def _fed(value: Any) -> Any:
    """A column for DALI: one array ``[B, ...]``, or a list of u8[n] with a black image where there is none."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    return [_black() if view is None else view for view in value]


def _filled(batch: Batch, size: int) -> Batch:
    """`batch` with its last row repeated up to `size` rows, the repeated ones with ``valid=False``."""
    pick = [min(i, batch.size - 1) for i in range(size)]

    def grown(value: Any) -> Any:
        return pick_rows(value, pick) if isinstance(value, torch.Tensor) else [value[i] for i in pick]

    columns = {name: grown(value) for name, value in batch.items()}
    valid = batch.valid[pick] & (torch.arange(size) < batch.size)
    nulls = {name: flags[pick] for name, flags in batch.nulls.items()}
    source = None if batch.source is None else batch.source[pick]
    return Batch(columns, batch.rows[pick], valid, batch.epoch, batch.step, nulls, source=source)


def addresses(batch: Batch, names: list[str]) -> set[int]:
    """Where the memory of these columns begins, each image by itself."""
    found: set[int] = set()
    for name in names:
        value = batch[name]
        arrays = [value.numpy()] if isinstance(value, torch.Tensor) else [view for view in value if view is not None]
        found.update(array.__array_interface__["data"][0] for array in arrays)
    return found


@functools.cache
def _black() -> NDArray[np.uint8]:
    """A JPEG file of 16x16 black pixels."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (16, 16)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)
