"""Geometry as data: `Image`, HEADER[N] and draws enter, VIEW[M] leaves, before anything is decoded.

A view says which image, which region of it and whether it is mirrored. It is never rewritten: a decoder says where what
it decoded lies, and the resize combines the two.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuload import kernels  # type: ignore[attr-defined, unused-ignore]  # mypy cannot follow package-dir
from gpuload.images import HEADER, VIEW, sizes
from gpuload.images.transform import Image
from gpuload.order.draws import Draws

_TRIES = 10  # as torchvision's RandomResizedCrop
# of them for every row: most fit, and arrays of 128 rows stay below the 500 values NumPy lets go the GIL for
_FIRST = 3
_MARGIN = 2  # pixels: one that chroma upsampling gets wrong at a cut, one for rounding
_F64 = NDArray[np.float64]
_SWAPPED = np.arange(9) >= 5  # by EXIF orientation: what is stored as a row is seen as a column
_MIRRORED_X = np.isin(np.arange(9), (2, 3, 7, 8))
_MIRRORED_Y = np.isin(np.arange(9), (3, 4, 6, 7))


def of_all(image: Image, headers: NDArray[np.void], draws: Draws, name: str, first: bool) -> NDArray[np.void]:
    """``image.views`` of every image, one image after the other: VIEW[N * V].

    Parameters
    ----------
    image : Image
    headers : HEADER[N]
    draws : Draws
        Of N rows.
    name : str
        Of the output.
    first : bool
        Whether it is the column's first output: its numbers are those without a name.
    """
    found = [views(image, headers, draws, stream) for stream in streams(image, name, first)]
    return found[0] if len(found) == 1 else np.stack(found, axis=1).reshape(-1)


def streams(image: Image, name: str, first: bool) -> list[str]:
    """The name of each view's random numbers: without the column's, so that different columns of a row stay paired."""
    base = "" if first else name
    return [base if k == 0 else f"{base}:{k}" for k in range(image.views)]


def views(image: Image, headers: NDArray[np.void], draws: Draws, stream: str = "") -> NDArray[np.void]:
    """One view of every image: VIEW[N].

    Parameters
    ----------
    image : Image
    headers : HEADER[N]
        Of images of height 0 the view means nothing.
    draws : Draws
        Of N rows.
    stream : str
        Name of the random numbers; ``""`` for a column's first output.
    """
    library = kernels.tables_library()
    if library is None or headers.dtype != HEADER or image.crop == "pad":
        heights, widths = sizes(headers)
        return of_regions(*regions(image, np.maximum(heights, 1), np.maximum(widths, 1), draws, stream))
    return _native(library, image, headers, draws, stream)


def _native(library: Any, image: Image, headers: NDArray[np.void], draws: Draws, stream: str = "") -> NDArray[np.void]:
    """`views` in one call, or in two where none of the first tries fits an image; the numbers of `regions`."""
    found, drawn = np.empty(len(headers), VIEW), _drawn(image, draws, stream)
    crop = _crop(image)
    few = _ratios(image, drawn[:, 4 : 4 + 2 * _FIRST : 2])
    left = kernels.run_views(library, headers, crop, drawn, few, 0, None, found)
    if len(left):
        crop["last"] = 1
        rest = _ratios(image, drawn[left, 4 + 2 * _FIRST :: 2])
        kernels.run_views(library, headers, crop, drawn, rest, _FIRST, left, found)
    return found


def _crop(image: Image) -> NDArray[np.void]:
    """CROP[] of an image."""
    _, height, width = image.shape or (0, 1, 1)
    mode = 0 if image.size is None else ("none", "center", "random").index(image.crop)
    return np.array((image.scale, image.ratio, image.crop_ratio, image.flip, height, width, mode, 0), kernels.CROP)


def of_regions(where: _F64, flips: NDArray[np.bool_]) -> NDArray[np.void]:
    """VIEW[N] of regions f64[N, 4] and flips bool[N], one of each image."""
    found = np.zeros(len(where), VIEW)
    found["image"], found["region"], found["flip"] = np.arange(len(where)), where, flips
    return found


def regions(
    image: Image, heights: NDArray[np.int64], widths: NDArray[np.int64], draws: Draws, stream: str = ""
) -> tuple[_F64, NDArray[np.bool_]]:
    """The region of each image that fills the output, and whether it is mirrored.

    Parameters
    ----------
    image : Image
    heights, widths : i64[N]
        Size in pixels of each image as a person sees it (after orientation).
    draws : Draws
        Of N rows.
    stream : str
        Name of the random numbers.

    Returns
    -------
    regions : f64[N, 4]
        x0, y0, width, height in pixels, sub-pixel, within the image.
    flips : bool[N]
    """
    h, w = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    drawn = _drawn(image, draws, stream)
    flips: NDArray[np.bool_] = drawn[:, 0] < image.flip if drawn.shape[1] else np.zeros(len(h), np.bool_)
    half = np.full(len(h), 0.5)
    if image.crop == "none" or image.size is None:
        rw, rh, fx, fy = w, h, half, half
    elif image.crop == "pad":
        return padded(image, heights, widths, flips), flips
    elif image.crop == "center":
        rw, rh = _fit(image, h, w)
        rw, rh, fx, fy = rw * image.crop_ratio, rh * image.crop_ratio, half, half
    else:
        rw, rh, fits = _random_size(image, h, w, drawn[:, 3:])
        fx, fy = np.where(fits, drawn[:, 1], 0.5), np.where(fits, drawn[:, 2], 0.5)
    return np.stack([(w - rw) * fx, (h - rh) * fy, rw, rh], axis=1), flips


def inner(
    image: Image, heights: NDArray[np.int64], widths: NDArray[np.int64], flips: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Where the whole images lie in their outputs for ``crop="pad"``: top, left, height, width, i64[N, 4].

    As large as fits, rounded to pixels, in the middle; what is odd goes below and, before the mirror, to the right.
    """
    _, out_h, out_w = image.shape or (0, 1, 1)
    h, w = np.maximum(heights, 1), np.maximum(widths, 1)
    scale = np.minimum(out_h / h, out_w / w)
    tall, wide = (np.clip(np.rint(side * scale), 1, most) for side, most in ((h, out_h), (w, out_w)))
    top, left = (out_h - tall) // 2, (out_w - wide) // 2
    left = np.where(flips, out_w - wide - left, left)
    return np.stack([top, left, tall, wide], axis=1).astype(np.int64)


def padded(image: Image, heights: NDArray[np.int64], widths: NDArray[np.int64], flips: NDArray[np.bool_]) -> _F64:
    """The regions of ``crop="pad"``, larger than the images: f64[N, 4]."""
    _, out_h, out_w = image.shape or (0, 1, 1)
    top, left, tall, wide = inner(image, heights, widths, flips).astype(np.float64).T
    left = np.where(flips, out_w - wide - left, left)  # a region is that before the mirror
    x, y = np.maximum(widths, 1) / wide, np.maximum(heights, 1) / tall
    return np.stack([-left * x, -top * y, out_w * x, out_h * y], axis=1)


def _drawn(image: Image, draws: Draws, stream: str) -> _F64:
    """The uniforms that an image's region and flip need, as few as they are: f64[N, n]."""
    needed = 3 + 2 * _TRIES if image.crop == "random" else int(image.flip > 0)
    return draws.uniform(stream, needed) if needed else np.empty((len(draws.rows), 0))  # fewer are the same ones


def windows(
    views: NDArray[np.void],
    headers: NDArray[np.void],
    size: tuple[int, int],
    scales: NDArray[np.int64] | None = None,
    radius: int = 1,
) -> NDArray[np.int64]:
    """What of each image has to be decoded so that its views can be resized.

    Parameters
    ----------
    views : VIEW[M]
    headers : HEADER[N]
    size : (int, int)
        Output height and width, pixels.
    scales : i64[N], optional
        Eighths: at which scale each image will be decoded; margins are as wide as that scale needs.
    radius : int
        Of the filter, in steps of the output, at least as many pixels: `Image.radius`.

    Returns
    -------
    i64[N, 4]
        x0, y0, width, height in pixels of each image as it is stored: the bounding window of its views, wider by the
        filter's support and a margin. Width and height 0 where an image has no view.
    """
    if views.dtype != VIEW or headers.dtype != HEADER:
        raise ValueError(f"Expected VIEW[M] and HEADER[N], got {views.dtype} and {headers.dtype}.")
    library = kernels.tables_library()
    if library is None:
        return windows_twin(views, headers, size, scales, radius)
    found = np.empty((len(headers), 4), np.int64)
    kernels.run_windows(library, views, headers, size, scales, radius, found)
    return found


def windows_twin(
    views: NDArray[np.void],
    headers: NDArray[np.void],
    size: tuple[int, int],
    scales: NDArray[np.int64] | None = None,
    radius: int = 1,
) -> NDArray[np.int64]:
    """`windows` in NumPy, for where nothing could be compiled."""
    heights, widths, turns = headers["height"], headers["width"], headers["orientation"]
    which, n = views["image"], len(headers)
    one_each = len(which) == n and bool((which == np.arange(n)).all())
    if not one_each:
        heights, widths, turns = heights[which], widths[which], turns[which]
        scales = None if scales is None else scales[which]
    found, corners = np.zeros((n, 4), np.int64), []
    region = to_stored(views["region"], turns, heights, widths)
    for axis, whole in enumerate((widths, heights)):
        outputs = np.where(turns >= 5, size[axis], size[1 - axis])
        if scales is None:
            margin = radius * np.maximum(1, region[:, 2 + axis] / outputs) + _MARGIN
        else:
            wide = radius * np.maximum(1, region[:, 2 + axis] * scales / 8 / outputs)
            margin = (wide + _MARGIN) * 8 / scales
        low = np.maximum(0, np.floor(region[:, axis] - margin))
        corners.append((low, np.minimum(whole, np.ceil(region[:, axis] + region[:, 2 + axis] + margin))))
    for axis, (low, high) in enumerate(corners):
        if one_each:
            found[:, axis], found[:, 2 + axis] = low, high - low
            continue
        first, last = np.full(n, np.inf), np.zeros(n)
        np.minimum.at(first, which, low)
        np.maximum.at(last, which, high)
        seen = last > 0
        found[seen, axis], found[seen, 2 + axis] = first[seen], (last - first)[seen]
    return found


def union(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bounding windows of two windows of each image: i64[N, 4]."""
    low = np.minimum(one[:, :2], other[:, :2])
    high = np.maximum(one[:, :2] + one[:, 2:], other[:, :2] + other[:, 2:])
    return np.concatenate([low, high - low], axis=1)


def to_stored(where: _F64, orientations: NDArray[np.integer], heights: NDArray, widths: NDArray) -> _F64:  # type: ignore[type-arg]
    """Regions in pixels of images as a person sees them → of the images as they are stored.

    Parameters
    ----------
    where : f64[N, 4]
        x0, y0, width, height.
    orientations : int[N]
        EXIF, 1 to 8.
    heights, widths : int[N]
        Of the images as they are stored.
    """
    if (orientations == 1).all():
        return where
    swapped = _SWAPPED[orientations][:, None]
    return _mirrored(np.where(swapped, where[:, [1, 0, 3, 2]], where), orientations, heights, widths)


def to_seen(where: _F64, orientations: NDArray[np.integer], heights: NDArray, widths: NDArray) -> _F64:  # type: ignore[type-arg]
    """The way back of `to_stored`."""
    if (orientations == 1).all():
        return where
    found = _mirrored(where, orientations, heights, widths)
    return np.where(_SWAPPED[orientations][:, None], found[:, [1, 0, 3, 2]], found)


def _mirrored(where: _F64, orientations: NDArray[np.integer], heights: NDArray, widths: NDArray) -> _F64:  # type: ignore[type-arg]
    x, y, w, h = where.T
    x = np.where(_MIRRORED_X[orientations], widths - x - w, x)
    y = np.where(_MIRRORED_Y[orientations], heights - y - h, y)
    return np.stack([x, y, w, h], axis=1)


def _fit(image: Image, h: _F64, w: _F64) -> tuple[_F64, _F64]:
    """The largest rectangle of the output's shape inside each image."""
    _, out_h, out_w = image.shape or (0, 1, 1)
    rw = np.minimum(w, h * out_w / out_h)
    return rw, np.minimum(h, rw * out_h / out_w)


def _random_size(image: Image, h: _F64, w: _F64, drawn: _F64) -> tuple[_F64, _F64, NDArray[np.bool_]]:
    """Random-resized crop: the first of ten drawn (area, ratio) that fits; else the whole image, its
    ratio clipped, as torchvision's ``RandomResizedCrop.get_params`` does."""
    pick, some = np.arange(len(h)), 2 * _FIRST
    rw, rh = _tries(image, h, w, drawn[:, :some])  # f64[N, tries]
    fits: NDArray[np.bool_] = (rw <= w[:, None]) & (rh <= h[:, None])
    first, good = fits.argmax(axis=1), np.asarray(fits.any(axis=1), np.bool_)
    chosen_w, chosen_h = rw[pick, first], rh[pick, first]
    if not good.all():
        left = np.flatnonzero(~good)
        rw, rh = _tries(image, h[left], w[left], drawn[left, some:])
        fits = (rw <= w[left, None]) & (rh <= h[left, None])
        first, pick = fits.argmax(axis=1), np.arange(len(left))
        chosen_w[left], chosen_h[left], good[left] = rw[pick, first], rh[pick, first], fits.any(axis=1)
    if good.all():
        return chosen_w, chosen_h, good
    clipped = np.clip(w / h, image.ratio[0], image.ratio[1])
    whole_w, whole_h = np.minimum(w, h * clipped), np.minimum(h, w / clipped)
    return np.where(good, chosen_w, whole_w), np.where(good, chosen_h, whole_h), good


def _tries(image: Image, h: _F64, w: _F64, drawn: _F64) -> tuple[_F64, _F64]:
    """Widths and heights of rectangles of a drawn area and ratio: f64[N, tries] each of uniforms f64[N, 2 * tries]."""
    area = (h * w)[:, None] * (image.scale[0] + drawn[:, 0::2] * (image.scale[1] - image.scale[0]))
    ratio = _ratios(image, drawn[:, 1::2])
    return np.sqrt(area * ratio), np.sqrt(area / ratio)


def _ratios(image: Image, drawn: _F64) -> _F64:
    """Width over height, log-uniform in `image.ratio`, of uniforms of any shape."""
    low, high = math.log(image.ratio[0]), math.log(image.ratio[1])
    return np.exp(low + drawn * (high - low))
