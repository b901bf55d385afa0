"""The CPU decoder: decodes in the calling thread into memory that the thread keeps."""

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.errors import DecodeError
from gpuload.images import PIXELS, Encoded, Ragged
from gpuload.images.decode import line
from gpuload.images.decode.host import MAX_PIXELS, Host

_LEAST = 1 << 20  # bytes
_KEPT = 32 << 20  # bytes a thread keeps from call to call; what a larger image took goes when its pixels were read


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
        encoded: Encoded,
        headers: NDArray[np.void],
        windows: NDArray[np.int64] | None = None,
        scales: NDArray[np.int64] | None = None,
    ) -> Ragged:
        """One arena with every image that could be decoded, overwritten by this thread's next call.

        `scales`, i64[N], are eighths (8, 4, 2, 1): JPEG files are made as much smaller in their DCT.
        """
        table, errors = np.zeros(len(encoded), PIXELS), dict[int, DecodeError]()
        which = np.flatnonzero(headers["height"] > 0)
        self._host.decode(encoded, headers, which, windows, self._arena, table, errors, scales=scales)
        if errors:
            self._host.count("failed", len(errors))
        arena = self._arena(0, 0)
        if len(arena) > _KEPT:
            self._local.arena = None
        return Ragged(torch.from_numpy(arena), table, errors)

    def line(
        self,
        encoded: Encoded,
        headers: NDArray[np.void],
        windows: NDArray[np.int64],
        scales: NDArray[np.int64] | None = None,
    ) -> line.Line | None:
        """What decodes and resizes a batch in one native call a slice; None where there is no such call.

        Parameters are those of `decode`. Nothing is decoded yet.
        """
        if not line.available():
            return None
        return line.Line(encoded, headers, windows, scales, self.decode, self._host.count)

    def counts(self) -> dict[str, int]:
        """Images by the library that decoded them, and those that none could."""
        return self._host.counts()

    def close(self) -> None:
        self._local = threading.local()

    def _arena(self, size: int, keep: int) -> NDArray[np.uint8]:
        """This thread's memory, of at least `size` bytes; when it has to grow, the first `keep` bytes stay."""
        arena: NDArray[np.uint8] | None = getattr(self._local, "arena", None)
        if arena is None or len(arena) < size:
            larger = np.empty(max(size + size // 4, _LEAST), np.uint8)
            if arena is not None:
                larger[:keep] = arena[:keep]
            arena = self._local.arena = larger
        return arena
