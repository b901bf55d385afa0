"""Pixels: byte views enter, ragged uint8 HWC pixels in one arena on the device leave, with the errors by row.

A decoder is anything with the members of `Decoder`; `make_decoder` picks one. The dataset never sees more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.errors import DecodeError
from gpuload.fields.columns import Views

_ALIGN = 256  # bytes, as any allocation on a GPU

IMAGE_ROW = np.dtype(
    [
        ("offset", np.int64),  # bytes from the arena's start; beyond the arena if the memory is another library's
        ("pitch", np.int64),  # bytes from one row of pixels to the next
        ("height", np.int32),  # as stored, before orientation
        ("width", np.int32),
        ("channels", np.int32),  # 3 (RGB) or 1 (L), interleaved
        ("orientation", np.int32),  # EXIF 1..8, what still has to be applied
    ]
)


@dataclass
class Crop:
    """What will be made of the images, so that a decoder may leave the rest out.

    Attributes
    ----------
    regions : callable
        Heights and widths (i64[N] each, as a person sees the images) → regions f64[N, 4] and flips bool[N].
    size : (int, int)
        Output height and width.
    fast : bool
        Pixels may come from an image halved in the DCT.
    """

    regions: Callable[[NDArray[np.int64], NDArray[np.int64]], tuple[NDArray[np.float64], NDArray[np.bool_]]]
    size: tuple[int, int]
    fast: bool = False


@dataclass
class Ragged:
    """N images of N sizes, lent by a decoder: ``with decoder.decode(...) as ragged: ...``.

    Inside the block torch's current stream is the one the pixels are ordered on. What reads them must have run, or
    have been put on that stream, when the block ends: then the memory is the decoder's again.

    A decoder that made use of a `Crop` says which `regions` to resize, in pixels of what it kept, and the `flips`.
    """

    arena: torch.Tensor  # u8[bytes]
    table: NDArray[np.void]  # IMAGE_ROW[N]; height 0 where there is no image
    errors: dict[int, DecodeError] = field(default_factory=dict)
    lease: AbstractContextManager[Any] = field(default_factory=nullcontext, repr=False)
    regions: NDArray[np.float64] | None = None  # f64[N, 4]
    flips: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __enter__(self) -> Ragged:
        self.lease.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.lease.__exit__(*error)

    def pixels(self, i: int) -> torch.Tensor:
        """View of image i as it is stored: u8[height, width, channels]."""
        row = self.table[i]
        shape = (int(row["height"]), int(row["width"]), int(row["channels"]))
        pitch, offset = int(row["pitch"]), int(row["offset"])
        if 0 <= offset <= self.arena.numel():
            return self.arena.as_strided(shape, (pitch, shape[2], 1), offset)
        return view_at(self.arena.data_ptr() + offset, shape, pitch, self.arena.device)

    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Heights and widths as a person sees them: orientations 5 to 8 swap the two."""
        turned = self.table["orientation"] >= 5
        h, w = self.table["height"].astype(np.int64), self.table["width"].astype(np.int64)
        return np.where(turned, w, h), np.where(turned, h, w)


class Decoder(Protocol):
    """Decodes to one device. `decode` may be called from many threads at once, and need not make use of `crop`."""

    name: str
    device: torch.device

    def decode(self, views: Views, *, orient: bool, crop: Crop | None) -> Ragged: ...
    def counts(self) -> dict[str, int]: ...
    def close(self) -> None: ...


class Memory:
    """u8 pixels at an address, under the array interface of its device: what other libraries take without a copy."""

    __slots__ = ("__array_interface__", "__cuda_array_interface__")

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, cuda: bool) -> None:
        what = {"data": (address, False), "shape": shape, "strides": strides, "typestr": "|u1", "version": 3}
        setattr(self, "__cuda_array_interface__" if cuda else "__array_interface__", what)


def view_at(address: int, shape: tuple[int, int, int], pitch: int, device: torch.device) -> torch.Tensor:
    """u8[height, width, channels] over memory that somebody else owns."""
    memory = Memory(address, shape, (pitch, shape[2], 1), device.type == "cuda")
    return torch.as_tensor(memory, device=device) if device.type == "cuda" else torch.from_numpy(np.asarray(memory))


def lay_out(table: NDArray[np.void], order: Iterable[int], start: int = 0) -> int:
    """Offsets for the images of `order`, one after the other from `start` on; the end of the last."""
    which = np.fromiter(order, np.intp)
    sizes = (table["pitch"][which] * table["height"][which] + _ALIGN - 1) // _ALIGN * _ALIGN
    ends = start + np.cumsum(sizes)
    table["offset"][which] = ends - sizes
    return int(ends[-1]) if len(ends) else start
