"""What decoding takes: HEADER[N], sizes of files and windows enter, bytes of memory leave. Nothing is decoded.

Encoded bytes say nothing of it: 2 KB may claim 89 million pixels, and Pillow gives them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuload.images import KINDS
from gpuload.images.decode import libjpeg
from gpuload.images.decode.host import plain

# Bytes a pixel: Pillow's peak, measured with files of 20 million pixels (4 to 14; 18 to 22 for the second), and 3 of the
# arena that the pixels are copied to.
_BY_PILLOW, _BY_PILLOW_WIDE = 17, 25
_WIDE = [KINDS.index(kind) for kind in ("WEBP", "JPEG2000")]  # and what has 16 bits a sample
_COEFFICIENTS = 6  # of files in several scans libjpeg keeps them all: 2 bytes each
_LEAST = 256  # pixels of a whole file that one byte may hold: each block of 64 takes a code for DC and one for its end


def decoding(
    headers: NDArray[np.void], size: NDArray[np.int64], windows: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Bytes that each image takes while it is decoded, its pixels included: i64[N], 0 where there is no image.

    Parameters
    ----------
    headers : HEADER[N]
    size : i64[N]
        Of the encoded images.
    windows : i64[N, 4] or None
        What is wanted of each, as a `Decoder` gets it.
    """
    pixels = headers["height"].astype(np.int64) * headers["width"]
    sequential = (headers["process"] < 2) & (headers["scan"] == headers["components"])
    part = pixels if windows is None else (windows[:, 2] + libjpeg.BLOCK) * windows[:, 3]
    native = part * headers["channels"] + np.where(sequential, 0, pixels * _COEFFICIENTS)
    short = sequential & (size * _LEAST < pixels)  # libjpeg warns of it, and what it warns of is Pillow's
    wide = np.isin(headers["kind"], _WIDE) | (headers["precision"] > 8)
    pillow = pixels * np.where(wide, _BY_PILLOW_WIDE, _BY_PILLOW)
    return np.where(plain(headers) & ~short, native, pillow)
