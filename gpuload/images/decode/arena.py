"""Memory that decoders write to, again and again: a wish for bytes enters, an arena that nobody reads any more leaves.

On CUDA the consumer of an arena is a kernel that runs later, so each arena carries the event recorded after it, and
the host waits for that event before a decoder gets the arena again. A stream's order is not enough: the JPEG engine
of Hopper GPUs ignores it (torchcodec PR #1634), so memory that torch handed out anew is waited for as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

RING = 2  # arenas a lane: one is read by the kernel while the other is decoded into
_LEAST = 1 << 20  # bytes
_KEPT = 64 << 20  # bytes that a slot keeps in any case; of more it gives back what is four times too much

T = TypeVar("T")


def empty(size: int, device: torch.device, what: str, pin: bool = False) -> torch.Tensor:
    """u8[size], not initialised.

    Raises
    ------
    torch.OutOfMemoryError
        Says what the memory was for and what to change.
    """
    try:
        return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pin)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"Expected {size / 2**20:,.0f} MiB for {what} on {device}, got no memory. Do: a smaller batch_size or "
            f"batch_readahead. {error}"
        ) from error


class Slot:
    """One arena, memory for what the host decodes, and all that must stay alive until both have been read.

    Attributes
    ----------
    keep : list
        Encoded bytes, outputs of other libraries; dropped when the slot is taken again.
    """

    def __init__(self, device: torch.device, stream: Any) -> None:
        self._device, self._stream = device, stream
        self._arena = torch.empty(0, dtype=torch.uint8, device=device)
        self._host = torch.empty(0, dtype=torch.uint8)
        self._there = torch.empty(0, dtype=torch.uint8, device=device)
        self._mark = event(device)  # recorded again and again
        self._event: Any = None  # what it became, until it was waited for
        self._lent = False
        self.keep: list[Any] = []

    def wait(self) -> None:
        """Until nothing reads this slot. Called before it is lent out again."""
        if self._lent:  # whoever had it failed on the way: what he started is not known
            self._synchronize()
        elif self._event is not None:
            self._event.synchronize()
        self._event, self.keep, self._lent = None, [], True

    def arena(self, size: int) -> torch.Tensor:
        """u8[>= size] on the device."""
        if _misfits(self._arena, size) or not len(self._arena):
            self._arena = self._arena[:0].clone()  # give the old one back before asking for more
            self._arena = empty(max(size + size // 4, _LEAST), self._device, "decoded images")
            self._synchronize()
        return self._arena

    def host_memory(self, size: int, keep: int) -> NDArray[np.uint8]:
        """u8[>= size] on the host, page-locked where it is copied to a GPU; its first `keep` bytes stay as they are."""
        if _misfits(self._host, size):
            larger = empty(size + size // 4, torch.device("cpu"), "images", pin=self._device.type == "cuda")
            larger[:keep] = self._host[:keep]
            self._host = larger
        return self._host.numpy()

    def upload(self, size: int) -> torch.Tensor:
        """The first `size` bytes of the host memory, on the device: put on the current stream, or the very same."""
        if self._device.type == "cpu":
            return self._host
        if _misfits(self._there, size):
            self._there = self._there[:0].clone()
            self._there = empty(size + size // 4, self._device, "images that the host decoded")
        self._there[:size].copy_(self._host[:size], non_blocking=True)
        return self._there

    def done(self) -> None:
        """All that reads this slot is on the stream by now."""
        if self._stream is not None:
            self._event = self._stream.record_event(self._mark)
        self._lent = False

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _misfits(memory: torch.Tensor, size: int) -> bool:
    """Whether it is too small, or so large for its use that another image's size must be the reason."""
    return len(memory) < size or len(memory) > max(_KEPT, 4 * size)


def event(device: torch.device) -> Any:
    """An event to wait for on the host without spinning."""
    return torch.cuda.Event(blocking=True) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class Lane(Generic[T]):
    """What one call of `decode` at a time may use: a decoder of its own, a stream of its own, arenas in turn.

    Parameters
    ----------
    device : torch.device
    tool : object
        The decoder, if there is one.
    stream : torch.cuda.Stream, optional
        A new one on CUDA, None on the CPU, where nothing is ordered by streams.
    """

    def __init__(self, device: torch.device, tool: T, stream: Any = None) -> None:
        self.device, self.tool = device, tool
        if stream is None and device.type == "cuda":
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.stream = stream
        self._slots = [Slot(device, self.stream) for _ in range(RING)]

    def slot(self) -> Slot:
        """The slot that was lent longest ago, once nothing reads it any more."""
        self._slots.append(self._slots.pop(0))
        slot = self._slots[-1]
        slot.wait()
        return slot

    def current(self) -> AbstractContextManager[Any]:
        """Makes this lane's stream the thread's current one."""
        return torch.cuda.stream(self.stream) if self.device.type == "cuda" else nullcontext()


@dataclass
class Tool:
    """One lane's decoder or pipeline, and the most images a call that it was made for."""

    made: Any = None
    images: int = 0


class Lanes(Generic[T]):
    """Lanes for as many calls as there are at once, made on demand and used again, across threads and epochs.

    It does not keep who makes them: a decoder whose lanes lead back to it would wait for the collector of cycles, and
    gigabytes of a GPU with it.
    """

    def __init__(self) -> None:
        self._free: list[Lane[T]] = []
        self._lock = threading.Lock()

    def take(self, make: Callable[[], Lane[T]]) -> Lane[T]:
        with self._lock:
            if self._free:
                return self._free.pop()
        return make()

    def give(self, lane: Lane[T]) -> None:
        with self._lock:
            self._free.append(lane)

    def close(self) -> None:
        with self._lock:
            self._free.clear()


class Lease:
    """A slot and its lane, lent to the reader of a `Ragged` for the length of a with block."""

    def __init__(self, lanes: Lanes[Any], lane: Lane[Any], slot: Slot) -> None:
        self._lanes, self._lane, self._slot = lanes, lane, slot
        self._current: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> None:
        self._current = self._lane.current()
        self._current.__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self._slot.done()
        finally:
            self._current.__exit__(*error)
            self._lanes.give(self._lane)
