"""The stand-in for libnvjpeg (nvjpeg_standin.cpp) and for the streams it works on, in Python's words."""

from __future__ import annotations

import ctypes
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from gpuload import Ragged
from gpuload.images.decode import libnvjpeg
from gpuload.images.decode.nvjpeg import NvJpegDecoder
from gpuload.images.planes import ycc_to_rgb

SOURCE = Path(__file__).parent / "nvjpeg_standin.cpp"
CPU = torch.device("cpu")


class Event:
    """After what was on the stream; waits on the host."""

    def __init__(self, stream: Stream, until: int) -> None:
        self.stream, self.until = stream, until

    def synchronize(self) -> None:
        self.stream.library.standin_wait(self.stream.cuda_stream, self.until)


class Stream:
    """What torch.cuda.Stream is to a decoder."""

    def __init__(self, library: Any) -> None:
        self.library, self.cuda_stream = library, library.standin_stream()

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def run(self) -> None:
        """What comes next on the stream finds that all before it is done; nobody has waited."""
        self.library.standin_run(self.cuda_stream)

    def record_event(self, event: Any = None) -> Event:
        return Event(self, self.library.standin_record(self.cuda_stream))

    def __del__(self) -> None:
        self.library.standin_stream_destroy(self.cuda_stream)


class StandIn:
    """One libnvjpeg, as if the card had seven engines."""

    def __init__(self, path: Path) -> None:
        self.library = libnvjpeg.declare(ctypes.CDLL(str(path)))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for name, result, given in (
            ("standin_set", None, [ctypes.c_char_p, number]),
            ("standin_count", number, [ctypes.c_char_p]),
            ("standin_broken", ctypes.c_char_p, []),
            ("standin_reset", None, []),
            ("standin_stream", pointer, []),
            ("standin_stream_destroy", None, [pointer]),
            ("standin_record", number, [pointer]),
            ("standin_run", None, [pointer]),
            ("standin_wait", None, [pointer, number]),
            ("gpuload_jpeg_open", ctypes.c_int, [ctypes.c_char_p]),
        ):
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, given
        jpeg = next(Path(PIL.__file__).parent.parent.glob("pillow.libs/libjpeg-*.so*"))
        assert self.library.gpuload_jpeg_open(str(jpeg).encode()) == 0
        self.library.standin_reset()

    def set(self, **settings: int) -> None:
        """engines, refused_width, refused_sampling, least_side, broken_width, other_sampling, status.

        A sampling is its factors as two hexadecimal digits, 0 for gray. An image of the refused width, or smaller than
        the least side, makes a call fail, and the library's query names it; of one of the broken width the query says
        nothing. The other sampling is decoded a little differently. Every call fails with a status that is not 0.
        """
        for name, value in settings.items():
            self.library.standin_set(name.encode(), value)

    def count(self, name: str) -> int:
        """handles, states, initialised, calls, images, queries: so far; alive: handles, states and queries now."""
        return int(self.library.standin_count(name.encode()))

    def broken(self) -> list[str]:
        """The rules that were not kept."""
        return list(self.library.standin_broken().decode().splitlines())

    def convert(self, planes: np.ndarray, stream: Any) -> None:
        """What a launch on the stream does: it comes after what is there."""
        stream.run()
        ycc_to_rgb(planes, None)

    def decoder(self, max_pixels: int = 1_000_000, threads: int = 1, **options: Any) -> NvJpegDecoder:
        """One that decodes to the host's memory, as if it were a device's."""
        return _OnTheHost(self, max_pixels, threads, **options)


class _OnTheHost(NvJpegDecoder):
    """What reads its pixels comes after them on their stream, as a kernel on a GPU would."""

    def __init__(self, card: StandIn, max_pixels: int, threads: int, **options: Any) -> None:
        self.streams = streams = list[weakref.ref[Stream]]()

        def stream(device: torch.device) -> Stream:
            made = Stream(card.library)
            streams.append(weakref.ref(made))
            return made

        super().__init__(CPU, max_pixels, threads, library=card.library, stream=stream, convert=card.convert, **options)

    def decode(self, *given: Any) -> Ragged:
        ragged = super().decode(*given)
        ragged.lease = _After(ragged.lease, self.streams)
        return ragged


class _After(AbstractContextManager[None]):
    def __init__(self, lease: Any, streams: list[weakref.ref[Stream]]) -> None:
        self.lease, self.streams = lease, streams

    def __enter__(self) -> None:
        self.lease.__enter__()
        for stream in [reference() for reference in self.streams]:
            if stream is not None:
                stream.run()

    def __exit__(self, *error: object) -> None:
        self.lease.__exit__(*error)
