"""Images, as they travel: `Encoded` pointers, `HEADER` what files say, `VIEW` what is wanted, `Ragged` pixels.

Encoded ─headers─▶ HEADER[N] ─views─▶ VIEW[M] ─windows─▶ decode ─▶ Ragged ─resize─▶ tensor [M, C, H, W]

Python touches columns here, never single images: everything that is known about an image is a row of a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload.errors import DecodeError

KINDS = ("", "JPEG", "PNG", "GIF", "BMP", "TIFF", "JPEG2000", "QOI", "WEBP", "AVIF", "PNM")  # by HEADER's `kind`
GRAY, YCBCR, RGB, OTHER = 1, 2, 3, 4  # HEADER's `colour` of a JPEG file, as libjpeg decides it

HEADER = np.dtype(  # struct Header of kernels/headers.cpp
    [
        ("height", np.int32),  # pixels, as stored; 0 where the header does not tell, or there is none
        ("width", np.int32),
        ("restart", np.int32),  # JPEG: MCUs from one restart marker to the next, 0 without
        ("kind", np.uint8),  # index into KINDS; 0 for what is none of them
        ("orientation", np.uint8),  # EXIF, 1 to 8
        ("channels", np.uint8),  # of the decoded pixels: 1 gray, 3 RGB; 0 where unknown
        ("precision", np.uint8),  # bits of a sample, 0 where unknown
        ("process", np.uint8),  # JPEG: n of its frame's marker SOFn (0 baseline, 2 progressive, ...); 255 without
        ("components", np.uint8),  # JPEG: of the frame
        ("scan", np.uint8),  # JPEG: components of the first scan
        (
            "end",
            np.uint8,
        ),  # JPEG, PNG: 2 its end marker ends the file, padding aside; 1 more follows; 0 without
        ("jfif", np.uint8),  # JPEG: 1 with a JFIF mark
        ("adobe", np.uint8),  # JPEG: transform + 1 of an Adobe mark, 0 without
        ("colour", np.uint8),  # JPEG: GRAY, YCBCR, RGB or OTHER; 0 for other kinds
        ("ask", np.uint8),  # 1 where only Pillow can tell the rest (orientation, size)
        ("dc", np.uint8),  # JPEG: bit i, Huffman table i is defined before the first scan
        ("ac", np.uint8),
        ("quantisation", np.uint8),
        ("id", np.uint8, (4,)),  # JPEG, by component
        ("h", np.uint8, (4,)),  # sampling factors
        ("v", np.uint8, (4,)),
        ("table", np.uint8, (4,)),  # which quantisation table
        ("reserved", np.uint8),
    ]
)

VIEW = np.dtype(
    [
        ("image", np.int64),  # which of the N images
        ("region", np.float64, (4,)),  # x0, y0, width, height in pixels of the oriented image, sub-pixel
        ("flip", np.bool_),  # mirror left and right
    ]
)

PIXELS = np.dtype(
    [
        ("offset", np.int64),  # bytes from the arena's start; outside the arena if the memory is another library's
        ("pitch", np.int64),  # bytes from one row of pixels to the next
        ("height", np.int32),  # of what was decoded, as stored, before orientation; 0 where there is no image
        ("width", np.int32),
        ("channels", np.int32),  # 3 (RGB) or 1 (L), interleaved
        ("orientation", np.int32),  # EXIF 1..8, what still has to be applied
        ("x", np.int32),  # where it lies in the whole image, in pixels of its own scale
        ("y", np.int32),
        ("whole_height", np.int32),  # of the whole image, as stored, before any scale
        ("whole_width", np.int32),
        ("scale", np.float64),  # pixels here for one of the stored image: 1, or less where the decoder made it smaller
    ]
)


class Encoded:
    """N encoded images, as addresses into memory that `owner` keeps; no object an image.

    Attributes
    ----------
    at : u64[N]
        Where the bytes of each image begin; 0 for a null.
    size : i64[N]
        Bytes of each image; 0 for a null and for an empty value.
    opened : dict of int to PIL.Image.Image
        Images that Pillow had to open for their header, by index: open until they are decoded, once.
    """

    __slots__ = ("at", "opened", "owner", "size")

    def __init__(
        self, at: NDArray[np.uint64], size: NDArray[np.int64], owner: Any, opened: dict[int, Any] | None = None
    ) -> None:
        self.at, self.size, self.owner = np.asarray(at, np.uint64), np.asarray(size, np.int64), owner
        self.opened = {} if opened is None else opened
        if self.at.shape != self.size.shape or self.at.ndim != 1:
            raise ValueError(f"Expected at and size of one shape [N], got {self.at.shape} and {self.size.shape}.")

    @classmethod
    def of(cls, values: Sequence[Any]) -> Encoded:
        """From bytes, memoryviews or u8 arrays, None for a null; nothing is copied. For tests and for single files."""
        arrays = [None if value is None else np.frombuffer(value, np.uint8) for value in values]
        at = [0 if a is None else (a.ctypes.data or 1) for a in arrays]
        return cls(np.array(at, np.uint64), np.array([0 if a is None else len(a) for a in arrays], np.int64), arrays)

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, rows: slice) -> Encoded:
        """The same images from `rows.start` to `rows.stop`; shares their memory."""
        lo, hi, _ = rows.indices(len(self))
        opened = {i - lo: image for i, image in self.opened.items() if lo <= i < hi} if self.opened else {}
        return Encoded(self.at[lo:hi], self.size[lo:hi], self.owner, opened)

    def take(self, index: NDArray[np.integer[Any]]) -> Encoded:
        """The images at `index`, i64[M]; shares their memory."""
        opened = {}
        if self.opened:
            opened = {k: self.opened[i] for k, i in enumerate(index.tolist()) if i in self.opened}
        return Encoded(self.at[index], self.size[index], self.owner, opened)

    def view(self, i: int) -> NDArray[np.uint8] | None:
        """The bytes of image i, u8[size]: read-only, alive as long as the view is; None for a null."""
        if not self.at[i]:
            return None
        return np.asarray(_Bytes(int(self.at[i]), int(self.size[i]), self.owner))

    def __repr__(self) -> str:
        return f"Encoded({len(self)} images, {int(self.size.sum()):,} bytes, {int((self.at == 0).sum())} nulls)"


class _Bytes:
    """Memory under NumPy's array interface, with what keeps it alive."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, address: int, size: int, owner: Any) -> None:
        self.owner = owner
        data = (address, True) if size else (0, True)
        self.__array_interface__ = {"data": data, "shape": (size,), "typestr": "|u1", "version": 3}


@dataclass
class Ragged:
    """N images of N sizes, lent by a decoder: ``with decoder.decode(...) as ragged: ...``.

    Inside the block torch's current stream is the one the pixels are ordered on. What reads them must have run, or
    have been put on that stream, when the block ends: then the memory is the decoder's again.

    Attributes
    ----------
    arena : Tensor, u8[bytes]
    table : PIXELS[N]
        Where the pixels of each image are, and which part of it they are; height 0 where there is no image.
    errors : dict of int to DecodeError
        By index, why there is none.
    """

    arena: torch.Tensor
    table: NDArray[np.void]
    errors: dict[int, DecodeError] = field(default_factory=dict)
    lease: AbstractContextManager[Any] = field(default_factory=nullcontext, repr=False)

    @classmethod
    def of(
        cls, images: Sequence[Any], headers: NDArray[np.void] | None = None, device: torch.device | str = "cpu"
    ) -> Ragged:
        """From decoded images, for a decoder of one's own.

        Parameters
        ----------
        images : sequence of u8[height, width, channels], or DecodeError
            Whole images, as they are stored, with 1 or 3 channels; an array or a tensor each. An error in the place of
            an image that cannot be decoded.
        headers : HEADER[N], optional
            For the orientation that is still to be applied; without it, none.
        device : torch.device
            Of the arena.
        """
        table, errors, parts = np.zeros(len(images), PIXELS), dict[int, DecodeError](), []
        for i, image in enumerate(images):
            if isinstance(image, DecodeError):
                errors[i] = image
                continue
            # an array of Pillow's is read-only, and torch warns of those: it is copied
            pixels = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.require(image, None, ["C", "W"]))
            pixels = pixels[:, :, None] if pixels.dim() == 2 else pixels
            if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[2] not in (1, 3):
                got = f"{pixels.dtype} {tuple(pixels.shape)}"
                raise ValueError(f"Expected image {i} as uint8 [height, width, 1 or 3], got {got}.")
            height, width, channels = pixels.shape
            turned = 1 if headers is None else int(headers["orientation"][i])
            put_whole(table[i : i + 1], height, width, channels, turned)
            parts.append(pixels.to(device).reshape(-1))
        lay_out(table, range(len(images)), align=1)
        arena = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)
        return cls(arena, table, errors)

    def __len__(self) -> int:
        return len(self.table)

    def __enter__(self) -> Ragged:
        self.lease.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.lease.__exit__(*error)

    def pixels(self, i: int) -> torch.Tensor:
        """View of what was decoded of image i, as it is stored: u8[height, width, channels]."""
        row = self.table[i]
        shape = (int(row["height"]), int(row["width"]), int(row["channels"]))
        pitch, offset = int(row["pitch"]), int(row["offset"])
        if 0 <= offset < self.arena.numel():
            return self.arena.as_strided(shape, (pitch, shape[2], 1), offset)
        return view_at(self.arena.data_ptr() + offset, shape, pitch, self.arena.device)


class Decoder(Protocol):
    """Decodes to one device. `decode` may be called from many threads at once.

    Attributes
    ----------
    name : str
        For `stats` and messages.
    device : torch.device
        Where the pixels are.

    An attribute ``whole_batches`` is optional: True asks for whole batches in one call, False for slices of them, as
    many at the same time as there are threads. Without it, a decoder for a GPU gets batches and one for the CPU slices.
    """

    name: str
    device: torch.device

    def decode(self, encoded: Encoded, headers: NDArray[np.void], windows: NDArray[np.int64] | None) -> Ragged:
        """Pixels of N images.

        Parameters
        ----------
        encoded : Encoded
            N images. Nulls, and what its header already refuses, are among them with height 0: to be left out.
        headers : HEADER[N]
        windows : i64[N, 4] or None
            x0, y0, width, height in pixels of each image as it is stored: more than this nobody will look at. A decoder
            may decode it alone, or more. None: whole images.

        Returns
        -------
        Ragged
            What cannot be decoded has height 0 and its reason in `errors`.
        """
        ...

    def counts(self) -> dict[str, int]:
        """Images since the decoder was made, by the library that decoded them, and "failed"."""
        ...

    def close(self) -> None:
        """Frees memory and threads; the next call makes them again."""
        ...


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


_ALIGN = 256  # bytes, as any allocation on a GPU


def lay_out(table: NDArray[np.void], order: Iterable[int], start: int = 0, align: int = _ALIGN) -> int:
    """Offsets for the images of `order`, one after the other from `start` on; the end of the last."""
    which = np.fromiter(order, np.intp) if not isinstance(order, np.ndarray) else order
    sizes = (table["pitch"][which] * table["height"][which] + align - 1) // align * align
    ends = start + np.cumsum(sizes)
    table["offset"][which] = ends - sizes
    return int(ends[-1]) if len(ends) else start


def put_whole(rows: NDArray[np.void], height: Any, width: Any, channels: Any, orientation: Any) -> None:
    """Rows of a PIXELS table for whole images of these sizes, without their offsets; scalars or arrays."""
    rows["pitch"] = np.asarray(width, np.int64) * channels
    rows["height"] = rows["whole_height"] = height
    rows["width"] = rows["whole_width"] = width
    rows["channels"], rows["orientation"], rows["x"], rows["y"], rows["scale"] = channels, orientation, 0, 0, 1


def sizes(headers: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Heights and widths of HEADER[N] as a person sees the images: orientations 5 to 8 swap the two. i64[N] each."""
    turned = headers["orientation"] >= 5
    h, w = headers["height"].astype(np.int64), headers["width"].astype(np.int64)
    return np.where(turned, w, h), np.where(turned, h, w)
