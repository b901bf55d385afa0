"""Decoding on the host, to exactly Pillow's pixels: Encoded, HEADER and windows enter; PIXELS and bytes leave.

Plain JPEG in one native call by the libjpeg-turbo that Pillow brings, no further than the windows; where that could
not be compiled simplejpeg decodes them whole, one by one. Everything else, and what these refuse, goes through Pillow.
Every decoder falls back on this.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from gpuload.errors import DecodeError
from gpuload.images import GRAY, KINDS, OTHER, PIXELS, Encoded, lay_out, pillow, put_whole
from gpuload.images.decode import libjpeg

MAX_PIXELS = 89_478_485  # Pillow's own limit, a quarter GiB of RGB
_JPEG = KINDS.index("JPEG")
_Array = NDArray[Any]
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # as the built-in map; in order
Room = Callable[[int, int], NDArray[np.uint8]]  # (size, keep) → u8[>= size], of which the first `keep` bytes stay


def plain(headers: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which of HEADER[N] are JPEG files that libjpeg decodes to Pillow's pixels: eight bits, gray, YCbCr or RGB, with
    an end marker. A cut file is Pillow's, which refuses it."""
    good = (headers["kind"] == _JPEG) & (headers["height"] > 0) & (headers["precision"] == 8) & (headers["end"] > 0)
    found: NDArray[np.bool_] = good & (headers["colour"] > 0) & (headers["colour"] < OTHER)
    return found


def with_codes(headers: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which JPEG files of HEADER[N] bring the Huffman tables that files of their kind use: 0 for gray, 0 and 1 for
    colour. libjpeg has standard ones for the others (frames of Motion JPEG); a GPU's decoder need not."""
    wanted = np.where(headers["components"] == 1, 1, 3)
    later = headers["process"] == 2  # progressive: those for AC may follow the first scan
    found: NDArray[np.bool_] = (headers["dc"] & wanted == wanted) & (later | (headers["ac"] & wanted == wanted))
    return found


class Host:
    """Decodes on the host and counts images by the library that read them. May be used by many threads at once.

    Parameters
    ----------
    max_pixels : int
        For what Pillow opens late; what headers tell was judged before.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._counts = Counter({"simplejpeg": 0, "pillow": 0, "failed": 0})

    def decode(
        self,
        encoded: Encoded,
        headers: NDArray[np.void],
        which: NDArray[np.intp],
        windows: NDArray[np.int64] | None,
        room: Room,
        table: NDArray[np.void],
        errors: dict[int, DecodeError],
        *,
        scales: NDArray[np.int64] | None = None,
        run: Run = map,
        shares: int = 1,
    ) -> int:
        """Decode images into memory.

        Parameters
        ----------
        encoded, headers, windows
            Of N images, as a `Decoder` gets them.
        which : i64[K]
            The images to decode, all with a height.
        room : callable
            Gives the memory, and more of it when asked again.
        table : PIXELS[N]
            The rows of `which` are filled, with offsets into that memory; height 0 for what cannot be decoded.
        errors : dict
            Gets the reasons.
        scales : i64[N], optional
            Eighths of its size to decode a plain JPEG to: 8, 4, 2 or 1.
        run, shares
            How to map, maybe on threads, and how many of them are worth it.

        Returns
        -------
        int
            Bytes used.
        """
        used, left = 0, which
        if libjpeg.library() is not None:
            native = which[plain(headers[which])]
            if len(native):
                used, done = self._native(encoded, headers, native, windows, scales, room, table, run, shares)
                left = np.setdiff1d(which, done, assume_unique=True) if len(done) < len(which) else which[:0]
        return self._singly(encoded, headers, left, used, room, table, errors, run) if len(left) else used

    def count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def counts(self) -> dict[str, int]:
        """Images by the library that decoded them, and those that none could."""
        with self._lock:
            return dict(self._counts)

    def _native(
        self,
        encoded: Encoded,
        headers: NDArray[np.void],
        which: NDArray[np.intp],
        windows: NDArray[np.int64] | None,
        scales: NDArray[np.int64] | None,
        room: Room,
        table: NDArray[np.void],
        run: Run,
        shares: int,
    ) -> tuple[int, NDArray[np.intp]]:
        """(bytes used, which were decoded): one call without the GIL for each share."""
        mine = headers[which]
        parts = libjpeg.parts(
            mine,
            None if windows is None else windows[which],
            None if scales is None else scales[which],
        )
        places = np.zeros(len(parts), PIXELS)  # as wide as the window may become
        places["pitch"], places["height"] = (parts["w"] + libjpeg.BLOCK) * parts["channels"], parts["h"]
        used = lay_out(places, np.arange(len(parts)))
        parts["data"], parts["size"] = encoded.at[which], encoded.size[which]
        memory = room(used, 0)
        parts["out"], parts["room"] = memory.ctypes.data + places["offset"], places["pitch"] * parts["h"]
        if shares > 1 and len(parts) > 1:
            cuts = np.linspace(0, len(parts), min(shares, len(parts)) + 1).astype(int).tolist()
            for _ in run(lambda k: libjpeg.read(parts[cuts[k] : cuts[k + 1]]), range(len(cuts) - 1)):
                pass
        else:
            libjpeg.read(parts)
        good = parts["status"] == 0
        done, parts, places, mine = which[good], parts[good], places[good], mine[good]
        rows = np.zeros(len(done), PIXELS)
        rows["offset"], rows["pitch"] = places["offset"], parts["w"] * parts["channels"]
        rows["orientation"], rows["scale"] = mine["orientation"], parts["eighths"] / 8
        rows["whole_height"], rows["whole_width"] = mine["height"], mine["width"]
        for name, source in (("height", "h"), ("width", "w"), ("channels", "channels"), ("x", "x"), ("y", "y")):
            rows[name] = parts[source]
        table[done] = rows
        self.count("libjpeg-turbo", len(done))
        return used, done

    def _singly(
        self,
        encoded: Encoded,
        headers: NDArray[np.void],
        which: NDArray[np.intp],
        used: int,
        room: Room,
        table: NDArray[np.void],
        errors: dict[int, DecodeError],
        run: Run,
    ) -> int:
        """What has no native way, one by one, whole, behind the first `used` bytes; the bytes used then."""

        rows, mine = np.zeros(len(which), PIXELS), headers[which]
        put_whole(rows, mine["height"], mine["width"], 3, mine["orientation"])  # gray ones leave a part of it alone
        end = lay_out(rows, np.arange(len(rows)), used)
        memory = room(end, used)

        def one(k: int) -> DecodeError | None:
            try:
                pixels = self._whole(encoded, int(which[k]), mine[k])
            except DecodeError as error:
                return error
            start, channels = int(rows["offset"][k]), pixels.shape[2]
            memory[start : start + pixels.size].reshape(pixels.shape)[...] = pixels
            rows["channels"][k], rows["pitch"][k] = channels, pixels.shape[1] * channels
            return None

        for k, error in enumerate(run(one, range(len(which)))):
            if error is None:
                table[which[k]] = rows[k]
            else:
                errors[int(which[k])] = error
        return end

    def _whole(self, encoded: Encoded, i: int, header: Any) -> NDArray[np.uint8]:
        if libjpeg.library() is None and plain(header.reshape(1))[0]:
            try:
                space = "GRAY" if header["colour"] == GRAY else "RGB"
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded.view(i), space)
            except Exception:  # it warned, or does not know the file's kind: Pillow has the last word
                pass
            else:
                self.count("simplejpeg")
                return pixels
        pixels = pillow.load(encoded, i, header, self._max_pixels)
        self.count("pillow")
        return pixels
