"""nvJPEG's C functions, as nvjpeg.h declares them: a card enters, the number of its JPEG engines and a `Handle` leave.

A handle owns the states that decode; calls are asynchronous on a stream, and a state that is called again before its
call was waited for hangs (seen on an H100). Statuses become errors here, but those that are about an image.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import weakref
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpuload.errors import DeviceError, install

IMAGE = np.dtype([("channel", np.uint64, (4,)), ("pitch", np.uint64, (4,))])  # nvjpegImage_t
PLANES, LUMA = 1, 2  # output formats: planar YUV as stored, its first plane alone
_HARDWARE, _444 = 3, 0  # a backend, a chroma subsampling
_STATUS = (
    "SUCCESS", "NOT_INITIALIZED", "INVALID_PARAMETER", "BAD_JPEG", "JPEG_NOT_SUPPORTED", "ALLOCATOR_FAILURE",
    "EXECUTION_FAILED", "ARCH_MISMATCH", "INTERNAL_ERROR", "IMPLEMENTATION_NOT_SUPPORTED", "INCOMPLETE_BITSTREAM",
)  # fmt: skip
_ABOUT_AN_IMAGE = frozenset(_STATUS.index(name) for name in ("BAD_JPEG", "JPEG_NOT_SUPPORTED", "INCOMPLETE_BITSTREAM"))
_NO_MEMORY = _STATUS.index("ALLOCATOR_FAILURE")


def declare(library: Any) -> Any:
    """The library with the types of the functions that are called here. Calls release the GIL."""
    pointer, number, size, out = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.POINTER
    functions: dict[str, list[Any]] = {
        "nvjpegCreateEx": [number, pointer, pointer, ctypes.c_uint, out(pointer)],
        "nvjpegDestroy": [pointer],
        "nvjpegGetHardwareDecoderInfo": [pointer, out(ctypes.c_uint), out(ctypes.c_uint)],
        "nvjpegJpegStateCreate": [pointer, out(pointer)],
        "nvjpegJpegStateDestroy": [pointer],
        "nvjpegDecodeBatchedInitialize": [pointer, pointer, number, number, number],
        "nvjpegDecodeBatchedPreAllocate": [pointer, pointer, number, number, number, number, number],
        "nvjpegDecodeBatched": [pointer, pointer, pointer, pointer, pointer, pointer],
        "nvjpegJpegStreamCreate": [pointer, out(pointer)],
        "nvjpegJpegStreamDestroy": [pointer],
        "nvjpegJpegStreamParseHeader": [pointer, pointer, size, pointer],
        "nvjpegDecodeBatchedSupported": [pointer, pointer, out(number)],
    }
    for name, given in functions.items():
        function = getattr(library, name)
        function.argtypes, function.restype = given, number
    return library


@cache
def library() -> Any:
    """The libnvjpeg of the installed wheels, else the system's; None where there is none, or one that is too old."""
    for path in _candidates():
        try:
            return declare(ctypes.CDLL(path))
        except (OSError, AttributeError):
            continue
    return None


def _candidates() -> list[str]:
    major = (torch.version.cuda or "13").split(".")[0]
    if sys.platform != "linux":
        return []
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec and spec.submodule_search_locations) or []]
    name = f"libnvjpeg.so.{major}"
    found = [folder / part / "lib" / name for folder in folders for part in (f"cu{major}", "nvjpeg")]
    return [str(path) for path in found if path.exists()] + [name]


def engines(library: Any, device: torch.device) -> int:
    """JPEG engines of the card, 0 where it has none."""
    handle, count, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        torch.zeros(1, device=device)  # the library works in the thread's CUDA context: torch makes it
        if library.nvjpegCreateEx(_HARDWARE, None, None, 0, ctypes.byref(handle)):
            return 0
        try:
            failed = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(count), ctypes.byref(cores))
        finally:
            library.nvjpegDestroy(handle)
    return 0 if failed else count.value


class State:
    """What decodes calls of exactly `size` images to one format. Busy from a call on until the stream was waited for.

    Attributes
    ----------
    data, lengths : u64[size]
    to : IMAGE[size]
        The arguments of the next call: addresses and bytes of the files, and where their planes go.
    """

    def __init__(self, pointer: Any, size: int) -> None:
        self.pointer, self.size = pointer, size
        self.data, self.lengths = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
        self.to = np.zeros(size, IMAGE)


class Handle:
    """A handle of the hardware backend, its states, and a bitstream to ask about. For one thread at a time.

    Parameters
    ----------
    library : CDLL
    device : torch.device
    stream : torch.cuda.Stream
        All calls go there; it is waited for before anything is destroyed.

    Raises
    ------
    DeviceError
        The card has no JPEG engine.
    """

    def __init__(self, library: Any, device: torch.device, stream: Any) -> None:
        self._library, self._device, self._stream = library, device, stream
        self._handle, self._query = ctypes.c_void_p(), ctypes.c_void_p()
        self._states: list[Any] = []
        self._call("nvjpegCreateEx", _HARDWARE, None, None, 0, ctypes.byref(self._handle))
        self._end = weakref.finalize(self, _destroy, library, stream, self._handle, self._query, self._states)
        self._end.atexit = False  # the process takes it all; CUDA may be gone by then
        self._call("nvjpegJpegStreamCreate", self._handle, ctypes.byref(self._query))

    def state(self, size: int, output: int) -> State:
        """A new state. It takes its memory from a pool, which nvImageCodec found to be worth 20 %."""
        pointer = ctypes.c_void_p()
        self._call("nvjpegJpegStateCreate", self._handle, ctypes.byref(pointer))
        self._states.append(pointer)
        self._call("nvjpegDecodeBatchedInitialize", self._handle, pointer, size, 1, output)
        # a hint, of any size, turns the pool on; what it answers changes nothing
        self._library.nvjpegDecodeBatchedPreAllocate(self._handle, pointer, size, 1, 1, _444, output)
        return State(pointer, size)

    def decode(self, state: State) -> bool:
        """Put a call with the arguments in `state` on the stream; False where an image made it fail: nothing is put.

        Raises
        ------
        torch.OutOfMemoryError, DeviceError
            Another failure, which no image is to blame for.
        """
        status: int = self._library.nvjpegDecodeBatched(
            self._handle, state.pointer, state.data.ctypes.data, state.lengths.ctypes.data, state.to.ctypes.data,
            self._stream.cuda_stream,
        )  # fmt: skip
        if status not in _ABOUT_AN_IMAGE:
            self._check(status, "nvjpegDecodeBatched")
        return status == 0

    def supports(self, address: int, size: int) -> bool:
        """Whether the engine takes the file at an address, by its header."""
        parsed = self._library.nvjpegJpegStreamParseHeader(self._handle, address, size, self._query)
        if parsed:
            return False
        answer = ctypes.c_int(1)
        self._call("nvjpegDecodeBatchedSupported", self._handle, self._query, ctypes.byref(answer))
        return answer.value == 0

    def supports_file(self, file: bytes) -> bool:
        """As `supports`."""
        view = np.frombuffer(file, np.uint8)
        return self.supports(view.ctypes.data, len(view))

    def _call(self, name: str, *given: Any) -> None:
        self._check(getattr(self._library, name)(*given), name)

    def _check(self, status: int, name: str) -> None:
        if not status:
            return
        word = _STATUS[status] if status < len(_STATUS) else "unknown"
        if status == _NO_MEMORY:
            raise torch.OutOfMemoryError(
                f"Expected memory for nvJPEG on {self._device}, got none ({name}: status {status}, {word}). Do: a "
                "smaller batch_size or batch_readahead."
            )
        if name == "nvjpegCreateEx":
            raise no_engine(self._device, f"status {status}, {word}")
        raise DeviceError(
            f"Expected {name} to work on {self._device}, got status {status}, {word}. Do: {install('cuda')}, or "
            'decoder="nvimgcodec".'
        )


def no_engine(device: torch.device, got: str) -> DeviceError:
    """The error for a card that nvJPEG's hardware backend does not take."""
    return DeviceError(
        f'Expected a GPU with a JPEG engine for decoder="nvjpeg", got {device} without one ({got}). Do: '
        'decoder="nvimgcodec", which decodes on CUDA cores, or "auto", which chooses.'
    )


def no_library() -> DeviceError:
    """The error for a machine without libnvjpeg."""
    return DeviceError(
        f'Expected libnvjpeg for decoder="nvjpeg", got none in the installed wheels and on the system. Do: '
        f'{install("cuda")}, or decoder="cpu".'
    )


def _destroy(library: Any, stream: Any, handle: Any, query: Any, states: list[Any]) -> None:
    stream.synchronize()
    for state in states:
        library.nvjpegJpegStateDestroy(state)
    if query:
        library.nvjpegJpegStreamDestroy(query)
    library.nvjpegDestroy(handle)
