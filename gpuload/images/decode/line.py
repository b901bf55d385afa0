"""The CPU's line: encoded images and windows of a batch enter; slice by slice their pixels come to their places in it.

Plain JPEG takes one native call a slice (`kernels/slice_cpu.cpp`, without the GIL): each window is decoded into memory
that stays in the cache, and every view of it resized at once. What needs Pillow, and what the native call leaves, is
decoded and resized in two calls, to the same pixels as if nothing else had been there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload import kernels  # type: ignore[attr-defined, unused-ignore]  # mypy cannot follow package-dir
from gpuload.errors import DecodeError
from gpuload.images import VIEW, Encoded, Ragged, pillow, resize
from gpuload.images.decode import libjpeg
from gpuload.images.decode.host import plain
from gpuload.images.transform import Image

_DECODE, _LEAVE, _ZEROS = 0, 1, 2  # Order of slice_cpu.cpp


@dataclass(frozen=True)
class Target:
    """Where M views of a slice's images go.

    Attributes
    ----------
    views : VIEW[M]
        Of the slice's images alone, counted as in the batch; in any order.
    image : Image
        For its mode, dtype, filter, mean and std; the size is that of `out`.
    out : Tensor[M, C, H, W]
        On the CPU, contiguous or channels-last, of dtype ``image.dtype``; written.
    """

    views: NDArray[np.void]
    image: Image
    out: torch.Tensor

    def __post_init__(self) -> None:
        views, out, wanted = self.views, self.out, (len(self.views), self.image.channels)
        dense = out.dim() == 4 and (out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last))
        fits = dense and out.shape[:2] == wanted and out.dtype == self.image.dtype and out.device.type == "cpu"
        if not fits or views.dtype != VIEW or not views.flags.c_contiguous:
            raise ValueError(
                f"Expected VIEW[M] and out [M, {wanted[1]}, H, W] of {self.image.dtype} on the CPU, contiguous or "
                f"channels-last, got {views.dtype} {views.shape} and {tuple(out.shape)} of {out.dtype} on {out.device} "
                f"with strides {out.stride()}."
            )


@dataclass(frozen=True)
class Filled:
    """What a slice became.

    Attributes
    ----------
    errors : dict of int to DecodeError
        By index in the batch, why there are zeros.
    resized : float
        Seconds spent on resizing.
    """

    errors: dict[int, DecodeError]
    resized: float


class Line:
    """Decodes and resizes the slices of one batch, from many threads at once.

    Parameters
    ----------
    encoded, headers
        N images, as a `Decoder` gets them.
    windows : i64[N, 4]
    scales : i64[N] or None
        Eighths to decode plain JPEG files to.
    decode : callable
        (encoded, headers, windows, scales) → Ragged: for what the native call leaves.
    count : callable
        ("libjpeg-turbo", number of images): told of every slice.
    """

    def __init__(
        self,
        encoded: Encoded,
        headers: NDArray[np.void],
        windows: NDArray[np.int64],
        scales: NDArray[np.int64] | None,
        decode: Callable[..., Ragged],
        count: Callable[[str, int], None],
    ) -> None:
        self._library = kernels.cpu_library()
        self._encoded, self._headers, self._windows, self._scales = encoded, headers, windows, scales
        self._decode, self._count = decode, count
        self._parts = libjpeg.parts(headers, windows, scales)
        self._parts["data"], self._parts["size"] = encoded.at, encoded.size
        self._parts["theirs"] = not libjpeg.own_coefficients()
        self._parts["status"] = np.where(plain(headers), _DECODE, np.where(headers["height"] > 0, _LEAVE, _ZEROS))

    def fill(self, lo: int, hi: int, targets: list[Target]) -> Filled:
        """Images lo to hi, which no other call has: every view of them to its place.

        The views of what cannot be decoded, and of images of height 0, become zeros.
        """
        parts = self._parts[lo:hi]
        rows = [_row(target) for target in targets]
        decoded, left, resized = kernels.run_fill(self._library, parts, lo, np.array(rows, kernels.OUTPUT))
        if decoded:
            self._count("libjpeg-turbo", decoded)
        if not left:
            return Filled({}, resized)
        rest = self._rest(lo + np.flatnonzero(parts["status"] == _LEAVE), targets)
        return Filled(rest.errors, resized + rest.resized)

    def _rest(self, left: NDArray[np.intp], targets: list[Target]) -> Filled:
        """The images `left`, sorted, in two calls."""
        scales = None if self._scales is None else self._scales[left]
        with self._decode(self._encoded.take(left), self._headers[left], self._windows[left], scales) as ragged:
            began = time.perf_counter()
            for target in targets:
                for start, stop in _runs(np.isin(target.views["image"], left)):
                    wanted = target.views[start:stop].copy()
                    wanted["image"] = np.searchsorted(left, wanted["image"])
                    resize.resize_normalize(ragged, wanted, target.image, target.out[start:stop])
            resized = time.perf_counter() - began
        return Filled({int(left[i]): error for i, error in ragged.errors.items()}, resized)


def _row(target: Target) -> tuple[Any, ...]:
    """A row of OUTPUT."""
    filtered = target.image.interpolation
    chooses = filtered == "bicubic" and pillow.chooses_first_pass()
    return kernels.output(target.views, target.out, resize.affine(target.image), filtered, chooses)  # type: ignore[no-any-return]


def available() -> bool:
    """Whether there is a native call: it takes a compiler at installation, and Pillow's own libjpeg."""
    return kernels.cpu_library() is not None and libjpeg.library() is not None


def _runs(chosen: NDArray[np.bool_]) -> Iterator[Any]:
    """(start, stop) of every stretch of True."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
