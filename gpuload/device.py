"""Where things run: a wish enters; a torch device, its streams and the way to the consumer's stream leave."""

from __future__ import annotations

import functools
import itertools
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.data import get_worker_info

from gpuload.errors import ConfigError, DeviceError, install

_ALIGN = 256  # bytes, as any allocation on a GPU


def choose_device(wish: str | torch.device) -> torch.device:
    """The device that ``"auto"``, ``"cuda"``, ``"cuda:1"`` or ``"cpu"`` means here.

    ``"auto"`` is CUDA where there is a GPU, but the CPU in a DataLoader worker: CUDA tensors do not like to cross
    processes. Without a number, CUDA means the current device of the calling thread.

    Raises
    ------
    DeviceError
        CUDA was asked for and is not there.
    """
    if isinstance(wish, str) and wish == "auto":
        wish = "cuda" if get_worker_info() is None and torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wish)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f'Expected device="auto", "cuda", "cuda:N" or "cpu", got {wish!r}.') from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'Expected device="auto", "cuda", "cuda:N" or "cpu", got {wish!r}.')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"Expected a CUDA device for device={str(wish)!r}, got {torch.cuda.device_count()} of them with torch "
            f"{torch.__version__}. For a machine with a GPU: {install('cuda')} and a CUDA build of torch. "
            'Without one: device="cpu" or "auto".'
        )
    if device.type == "cuda" and device.index is None:  # another thread may have another current device
        return torch.device("cuda", torch.cuda.current_device())
    return device


def threads_here() -> int:
    """Threads that decode by default: the CPU cores this process may use, shared with the other ranks of this
    machine (torchrun's LOCAL_WORLD_SIZE) and the other DataLoader workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    worker = get_worker_info()
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    shared = (int(ranks) if ranks.isdigit() else 1) * (worker.num_workers if worker else 1)
    return max(1, cores // max(1, shared))


def memory_ahead(device: torch.device) -> int:
    """Bytes for batches under way by default: 1 GiB; on a GPU a twelfth of its memory where that is more, so that on
    one of 80 GB a call to the decoder still holds 16 images of 12 million pixels."""
    if device.type != "cuda":
        return 1 << 30
    return max(1 << 30, int(torch.cuda.get_device_properties(device).total_memory) // 12)


def one_torch_thread() -> None:
    """For threads that decode: torch's own parallel loops would only fight each other. Holds for the thread alone."""
    torch.set_num_threads(1)


class Streams:
    """A pipeline's own streams on a GPU, and the way from them to the stream of whoever takes the batch.

    Nothing here waits on the host. On the CPU nothing here does anything.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._copies = copy_stream(device) if self.cuda else None

    def mark(self) -> Any:
        """An event after all that the calling thread has put on its current stream."""
        if not self.cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def own(self) -> Any:
        """A context in which the calling thread's current stream is one beside the consumer's."""
        return torch.cuda.stream(side_stream(self.device)) if self.cuda else nullcontext()

    def after(self, event: Any) -> None:
        """What the calling thread puts on its current stream from now on comes after `event`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def share(self, tensor: torch.Tensor, event: Any) -> None:
        """The calling thread's current stream is to write to `tensor`, which another may have allocated, after `event`.

        torch keeps the memory for it: a batch that nobody takes is dropped while its slices may still be written.
        """
        if self.cuda:
            self.after(event)
            tensor.record_stream(torch.cuda.current_stream(self.device))

    def upload(self, columns: dict[str, Any]) -> Any:
        """Moves tensors of the host in `columns`, and in lists there, to the device: all in one page-locked buffer and
        one copy, of which they become parts. Returns the event after."""
        if not self.cuda:
            return None
        lists = {name: list(v) for name, v in columns.items() if isinstance(v, list) and v and _on_host(v[0])}
        singles = {name: value for name, value in columns.items() if _on_host(value)}
        with torch.cuda.stream(self._copies):
            moved = iter(self._moved([*singles.values(), *(each for found in lists.values() for each in found)]))
            columns.update({name: next(moved) for name in singles})
            columns.update({name: [next(moved) for _ in found] for name, found in lists.items()})
            return self.mark()

    def _moved(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors on the device, by one copy on the current stream."""
        ends = list(itertools.accumulate(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors))
        if not tensors or not ends[-1]:
            return [tensor.to(self.device) for tensor in tensors]
        buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
        for part, tensor in zip(_parts(buffer, ends, tensors), tensors, strict=True):
            part.copy_(tensor)
        return _parts(buffer.to(self.device, non_blocking=True), ends, tensors)

    def keep(self, columns: dict[str, Any]) -> None:
        """torch keeps the memory of `columns` until the calling thread's current stream is done with it."""
        if not self.cuda:
            return
        stream = torch.cuda.current_stream(self.device)
        for value in columns.values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                    tensor.record_stream(stream)


def _on_host(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_cuda


def _parts(buffer: torch.Tensor, ends: list[int], like: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views of the bytes up to each of `ends`, of the dtypes and shapes of `like`."""
    starts = [0, *ends[:-1]]
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, like, strict=True)
    ]


@functools.cache
def side_stream(device: torch.device) -> Any:
    """For what is computed behind the decoding; one for all, as `copy_stream`."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@functools.cache
def copy_stream(device: torch.device) -> Any:
    """One for all: torch keeps the memory of every stream apart, so a stream for each iteration would use up more."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class span:
    """``with span(name):`` names what the thread does, for torch.profiler while it listens and, with a CUDA build of
    torch, for Nsight (NVTX).

    2 µs while nobody listens, once for each slice of a batch; torch's own mark takes 30 and lets go of the GIL twice.
    """

    __slots__ = ("_mark", "_name", "_nvtx")

    def __init__(self, name: str) -> None:
        self._name, self._nvtx = name, torch.version.cuda is not None
        self._mark: Any = None

    def __enter__(self) -> None:
        if _profiled():
            self._mark = torch.profiler.record_function(self._name)
            self._mark.__enter__()
        if self._nvtx:
            torch.cuda.nvtx.range_push(self._name)  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        if self._nvtx:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        if self._mark is not None:
            self._mark.__exit__(*error)


def _profiled() -> bool:
    """Whether torch.profiler listens; yes where torch does not say."""
    return bool(getattr(torch.autograd.profiler, "_is_profiler_enabled", True))


def describe(device: torch.device) -> Any:
    """Device and, for a GPU, its name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
