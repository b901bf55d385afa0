"""Decoding on lanes: what every decoder that writes to an arena of a device shares; the host does what it cannot.

Byte views enter. Those that the decoder claims by their headers are decoded in one call; the rest, and what that call
gave back, goes through `Host` on threads and, on CUDA, a page-locked buffer. One table of all of them leaves.
"""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.errors import DecodeError
from gpuload.fields.columns import Views
from gpuload.images.decode import IMAGE_ROW, Crop, Ragged, lay_out
from gpuload.images.decode.arena import Lane, Lanes, Lease, Slot
from gpuload.images.decode.host import Host


class LaneDecoder:
    """Decodes to arenas of `device`. By itself it claims nothing: everything is decoded on the host, and copied.

    Parameters
    ----------
    device : torch.device
    max_pixels : int
        Larger images (height times width, from the header) are an error before anything is decoded.
    threads : int
        Host threads for what the host decodes.
    """

    name = "cpu"
    library = ""  # under which `counts` counts what was claimed

    def __init__(self, device: torch.device, max_pixels: int, threads: int = 1) -> None:
        self.device, self._max_pixels, self._threads = device, max_pixels, threads
        self._host = Host(max_pixels)
        self._lanes: Lanes[Any] = Lanes()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._warned = False

    def decode(self, views: Views, *, orient: bool = True, crop: Crop | None = None) -> Ragged:
        """One arena with every image that could be decoded. Use it in a with block, which lends it out."""
        lane = self._lanes.take(self._lane)
        try:
            with lane.current():
                return self._decode(lane, views, orient)
        except BaseException:
            self._lanes.give(lane)  # its slot is waited for in full when it is taken again
            raise

    def counts(self) -> dict[str, int]:
        """Images by the library that decoded them, and those that none could."""
        return {self.library: 0, **self._host.counts()} if self.library else self._host.counts()

    def close(self) -> None:
        """Frees decoders, arenas and threads; the next call makes new ones."""
        self._lanes.close()
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def _lane(self) -> Lane[Any]:
        return Lane(self.device, None)

    def _claim(self, table: NDArray[np.void], views: Views, orient: bool) -> dict[int, Any]:
        """Index → whatever `_run` needs, of the images this decoder takes; their rows of the table but the offset.
        None of them may be too large, null or empty: the host makes the errors."""
        return {}

    def _run(self, lane: Lane[Any], slot: Slot, table: NDArray[np.void], claimed: dict[int, Any]) -> list[int]:
        """Decode what was claimed to its place in the arena, or set its place; returns what could not be decoded."""
        return []

    def _decode(self, lane: Lane[Any], views: Views, orient: bool) -> Ragged:
        table, errors = np.zeros(len(views), IMAGE_ROW), dict[int, DecodeError]()
        slot = lane.slot()
        claimed = self._claim(table, views, orient)
        rest = [i for i in range(len(views)) if i not in claimed]
        decoded = self._host.measure(table, rest, views, orient, errors, self._run_on_threads)
        tail = self._room(table, claimed)
        arena = slot.arena(lay_out(table, rest, tail))
        failed = self._run(lane, slot, table, claimed) if claimed else []
        self._upload(slot, arena, tail, table, rest, decoded, views, errors)
        for i in failed:
            self._again(slot, arena, table, i, views, orient, errors)
        if claimed:
            self._host.count(self.library, len(claimed) - len(failed))
        self._tell(claimed, failed, errors)
        self._host.count("failed", len(errors))
        return Ragged(arena, table, errors, Lease(self._lanes, lane, slot))

    def _room(self, table: NDArray[np.void], claimed: dict[int, Any]) -> int:
        """Bytes of the arena that what was claimed needs."""
        return lay_out(table, claimed)

    def _upload(
        self,
        slot: Slot,
        arena: torch.Tensor,
        start: int,
        table: NDArray[np.void],
        which: list[int],
        decoded: dict[int, NDArray[np.uint8]],
        views: Views,
        errors: dict[int, DecodeError],
    ) -> None:
        """What the host decodes, into ``arena[start:]``."""
        good = [i for i in which if table["height"][i]]
        if not good:
            return
        end = max(int(table["offset"][i] + table["pitch"][i] * table["height"][i]) for i in good)
        if self.device.type == "cpu":
            self._host.fill(arena.numpy(), table["offset"], table, good, decoded, views, errors, self._run_on_threads)
            return
        beside = slot.beside(end - start)
        offsets = table["offset"] - start
        self._host.fill(beside.numpy(), offsets, table, good, decoded, views, errors, self._run_on_threads)
        arena[start:end].copy_(beside[: end - start], non_blocking=True)

    def _again(
        self,
        slot: Slot,
        arena: torch.Tensor,
        table: NDArray[np.void],
        i: int,
        views: Views,
        orient: bool,
        errors: dict[int, DecodeError],
    ) -> None:
        """An image that was claimed and could not be decoded: the host has the last word, in memory of its own."""
        table[i] = 0
        one, broken = table[i : i + 1], dict[int, DecodeError]()
        decoded = self._host.measure(one, [0], [views[i]], orient, broken)
        pixels = torch.empty(int(one["pitch"][0]) * int(one["height"][0]), dtype=torch.uint8)
        self._host.fill(pixels.numpy(), one["offset"], one, [0], decoded, [views[i]], broken)
        if broken:
            errors[i] = broken[0]
            return
        slot.keep.append(pixels.to(self.device))  # rare enough to wait for
        one["offset"] = slot.keep[-1].data_ptr() - arena.data_ptr()

    def _tell(self, claimed: dict[int, Any], failed: list[int], errors: dict[int, DecodeError]) -> None:
        """Warn once where nothing at all of a batch was decoded as it should: no slow path is silent."""
        if len(failed) == len(claimed) >= 4 and not self._warned and not any(i in errors for i in failed):
            self._warned = True
            warnings.warn(
                f"{self.name} decoded none of {len(claimed)} images and the host did it: is the GPU out of memory, or "
                "a library of CUDA missing? stats() counts such images.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _run_on_threads(self, function: Any, which: Any) -> Any:
        """As map, on the host threads where more than one image is worth them."""
        items = list(which)
        if self._threads < 2 or len(items) < 2:
            return map(function, items)
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, "gpuload-host")
            pool = self._pool
        return pool.map(function, items)
