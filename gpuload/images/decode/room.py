"""What decoding takes: HEADER[N], sizes of files and windows enter, bytes of memory leave. Nothing is decoded.

Encoded bytes say nothing of it: 2 KB may claim 89 million pixels, and Pillow gives them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuload.images import KINDS
from gpuload.images.decode import libjpeg
from gpuload.images.decode.host import plain

# Bytes a pixel: Pillow's peak, measured with files of 20 million pixels (4 to 14; 18 to 22 for WebP, JPEG 2000 and 16
# bits a sample), and 3 of the arena that the pixels are copied to.
_BY_PILLOW, _BY_PILLOW_WIDE = 17, 25
_WEBP, _JPEG2000 = KINDS.index("WEBP"), KINDS.index("JPEG2000")
_COEFFICIENTS = 6  # bytes a pixel: of files in several scans libjpeg keeps them all
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
    part = pixels if windows is None else (windows[:, 2] + libjpeg.BLOCK) * windows[:, 3]
    found: NDArray[np.int64] = part * headers["channels"]
    sequential = (headers["process"] < 2) & (headers["scan"] == headers["components"])
    long = size * _LEAST >= pixels  # of shorter ones libjpeg warns, and what it warns of is Pillow's
    odd = np.flatnonzero(~(plain(headers) & sequential & long))  # few, as a rule
    if len(odd):
        some, their = headers[odd], pixels[odd]
        wide = (some["kind"] == _WEBP) | (some["kind"] == _JPEG2000) | (some["precision"] > 8)
        several = plain(some) & ~sequential[odd]
        by_pillow = their * np.where(wide, _BY_PILLOW_WIDE, _BY_PILLOW)
        found[odd] = np.where(several, found[odd] + their * _COEFFICIENTS, by_pillow)
    return found
