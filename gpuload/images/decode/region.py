"""Only the pixels that a crop needs: JPEG files and regions of them enter, windows of their pixels leave.

The libjpeg-turbo that Pillow brings can start, stop and crop; `kernels/jpeg_region.cpp` drives it. Inside the window
every byte equals that of a whole decode. Without a compiler at installation, or with a Pillow that has another
libjpeg, there is no library and images are decoded whole.
"""

from __future__ import annotations

import ctypes
import io
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from gpuload import kernels  # type: ignore[attr-defined, unused-ignore]  # mypy cannot follow package-dir

PART = np.dtype(  # struct Part of kernels/jpeg_region.cpp
    [
        ("data", np.uint64),
        ("size", np.int64),
        ("out", np.uint64),
        ("room", np.int64),
        ("x", np.int32),
        ("y", np.int32),
        ("w", np.int32),
        ("h", np.int32),
        ("channels", np.int32),
        ("eighths", np.int32),
        ("status", np.int32),
        ("theirs", np.int32),
    ]
)
_MARGIN = 2  # pixels: one that chroma upsampling gets wrong at a cut, one for rounding
BLOCK = 32  # pixels: how far to the left of the window decoding may begin (four blocks of eight)
_EIGHTHS = np.array([1, 2, 4, 8])  # the scales whose DCT is vectorised


@cache
def library() -> ctypes.CDLL | None:
    """The compiled reader on Pillow's libjpeg, None where either is missing or of another kind."""
    built = sorted(Path(kernels.__file__).parent.glob("_jpeg*.so"))
    home = Path(PIL.__file__).parent
    found = [*home.parent.glob("pillow.libs/libjpeg-*.so*"), *home.glob(".dylibs/libjpeg*.dylib")]
    if not built or not found:
        return None
    loaded = ctypes.CDLL(str(built[0]))
    loaded.gpuload_jpeg_open.argtypes = [ctypes.c_char_p]
    loaded.gpuload_jpeg_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return None if loaded.gpuload_jpeg_open(str(found[0]).encode()) else loaded


@cache
def own_coefficients() -> bool:
    """Whether our Huffman decoder gives what the library's own gives: asked once of the library that is there."""
    file, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    PIL.Image.fromarray(noise).save(file, "JPEG", quality=90, restart_marker_blocks=3)
    source, pixels = np.frombuffer(file.getvalue(), np.uint8), np.zeros((2, *noise.shape), np.uint8)
    parts = np.zeros(2, PART)
    parts["data"], parts["size"] = source.ctypes.data, len(source)
    parts["out"], parts["room"] = pixels.ctypes.data + np.arange(2) * noise.size, noise.size
    parts["h"], parts["w"], parts["channels"] = noise.shape
    parts["eighths"], parts["theirs"], parts["status"] = 8, (0, 1), 1
    found: Any = library()
    found.gpuload_jpeg_read(parts.ctypes.data, len(parts))
    if not parts["status"].any() and np.array_equal(pixels[0], pixels[1]):
        return True
    warnings.warn(
        "gpuload's Huffman decoder does not fit Pillow's libjpeg, which then decodes by itself and takes 1.3 times as "
        "long. Do: another version of Pillow.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def windows(
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    regions: NDArray[np.float64],
    sizes: NDArray[np.int64],
    fast: bool,
) -> tuple[NDArray[np.void], NDArray[np.float64]]:
    """What to decode of each image so that its region can be resized.

    Parameters
    ----------
    heights, widths : i64[N]
        Of the whole images, as they are stored.
    regions : f64[N, 4]
        x0, y0, width, height in pixels of the whole image, as it is stored.
    sizes : i64[N, 2]
        Width and height to resize to, as it is stored.
    fast : bool
        Halve images in the DCT while the region stays as large as its size.

    Returns
    -------
    parts : PART[N]
        x, y, w, h and eighths are set.
    regions : f64[N, 4]
        The same in pixels of the scaled image.
    """
    parts = np.zeros(len(regions), PART)
    eighths = np.full(len(regions), 8)
    if fast:
        needed = 8 * np.max(sizes / regions[:, 2:], axis=1)
        eighths = _EIGHTHS[np.minimum(np.searchsorted(_EIGHTHS, needed), 3)]
    scaled = regions * (eighths / 8)[:, None]
    for axis, (first, extent) in enumerate((("x", "w"), ("y", "h"))):
        whole = -((widths, heights)[axis] * eighths // -8)
        margin = np.maximum(1, scaled[:, 2 + axis] / sizes[:, axis]) + _MARGIN
        low = np.maximum(0, np.floor(scaled[:, axis] - margin)).astype(np.int64)
        high = np.minimum(whole, np.ceil(scaled[:, axis] + scaled[:, 2 + axis] + margin).astype(np.int64))
        parts[first], parts[extent] = low, high - low
    parts["eighths"] = eighths
    return parts, scaled


def turned(
    regions: NDArray[np.float64],
    orientations: NDArray[np.int32],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    *,
    back: bool = False,
) -> NDArray[np.float64]:
    """Regions in pixels of images as a person sees them → of the images as they are stored; or `back`.

    Parameters
    ----------
    regions : f64[N, 4]
        x0, y0, width, height.
    orientations : i32[N]
        EXIF, 1 to 8.
    heights, widths : i64[N]
        Of the images as they are stored.
    """
    swapped = (orientations >= 5)[:, None]
    found = regions if back else np.where(swapped, regions[:, [1, 0, 3, 2]], regions)
    x, y, w, h = found.T
    x = np.where(np.isin(orientations, (2, 3, 7, 8)), widths - x - w, x)
    y = np.where(np.isin(orientations, (3, 4, 6, 7)), heights - y - h, y)
    found = np.stack([x, y, w, h], axis=1)
    return np.where(swapped, found[:, [1, 0, 3, 2]], found) if back else found


def read(parts: NDArray[np.void]) -> None:
    """Decode every part to its `out`, without the GIL; sets x, w and status (0: decoded)."""
    found: Any = library()
    parts["status"] = 1
    if not own_coefficients():
        parts["theirs"] = 1
    found.gpuload_jpeg_read(parts.ctypes.data, len(parts))
