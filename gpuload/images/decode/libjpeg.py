"""Only the pixels that a window needs: pointers to plain JPEG files enter, the pixels of their windows leave.

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
        ("orientation", np.int32),
        ("whole_w", np.int32),
        ("whole_h", np.int32),
        ("reserved", np.int32),
    ]
)
PLANES_OF = np.dtype(  # struct Planes of kernels/jpeg_stored.cpp
    [
        ("data", np.uint64),
        ("size", np.int64),
        ("plane", np.uint64, (3,)),
        ("pitch", np.int64, (3,)),
        ("room", np.int64, (3,)),
        ("w", np.int32, (3,)),
        ("h", np.int32, (3,)),
        ("components", np.int32),
        ("lenient", np.int32),
        ("status", np.int32),
        ("reserved", np.int32),
    ]
)
BLOCK = 32  # pixels: how far to the left of the window decoding may begin (four blocks of eight)
_EIGHTHS = np.array([1, 2, 4, 8])  # the scales whose DCT is vectorised


@cache
def library() -> ctypes.CDLL | None:
    """The compiled reader on Pillow's libjpeg, None where either is missing or of another kind."""
    built = kernels.cpu_library()
    home = Path(PIL.__file__).parent
    found = [*home.parent.glob("pillow.libs/libjpeg-*.so*"), *home.glob(".dylibs/libjpeg*.dylib")]
    if built is None or not found:
        return None
    return None if built.gpuload_jpeg_open(str(found[0]).encode()) else built


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


def parts(
    headers: NDArray[np.void], windows: NDArray[np.int64] | None, scales: NDArray[np.int64] | None
) -> NDArray[np.void]:
    """What to decode of plain JPEG files: PART[N] without addresses.

    Parameters
    ----------
    headers : HEADER[N]
    windows : i64[N, 4] or None
        x0, y0, width, height in pixels of each image as it is stored; None for whole images.
    scales : i64[N] or None
        Eighths to decode to.
    """
    found = np.zeros(len(headers), PART)
    found["channels"], found["orientation"] = headers["channels"], headers["orientation"]
    found["whole_h"], found["whole_w"] = headers["height"], headers["width"]
    found["eighths"] = eighths = np.full(len(headers), 8) if scales is None else scales
    heights, widths = scaled(headers["height"], eighths), scaled(headers["width"], eighths)
    if windows is None:
        found["w"], found["h"] = widths, heights
        return found
    low = windows[:, :2] * eighths[:, None] // 8
    high = -((windows[:, :2] + windows[:, 2:]) * eighths[:, None] // -8)
    found["x"], found["y"] = low.T
    found["w"], found["h"] = np.minimum(high[:, 0], widths) - low[:, 0], np.minimum(high[:, 1], heights) - low[:, 1]
    more = headers["end"] < 2  # something follows the end marker: only who decodes to the last row knows it is the end
    if more.any():
        found["h"][more] = (heights - low[:, 1])[more]
    return found


def scaled(size: Any, eighths: Any) -> Any:
    """Heights or widths of images that were made smaller in their DCT, as libjpeg rounds them: up."""
    return -(np.asarray(size, np.int64) * eighths // -8)


def scales(views: NDArray[np.void], count: int, size: tuple[int, int]) -> NDArray[np.int64]:
    """Eighths, i64[count]: how much smaller each image may become while its views, VIEW[M], stay as large as `size`."""
    needed = 8 * np.max(np.array(size[::-1]) / views["region"][:, 2:], axis=1)  # width and height as a person sees them
    found = np.zeros(count, np.int64)
    np.maximum.at(found, views["image"], _EIGHTHS[np.minimum(np.searchsorted(_EIGHTHS, needed), 3)])
    return np.where(found, found, 8)


def read(parts: NDArray[np.void]) -> None:
    """Decode every part to its `out`, without the GIL; sets x, w and status (0: decoded)."""
    found: Any = library()
    parts["status"] = 1
    if not own_coefficients():
        parts["theirs"] = 1
    found.gpuload_jpeg_read(parts.ctypes.data, len(parts))


def planes(file: bytes, shapes: list[tuple[int, int]]) -> list[NDArray[np.uint8]] | None:
    """The planes of a JPEG file as they are stored, u8[h, w] each, of these shapes; None without the compiled reader.

    Raises
    ------
    ValueError
        The file cannot be decoded, or its planes have other shapes.
    """
    found = library()
    if found is None:
        return None
    source, row = np.frombuffer(file, np.uint8), np.zeros(1, PLANES_OF)
    made = [np.zeros(shape, np.uint8) for shape in shapes]
    row["data"], row["size"] = source.ctypes.data, len(source)
    for c, plane in enumerate(made):
        row["plane"][0, c], row["pitch"][0, c], row["room"][0, c] = plane.ctypes.data, plane.shape[1], plane.size
    found.gpuload_jpeg_stored(row.ctypes.data, 1)
    sizes = list(zip(row["h"][0].tolist(), row["w"][0].tolist(), strict=True))[: len(made)]
    if row["status"][0] or row["components"][0] != len(made) or sizes != shapes:
        raise ValueError(f"Expected a JPEG file with planes of {shapes}, got {sizes}, status {row['status'][0]}.")
    return made
