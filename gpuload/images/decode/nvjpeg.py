"""nvJPEG on a card with JPEG engines: encoded images and HEADER enter, libjpeg's very pixels leave.

HEADER ─▶ who takes it ─▶ groups of one sampling ─▶ one call each: planes as stored ─▶ one kernel: RGB in the arena
                   │                                 the engine, asynchronous
                   └────▶ the host's exact decoder, on threads, in the same batch: what the engine does not take, and
                          a fixed share of what it does

Planes from the engine are libjpeg's bit for bit, and the kernel interpolates chroma and converts colours as libjpeg
does, so it does not show in a pixel who decoded an image. It shows in damage: inside the entropy-coded data it is an
error of the host and passes on the engine, hence the share is one of a batch and never of load.

A call has always as many images as its state was initialised for; a group is filled up with a small picture to one of
four sizes. States are made with the lane, for every sampling and size, and nothing after that; a call on another size
costs what `nvjpegDecodeBatchedInitialize` does, which was not measured. One call of a mixed batch takes five times as
long as calls of one sampling each (4,760 images/s against 25,600, one H100, 4:2:0).
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as pillow

from gpuload.errors import DeviceError
from gpuload.images import GRAY, KINDS, PIXELS, YCBCR, Encoded, Ragged, put_whole, view_at
from gpuload.images.decode import libjpeg, libnvjpeg
from gpuload.images.decode.arena import Lane, Slot, empty
from gpuload.images.decode.host import with_codes
from gpuload.images.decode.lanes import LaneDecoder
from gpuload.images.decode.libnvjpeg import Handle, State
from gpuload.images.planes import PLANES, ycc_to_rgb

_NAMES = ("gray", "4:4:4", "4:2:2", "4:2:0", "4:4:0")  # the samplings of nvjpeg.h's hardware backend, by number
_FACTORS = ((1, 1), (1, 1), (2, 1), (2, 2), (1, 2))  # of luma, across and down; chroma's are 1 and 1
_H, _V = np.array(_FACTORS).T
_JPEG, _ENDS, _BASELINE = KINDS.index("JPEG"), 2, 0  # HEADER's words
_SHARES = (16, 4, 2, 1)  # a call is filled up to the smallest of these parts of the largest call that holds it
_STEP = 8  # images: sizes of calls are multiples
_ROW, _ALIGN = 64, 256  # bytes: rows and planes begin at multiples
_RATE, _ENGINE_RATE = 300, 2900  # images/s of 0.2 MP of a host's core and of one engine of an H100
_BUSY = 6  # threads that read, submit and train: not for the host's share
_MOST = 0.25  # of a batch, for the host
_SIDES = (1, 2, 4, 8, 16, 32, 64, 4096, 8192, 16384, 32768, 65535)  # pixels: which of them the engine takes is asked
_SIDE, _TINY = 131, 64  # pixels: of the pictures that are compared, and of those that fill up calls


class NvJpegDecoder(LaneDecoder):
    """Decodes baseline JPEG on the engine and everything else on the host, to the same pixels.

    Parameters
    ----------
    device, max_pixels, threads
        As `LaneDecoder`.
    share : float, optional
        Part of the JPEG files that the host decodes all the same, in [0, 0.25], for good. By default what the threads
        to spare can do beside the engines.
    library : CDLL, optional
        libnvjpeg, or what stands for it.
    stream : callable, optional
        device → a new stream; torch's by default.
    convert : callable, optional
        (PLANES[K], stream): puts the conversion on the stream.

    Raises
    ------
    DeviceError
        There is no libnvjpeg, or the card has no JPEG engine.
    """

    name = library = "nvjpeg"
    whole_batches = True

    def __init__(
        self,
        device: torch.device,
        max_pixels: int,
        threads: int = 1,
        *,
        share: float | None = None,
        library: Any = None,
        stream: Callable[[torch.device], Any] | None = None,
        convert: Callable[[NDArray[np.void], Any], None] = ycc_to_rgb,
    ) -> None:
        super().__init__(device, max_pixels, threads)
        self._nvjpeg = library or libnvjpeg.library()
        if self._nvjpeg is None:
            raise libnvjpeg.no_library()
        self._engines = libnvjpeg.engines(self._nvjpeg, device)
        if not self._engines:
            raise libnvjpeg.no_engine(device, "0 engines")
        self._share = default_share(threads, self._engines) if share is None else min(max(share, 0.0), _MOST)
        self._new_stream, self._convert = stream, convert
        self._tiny = [_Picture(number, _TINY) for number in range(len(_NAMES))]
        self._proving = threading.Lock()
        self._proved = False
        self._supported = np.zeros(len(_NAMES), np.bool_)
        self._exact = np.zeros(len(_NAMES), np.bool_)  # the host's planes and pixels
        self._sides = (1, 1)  # of an image that the engine takes, at least and at most
        self._most = 0  # images a call so far
        self._repeated = self._refused = 0

    def facts(self) -> dict[str, Any]:
        """For `stats`: the card's engines, the host's share, calls that failed and were repeated without the images
        that made them fail, the number of these, and the samplings whose pixels are not the host's: none, if all is
        well.
        """
        differ = [name for name, yes, exact in zip(_NAMES, self._supported, self._exact, strict=True) if yes > exact]
        return {
            "engines": self._engines,
            "host_share": round(self._share, 4),
            "calls_repeated": self._repeated,
            "images_refused": self._refused,
            "not_the_hosts_pixels": differ if self._proved else [],
        }

    def _lane(self) -> Lane[Any]:
        lane: Lane[Any] = Lane(self.device, None, self._new_stream(self.device) if self._new_stream else None)
        lane.tool = _Calls(Handle(self._nvjpeg, self.device, lane.stream), self.device, lane.stream, self._tiny)
        return lane

    def _decode(
        self, lane: Lane[Any], encoded: Encoded, headers: NDArray[np.void], windows: NDArray[np.int64] | None
    ) -> Ragged:
        self._ready(lane, len(encoded))
        return super()._decode(lane, encoded, headers, windows)

    def _ready(self, lane: Lane[Any], images: int) -> None:
        """States for calls of so many images; before the very first, the proof that the engine's pixels are right."""
        with self._proving:
            self._most = max(self._most, images)
            if not self._proved:
                self._prove(lane)
            images = self._most
        lane.tool.prepare(images, self._supported)

    def _prove(self, lane: Lane[Any]) -> None:
        """What the library supports; whether planes and pixels are the host's, by a picture of each sampling."""
        calls = lane.tool
        self._supported[:] = [calls.handle.supports_file(tiny.bytes) for tiny in self._tiny]
        calls.prepare(_STEP, self._supported)
        for number in np.flatnonzero(self._supported).tolist():
            picture = _Picture(number, _SIDE)
            found = self._seen(lane, picture)
            self._supported[number] = found is not None
            self._exact[number] = found is not None and picture.equals(*found)
        if not self._supported.any():
            raise DeviceError(
                f"Expected the JPEG engine of {self.device} to decode pictures of {', '.join(_NAMES)}, got none. Do: "
                'decoder="nvimgcodec".'
            )
        tiny = self._tiny[int(np.flatnonzero(self._supported)[0])]
        takes = [side for side in _SIDES if calls.handle.supports_file(tiny.claiming(side))]
        self._sides = (min(takes, default=_TINY), max(takes, default=_TINY))
        self._proved = True

    def _seen(self, lane: Lane[Any], picture: _Picture) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8]] | None:
        """Planes and pixels of a picture by the engine, on the host; None where it does not take it after all."""
        rows, side = np.zeros(1, PIXELS), picture.side
        put_whole(rows, side, side, 3 if picture.number else 1, 1)
        memory = empty(side * side * 3, self.device, "the first pictures").zero_()  # it may hold earlier ones
        lane.stream.synchronize()  # the engine does not wait for the stream
        rows["offset"] = memory.data_ptr()
        encoded, numbers = Encoded.of([picture.bytes]), np.array([picture.number])
        if not lane.tool.decode(encoded, numbers, rows, self._convert)[0]:
            return None
        lane.stream.synchronize()
        pixels = self._copied(memory.data_ptr(), (side, side, int(rows["channels"][0])), int(rows["pitch"][0]))
        if not picture.number:
            return [pixels[..., 0]], pixels
        row, planes = lane.tool.planes[0], []
        for name, (high, wide) in zip(("y", "cb", "cr"), picture.shapes(), strict=True):
            pitch = int(row["pitch_y" if name == "y" else "pitch_c"])
            planes.append(self._copied(int(row[name]), (high, wide, 1), pitch)[..., 0])
        return planes, pixels

    def _copied(self, address: int, shape: tuple[int, int, int], pitch: int) -> NDArray[np.uint8]:
        """u8[shape] on the host, of memory of the device."""
        found: NDArray[np.uint8] = view_at(address, shape, pitch, self.device).cpu().numpy().copy()
        return found

    def _claim(self, encoded: Encoded, headers: NDArray[np.void]) -> dict[int, Any]:
        numbers = samplings(headers)
        shorter, longer = (
            np.minimum(headers["height"], headers["width"]),
            np.maximum(headers["height"], headers["width"]),
        )
        fits = (shorter >= self._sides[0]) & (longer <= self._sides[1])
        mine = np.flatnonzero((numbers >= 0) & self._supported[numbers] & fits)
        gone = hosts_share(encoded.size[mine], self._exact[numbers[mine]], self._share)
        return dict(zip(mine[~gone].tolist(), numbers[mine[~gone]].tolist(), strict=True))

    def _channels(self, headers: NDArray[np.void]) -> Any:
        return headers["channels"]

    def _run(
        self,
        lane: Lane[Any],
        slot: Slot,
        arena: torch.Tensor,
        encoded: Encoded,
        table: NDArray[np.void],
        claimed: dict[int, Any],
    ) -> list[int]:
        which, numbers = (np.fromiter(part, np.intp, len(claimed)) for part in (claimed, claimed.values()))
        rows = table[which]
        rows["offset"] += arena.data_ptr()
        good = lane.tool.decode(encoded.take(which), numbers, rows, self._convert)
        with self._lock:
            self._repeated += lane.tool.failed
            self._refused += int((~good).sum())
        found: list[int] = which[~good].tolist()
        return found


class _Picture:
    """A built-in picture of one sampling, square: of one colour if it is tiny, else of noise that shows every error."""

    def __init__(self, number: int, side: int) -> None:
        self.number, self.side = number, side
        colours = np.random.default_rng(number).integers(0, 256, (side // 8 + 2, side // 8 + 2, 3), np.uint8)
        image = pillow.fromarray(colours).resize((side, side)) if side > _TINY else pillow.new("RGB", (side, side))
        file = io.BytesIO()
        options: dict[str, Any] = (
            {} if number == 0 else {"subsampling": ("4:4:4", "4:2:2", "4:2:0", "4:2:2")[number - 1]}
        )
        (image.convert("L") if number == 0 else image).save(file, "JPEG", quality=90, **options)
        self.bytes = _turned(file.getvalue()) if _NAMES[number] == "4:4:0" else file.getvalue()
        self._view = np.frombuffer(self.bytes, np.uint8)
        self.address, self.size = self._view.ctypes.data, len(self._view)

    def claiming(self, side: int) -> bytes:
        """The file, its header saying another size: to be asked about, not to be decoded."""
        at = self.bytes.index(b"\xff\xc0") + 5
        return self.bytes[:at] + side.to_bytes(2, "big") * 2 + self.bytes[at + 4 :]

    def shapes(self) -> list[tuple[int, int]]:
        """Of its planes: height, width."""
        h, v = _FACTORS[self.number]
        chroma = (-(-self.side // v), -(-self.side // h))
        return [(self.side, self.side)] + ([chroma, chroma] if self.number else [])

    def equals(self, planes: list[NDArray[np.uint8]], pixels: NDArray[np.uint8]) -> bool:
        """Whether these are the host's: planes as stored, and u8[side, side, channels]."""
        own = libjpeg.planes(self.bytes, self.shapes())  # where there is no compiled reader, the pixels have to do
        same = own is None or all(np.array_equal(a, b) for a, b in zip(own, planes, strict=True))
        return same and np.array_equal(pixels.squeeze(), np.asarray(pillow.open(io.BytesIO(self.bytes))))


class _Calls:
    """What a lane calls the engine with: its handle, states by sampling and size, memory for planes.

    The slot of the planes is what the states are waited for by: its event comes after the calls and the conversion.

    Attributes
    ----------
    planes : PLANES[K]
        Of the last call's images, in memory that the next one writes to; zeros for gray.
    failed : int
        Calls of the last `decode` that had to be repeated or given up.
    """

    def __init__(self, handle: Handle, device: torch.device, stream: Any, tiny: list[_Picture]) -> None:
        self.handle, self.planes, self.failed = handle, np.zeros(0, PLANES), 0
        self._stream, self._tiny = stream, tiny
        self._memory = Slot(device, stream)
        self._spare = np.zeros(len(tiny), libnvjpeg.IMAGE)  # where the planes go of what fills up a call
        self._states: dict[int, list[State]] = {}  # by sampling, smallest first
        self._sizes: list[int] = []

    def prepare(self, images: int, supported: NDArray[np.bool_]) -> None:
        """Makes the states for calls of up to so many images, unless they are there."""
        if self._sizes and images <= self._sizes[-1]:
            return
        self._sizes = sorted({-(-images // (share * _STEP)) * _STEP for share in _SHARES} | set(self._sizes))
        for number in np.flatnonzero(supported).tolist():
            states, output = self._states.setdefault(number, []), libnvjpeg.PLANES if number else libnvjpeg.LUMA
            there = {state.size for state in states}
            states += [self.handle.state(size, output) for size in self._sizes if size not in there]
            states.sort(key=lambda state: state.size)

    def decode(
        self,
        encoded: Encoded,
        numbers: NDArray[np.intp],
        rows: NDArray[np.void],
        convert: Callable[[NDArray[np.void], Any], None],
    ) -> NDArray[np.bool_]:
        """Put images on the stream, their pixels at their places; says which of them the engine took, bool[K].

        Parameters
        ----------
        encoded : Encoded
            K images that the engine may take.
        numbers : i[K]
            Their samplings.
        rows : PIXELS[K]
            With addresses for offsets. Gray images go there at once, the others by way of their planes.
        """
        self.failed = 0
        self._memory.wait()
        self._memory.keep.append(encoded)  # the engine reads the bytes after the call
        to, good = self._places(numbers, rows), np.zeros(len(rows), np.bool_)
        for number in np.unique(numbers).tolist():
            group = np.flatnonzero(numbers == number)
            good[group] = self._group(number, encoded.at[group], encoded.size[group], to[group])
        wanted = good & (numbers > 0)
        if wanted.any():
            convert(self.planes[wanted], self._stream)
        self._memory.done()
        return good

    def _places(self, numbers: NDArray[np.intp], rows: NDArray[np.void]) -> NDArray[np.void]:
        """IMAGE[K]: where the engine writes; lays out the planes of what is not gray."""
        h, v, colour = _H[numbers], _V[numbers], numbers > 0
        height, width = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
        pitch_y, pitch_c = _up(width, _ROW), _up(-(-width // h), _ROW)
        luma = np.where(colour, _up(pitch_y * height, _ALIGN), 0)
        chroma = np.where(colour, _up(pitch_c * -(-height // v), _ALIGN), 0)
        ends, spare = np.cumsum(luma + 2 * chroma), _TINY * _TINY * 3 * len(self._tiny)
        start = self._memory.arena(spare + int(ends[-1])).data_ptr()
        self._spare["channel"][:, :3] = start + np.arange(3 * len(self._tiny)).reshape(-1, 3) * _TINY * _TINY
        self._spare["pitch"][:, :3] = _TINY
        self.planes = planes = np.zeros(len(rows), PLANES)
        y = (start + spare + ends - 2 * chroma - luma).astype(np.uint64)
        cb = y + luma.astype(np.uint64)
        for name, value in (("y", y), ("cb", cb), ("cr", cb + chroma.astype(np.uint64)), ("out", rows["offset"])):
            planes[name] = np.where(colour, value, 0)
        planes["pitch_y"], planes["pitch_c"], planes["out_pitch"] = pitch_y, pitch_c, rows["pitch"]
        planes["height"], planes["width"], planes["h"], planes["v"] = height, width, h, v
        to = np.zeros(len(rows), libnvjpeg.IMAGE)
        for c, name in enumerate(("y", "cb", "cr")):
            to["channel"][:, c], to["pitch"][:, c] = planes[name], pitch_c if c else pitch_y
        gray = ~colour
        to["channel"][gray, 0], to["pitch"][gray, 0] = rows["offset"][gray], rows["pitch"][gray]
        return to

    def _group(
        self, number: int, at: NDArray[np.uint64], size: NDArray[np.int64], to: NDArray[np.void]
    ) -> NDArray[np.bool_]:
        """Images of one sampling in one call, and without those that make it fail in further ones; bool[K]."""
        good, parts = np.zeros(len(at), np.bool_), [np.arange(len(at))]
        while parts:
            part = parts.pop()
            state = next(state for state in self._states[number] if state.size >= len(part))
            self._fill(state, number, at[part], size[part], to[part])
            if self.handle.decode(state):
                good[part] = True
            else:
                self.failed += 1
                parts += self._without_culprits(part, at, size)
            if parts:
                self._stream.synchronize()  # the next call may be on the same state
        return good

    def _fill(
        self,
        state: State,
        number: int,
        at: NDArray[np.uint64],
        size: NDArray[np.int64],
        to: NDArray[np.void],
    ) -> None:
        """The arguments of a call: its images, and the small picture as often as it takes."""
        tiny, count = self._tiny[number], len(at)
        state.data[:count], state.lengths[:count], state.to[:count] = at, size, to
        state.data[count:], state.lengths[count:], state.to[count:] = tiny.address, tiny.size, self._spare[number]

    def _without_culprits(
        self, part: NDArray[np.intp], at: NDArray[np.uint64], size: NDArray[np.int64]
    ) -> list[NDArray[np.intp]]:
        """What to try after a call failed: those that the library says it supports, or, if that is all, each half."""
        if len(part) == 1:
            return []
        yes = np.array(
            [self.handle.supports(a, n) for a, n in zip(at[part].tolist(), size[part].tolist(), strict=True)]
        )
        if yes.all():
            return [part[: len(part) // 2], part[len(part) // 2 :]]
        return [part[yes]] if yes.any() else []


def samplings(headers: NDArray[np.void]) -> NDArray[np.intp]:
    """Which number of gray, 4:4:4, 4:2:2, 4:2:0, 4:4:0 the images of HEADER[N] are, if the hardware backend may take
    them, else -1: baseline JPEG of eight bits in one scan, gray or YCbCr, with all its tables, whole. i[N].
    """
    good = (headers["kind"] == _JPEG) & (headers["height"] > 0) & (headers["end"] == _ENDS)
    good &= (headers["process"] == _BASELINE) & (headers["precision"] == 8)
    good &= (headers["scan"] == headers["components"]) & with_codes(headers)
    present = (headers["quantisation"][:, None] >> headers["table"]) & 1
    h, v = headers["h"], headers["v"]
    gray = good & (headers["components"] == 1) & (headers["colour"] == GRAY) & (present[:, 0] == 1)
    three = good & (headers["components"] == 3) & (headers["colour"] == YCBCR) & present[:, :3].all(axis=1)
    three &= (h[:, 1:3] == 1).all(axis=1) & (v[:, 1:3] == 1).all(axis=1)
    found = np.full(len(headers), -1)
    for number, (across, down) in enumerate(_FACTORS):
        found[(three if number else gray) & (h[:, 0] == across) & (v[:, 0] == down)] = number
    return found


def default_share(threads: int, engines: int) -> float:
    """Part of the JPEG files for the host: what its threads to spare do beside the engines, a quarter at most."""
    host = max(0, threads - _BUSY) * _RATE
    return min(_MOST, host / (host + engines * _ENGINE_RATE))


def hosts_share(sizes: NDArray[np.int64], may: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """Which of N JPEG files the host decodes: `share` of them, from small to large; of those that it `may`. bool[N].

    A function of the batch alone.
    """
    order = np.flatnonzero(may)[np.argsort(sizes[may], kind="stable")]
    count = min(int(share * len(sizes)), len(order))
    found = np.zeros(len(sizes), np.bool_)
    if count:
        found[order[(2 * np.arange(count) + 1) * len(order) // (2 * count)]] = True
    return found


def _up(value: Any, multiple: int) -> Any:
    return -(-value // multiple) * multiple


def _turned(file: bytes) -> bytes:
    """A square 4:2:2 file as 4:4:0: as many MCUs of as many blocks."""
    at = file.index(b"\xff\xc0") + 11
    return file[:at] + b"\x12" + file[at + 1 :]
