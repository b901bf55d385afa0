"""The planes of JPEG files, as the hardware decoder stores them, enter; RGB leaves, byte for byte Pillow's.

Three implementations of one definition, libjpeg-turbo's default: `kernels/ycc_to_rgb.cu` on CUDA; its CPU build for
planes in host memory; and `ycc_to_rgb_twin` in NumPy, which works everywhere.

The definition: chroma is interpolated by a triangle filter where one sample covers 2x1 or 2x2 pixels and the plane has
more than two columns, and always where it covers 1x2; everything else repeats samples. Neighbours are clamped to the
real samples, never a block's padding. Then YCbCr becomes RGB in 16-bit fixed point. All of it is exact integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpuload import kernels  # type: ignore[attr-defined, unused-ignore]  # mypy cannot follow package-dir
from gpuload.images import view_at

PLANES = np.dtype(  # struct Planes of kernels/ycc_to_rgb.cu
    [
        ("y", np.uint64),  # addresses of u8[height, width] and, of chroma, u8[ceil(height / v), ceil(width / h)]
        ("cb", np.uint64),  # 0, as cr, for a gray image
        ("cr", np.uint64),
        ("pitch_y", np.int32),  # bytes from one row to the next
        ("pitch_c", np.int32),
        ("height", np.int32),  # of the image, pixels
        ("width", np.int32),
        ("h", np.int32),  # luma samples to one of chroma, across and down: 2 and 2 are 4:2:0, 1 and 1 4:4:4
        ("v", np.int32),
        ("out", np.uint64),  # address of u8[height, width, 3]
        ("out_pitch", np.int64),
    ]
)
_CPU = torch.device("cpu")


def ycc_to_rgb(planes: NDArray[np.void], stream: torch.cuda.Stream | None) -> None:
    """Fill `out` of every image with its RGB pixels, in one launch.

    Parameters
    ----------
    planes : PLANES[N]
        Of any sizes and samplings; an image of height 0 is left out.
    stream : torch.cuda.Stream or None
        Where the addresses are a device's: the stream to launch on; nothing here waits for it, and the memory has to
        stay until it has passed. None where they are the host's: done when this returns.

    Raises
    ------
    ValueError
        A size, a factor or a pitch that cannot be.
    """
    planes = np.ascontiguousarray(planes)
    _check(planes)
    if stream is not None:
        kernels.run_ycc_cuda(planes, stream)
    elif (library := kernels.cpu_library()) is not None:
        kernels.run_ycc_cpu(library, planes)
    else:
        ycc_to_rgb_twin(planes)


def ycc_to_rgb_twin(planes: NDArray[np.void]) -> None:
    """`ycc_to_rgb` in NumPy, for planes in host memory: the definition that the kernel is tested against."""
    for row in planes[(planes["height"] > 0) & (planes["width"] > 0)]:
        height, width, h, v = (int(row[name]) for name in ("height", "width", "h", "v"))
        out = view_at(int(row["out"]), (height, width, 3), int(row["out_pitch"]), _CPU).numpy()
        luma = _plane(row["y"], height, width, row["pitch_y"])
        if not row["cb"]:
            out[...] = luma[..., None]
            continue
        chroma = [_plane(row[name], -(-height // v), -(-width // h), row["pitch_c"]) for name in ("cb", "cr")]
        out[...] = _colour(luma, *(_interpolated(plane, h, v, height, width) for plane in chroma))


def _check(planes: NDArray[np.void]) -> None:
    """Refuses what would read or write outside the planes."""
    if planes.dtype != PLANES or planes.ndim != 1:
        raise ValueError(f"Expected PLANES[N], got {planes.dtype} {planes.shape}.")
    some = planes[(planes["height"] != 0) & (planes["width"] != 0)]
    colour, factors = some["cb"] > 0, np.stack([some["h"], some["v"]])
    sides = np.stack([some["height"], some["width"]]).astype(np.int64)
    good = (sides > 0).all(axis=0) & (sides <= 1 << 16).all(axis=0) & (some["y"] > 0) & (some["out"] > 0)
    good &= (some["pitch_y"] >= sides[1]) & (some["out_pitch"] >= 3 * sides[1]) & (colour == (some["cr"] > 0))
    shares = ((factors >= 1) & (factors <= 4)).all(axis=0) & (some["pitch_c"] * factors[0] >= sides[1])
    good &= ~colour | shares
    if not good.all():
        raise ValueError(
            "Expected sizes up to 65536, factors from 1 to 4, pitches as long as a row, and addresses, "
            f"got {some[~good][0]} of {PLANES.names}."
        )


def _plane(address: Any, height: int, width: int, pitch: Any) -> NDArray[np.uint8]:
    """u8[height, width] over memory that somebody else owns."""
    found: NDArray[np.uint8] = view_at(int(address), (height, width, 1), int(pitch), _CPU).numpy()[..., 0]
    return found


def _interpolated(plane: NDArray[np.uint8], h: int, v: int, height: int, width: int) -> NDArray[np.int32]:
    """i32[height, width] of the samples of a plane, each of which covers v rows and h columns."""
    rows, columns = plane.shape
    x, y = np.arange(width), np.arange(height)
    i, j = x // h, y // v  # the nearest sample
    beside = np.clip(i - 1 + 2 * (x & 1), 0, columns - 1)  # the next nearest: left of even x, right of odd x
    below = np.clip(j - 1 + 2 * (y & 1), 0, rows - 1)  # above even y, below odd y
    samples = plane.astype(np.int32)
    found: NDArray[np.int32] = samples[j][:, i]
    if (h, v) == (2, 1) and columns > 2:
        found = (3 * samples[:, i] + samples[:, beside] + 1 + (x & 1)) >> 2
    elif (h, v) == (1, 2):
        found = (3 * samples[j] + samples[below] + 1 + (y & 1)[:, None]) >> 2
    elif (h, v) == (2, 2) and columns > 2:
        sums = 3 * samples[j] + samples[below]
        found = (3 * sums[:, i] + sums[:, beside] + 8 - (x & 1)) >> 4
    return found


def _colour(y: NDArray[np.uint8], cb: NDArray[np.int32], cr: NDArray[np.int32]) -> NDArray[np.uint8]:
    """u8[..., 3]: RGB of Y, Cb, Cr; the factors are 1.402, 0.34414, 0.71414 and 1.772 in 1/65536."""
    luma, cb, cr = y.astype(np.int32), cb - 128, cr - 128
    red = luma + ((91881 * cr + 32768) >> 16)
    green = luma + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = luma + ((116130 * cb + 32768) >> 16)
    found: NDArray[np.uint8] = np.clip(np.stack([red, green, blue], -1), 0, 255).astype(np.uint8)
    return found
