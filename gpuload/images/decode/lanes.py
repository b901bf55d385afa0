"""Decoding on lanes: what every decoder that writes to an arena of a device shares; the host does what it cannot.

Encoded images and HEADER enter. Those that the decoder claims by their headers are decoded in one call; the rest, and
what that call gave back, goes through `Host` on threads and, on CUDA, a page-locked buffer. One table of all leaves.
"""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.errors import DecodeError, GpuloadError
from gpuload.images import PIXELS, Encoded, Ragged, lay_out, put_whole
from gpuload.images.decode.arena import Lane, Lanes, Lease, Slot
from gpuload.images.decode.host import Host

_FATAL = ("out of memory", "cuda error", "cuda runtime", "cuda driver", "unspecified launch failure", "illegal memory")


def about_images(error: Exception) -> bool:
    """Whether what a decoder raised may be about one of its images, whatever its type: libraries raise nearly anything
    over an odd header. Not about an image are memory that ran out, and a GPU that no longer answers."""
    if isinstance(error, (GpuloadError, MemoryError, torch.OutOfMemoryError)):
        return False
    return not any(word in str(error).lower() for word in _FATAL)


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
        self.device, self._threads = device, threads
        self._host = Host(max_pixels)
        self._lanes: Lanes[Any] = Lanes()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._warned = False

    def decode(self, encoded: Encoded, headers: NDArray[np.void], windows: NDArray[np.int64] | None = None) -> Ragged:
        """One arena with every image that could be decoded. Use it in a with block, which lends it out."""
        lane = self._lanes.take(self._lane)
        try:
            with lane.current():
                return self._decode(lane, encoded, headers, windows)
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

    def _claim(self, encoded: Encoded, headers: NDArray[np.void]) -> dict[int, Any]:
        """Index → whatever `_run` needs, of the images this decoder takes. All others are the host's."""
        return {}

    def _run(
        self,
        lane: Lane[Any],
        slot: Slot,
        arena: torch.Tensor,
        encoded: Encoded,
        table: NDArray[np.void],
        claimed: dict[int, Any],
    ) -> list[int]:
        """Decode what was claimed to its place in the arena, or set its place; returns what could not be decoded."""
        return []

    def _decode(
        self, lane: Lane[Any], encoded: Encoded, headers: NDArray[np.void], windows: NDArray[np.int64] | None
    ) -> Ragged:
        table, errors = np.zeros(len(encoded), PIXELS), dict[int, DecodeError]()
        slot = lane.slot()
        slot.keep.append(encoded)  # the engine may read the bytes after the call
        claimed = self._claim(encoded, headers)
        rest = headers["height"] > 0
        failed: list[int] = []
        if claimed:
            mine = np.fromiter(claimed, np.intp, len(claimed))
            rows = np.zeros(len(mine), PIXELS)
            channels = self._channels(headers[mine])
            put_whole(rows, headers["height"][mine], headers["width"][mine], channels, headers["orientation"][mine])
            table[mine], rest[mine] = rows, False
        arena = slot.arena(self._room(table, claimed))
        if claimed:
            failed = self._run(lane, slot, arena, encoded, table, claimed)
            table[failed] = 0
            rest[failed] = True
        self._on_host(slot, arena, encoded, headers, np.flatnonzero(rest), windows, table, errors)
        if claimed:
            self._host.count(self.library, len(claimed) - len(failed))
        self._tell(claimed, failed, errors)
        self._host.count("failed", len(errors))
        return Ragged(arena, table, errors, Lease(self._lanes, lane, slot))

    def _channels(self, headers: NDArray[np.void]) -> Any:
        """Of the pixels that it makes of images with these HEADER[K]: a number, or i[K]."""
        return 3

    def _room(self, table: NDArray[np.void], claimed: dict[int, Any]) -> int:
        """Bytes of the arena that what was claimed needs."""
        return lay_out(table, claimed)

    def _on_host(
        self,
        slot: Slot,
        arena: torch.Tensor,
        encoded: Encoded,
        headers: NDArray[np.void],
        which: NDArray[np.intp],
        windows: NDArray[np.int64] | None,
        table: NDArray[np.void],
        errors: dict[int, DecodeError],
    ) -> None:
        """What the host decodes: into page-locked memory, and from there to memory of the device beside the arena."""
        if not len(which):
            return
        used = self._host.decode(
            encoded, headers, which, windows, slot.host_memory, table, errors,
            run=self._run_on_threads, shares=self._threads,
        )  # fmt: skip
        there = slot.upload(used)
        good = which[table["height"][which] > 0]
        table["offset"][good] += there.data_ptr() - arena.data_ptr()

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
