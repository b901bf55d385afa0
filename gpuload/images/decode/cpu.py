"""The CPU decoder: decodes in the calling thread into memory that the thread keeps."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.errors import DecodeError
from gpuload.fields.columns import Views
from gpuload.images.decode import IMAGE_ROW, Crop, Ragged, lay_out, region
from gpuload.images.decode.header import ends
from gpuload.images.decode.host import Host

MAX_PIXELS = 89_478_485  # Pillow's own limit, a quarter GiB of RGB
_NOTHING = torch.empty(0, dtype=torch.uint8)


class CpuDecoder:
    """Decodes in the calling thread, without the GIL. Gray images keep one channel.

    Parameters
    ----------
    max_pixels : int
        Larger images (height times width, from the header) are an error before anything is decoded.
    """

    name = "cpu"
    device = torch.device("cpu")

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        self._host = Host(max_pixels)
        self._local = threading.local()  # .arena, kept from call to call: fresh pages cost more than decoding

    def decode(
        self,
        views: Views,
        *,
        orient: bool = True,
        crop: Crop | None = None,
    ) -> Ragged:
        """One ragged arena with every image that could be decoded, overwritten by this thread's next call.

        With `crop`, JPEGs are decoded no further than it needs; its regions become those within what was decoded.
        """
        table = np.zeros(len(views), IMAGE_ROW)
        errors: dict[int, DecodeError] = {}
        decoded = self._host.measure(table, range(len(views)), views, orient, errors)
        ragged = Ragged(_NOTHING, table, errors)
        if crop is not None:
            heights, widths = ragged.sizes()
            ragged.regions, ragged.flips = crop.regions(np.maximum(heights, 1), np.maximum(widths, 1))
        used, left = self._windows(views, decoded, table, ragged.regions, crop)
        arena = self._arena(lay_out(table, left, used), keep=used)
        self._host.fill(arena, table["offset"], table, left.tolist(), decoded, views, errors)
        self._host.count("failed", len(errors))
        ragged.arena = torch.from_numpy(arena)
        return ragged

    def counts(self) -> dict[str, int]:
        """Images by the library that decoded them, and those that none could."""
        return self._host.counts()

    def close(self) -> None:
        self._local = threading.local()

    def _windows(
        self,
        views: list[Any],
        decoded: dict[int, Any],
        table: NDArray[np.void],
        regions: NDArray[np.float64] | None,
        crop: Crop | None,
    ) -> tuple[int, NDArray[np.intp]]:
        """Decode the windows of JPEGs that a crop needs, all of them without one; put both into `table`, `regions`.

        Returns the bytes used, and which images are still to be decoded.
        """
        everything = np.arange(len(views))
        usable = (table["height"] > 0) & (region.library() is not None)
        which = np.array([i for i in everything[usable].tolist() if i not in decoded and ends(views[i])], np.intp)
        if not len(which):
            return 0, everything
        heights, widths = table["height"][which].astype(np.int64), table["width"][which].astype(np.int64)
        turns = table["orientation"][which]
        if crop is None or regions is None:
            whole = np.stack([np.zeros_like(widths), np.zeros_like(widths), widths, heights], axis=1)
            parts, scaled = region.windows(heights, widths, whole.astype(np.float64), whole[:, 2:], False)
        else:
            stored = region.turned(regions[which], turns, heights, widths)
            sizes = np.where((turns >= 5)[:, None], crop.size, crop.size[::-1])
            parts, scaled = region.windows(heights, widths, stored, sizes, crop.fast)
        parts["channels"] = table["channels"][which]
        places = np.zeros(len(parts), IMAGE_ROW)  # as wide as the window may become
        places["pitch"], places["height"] = (parts["w"] + region.BLOCK) * parts["channels"], parts["h"]
        used = lay_out(places, range(len(parts)))
        parts["data"], parts["size"] = [views[i].ctypes.data for i in which], [len(views[i]) for i in which]
        parts["out"], parts["room"] = self._arena(used).ctypes.data + places["offset"], places["pitch"] * parts["h"]
        region.read(parts)
        good = parts["status"] == 0
        done, parts, scaled = which[good], parts[good], scaled[good]
        table["offset"][done], table["height"][done], table["width"][done] = (
            places["offset"][good],
            parts["h"],
            parts["w"],
        )
        table["pitch"][done] = parts["w"] * parts["channels"]
        if regions is not None:
            scaled[:, :2] -= np.stack([parts["x"], parts["y"]], axis=1)
            regions[done] = region.turned(scaled, turns[good], parts["h"], parts["w"], back=True)
        self._host.count("libjpeg-turbo", len(done))
        return used, np.setdiff1d(everything, done)

    def _arena(self, size: int, keep: int = 0) -> NDArray[np.uint8]:
        """This thread's memory, of at least `size` bytes; when it has to grow, the first `keep` bytes stay."""
        arena: NDArray[np.uint8] | None = getattr(self._local, "arena", None)
        if arena is None or len(arena) < size:
            larger = np.empty(max(size + size // 4, 1 << 20), np.uint8)
            if arena is not None:
                larger[:keep] = arena[:keep]
            arena = self._local.arena = larger
        return arena
