"""Masks: encoded label images enter, i64 labels of the output's pixels leave; they move with the image they name."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from gpuload.device import threads_here
from gpuload.errors import ConfigError, DecodeError, expect
from gpuload.fields import Column, Fails, Field, Geometry, Known, Parts, Taken, stacked
from gpuload.images import Encoded, encoded, headers, pillow
from gpuload.images.decode import room
from gpuload.images.encoded import is_encoded
from gpuload.order.draws import Draws
from gpuload.tables import Selection

_NEAR = 0.02  # of a side: how far a mask's shape may be from its image's, for one that is a part of its size, rounded


@dataclass(frozen=True)
class Mask:
    """A column of encoded label images moves with the pixels of a column of images: the same region and flip.

    Labels are what the file stores: indices of a palette, gray levels of 1, 8 or 16 bits. Every output pixel has the
    label of the nearest stored one.

    Parameters
    ----------
    of : str
        The column of images.

    It becomes i64[B, H, W] of the image's output size, or i64[B, V, H, W] with V > 1 views; where every image keeps its
    own size, a list of B i64[h, w], stacked where all agree. A mask may be smaller or larger than its image, of the
    same shape. Its own EXIF orientation is applied; without one, that of its image is, unless it has the image's shape
    only as it lies. With ``Image(orient=False)`` neither is.
    """

    of: str

    def __post_init__(self) -> None:
        expect(isinstance(self.of, str) and bool(self.of), 'Mask("name of a column of images")', self.of)


class MaskField:
    """One column of masks."""

    transform: type | None = Mask

    def __init__(self, column: Column, parts: Parts) -> None:
        self.columns, self._name, self._parts = [column], column.name, parts
        self._of: str = column.transform.of
        # the host decodes while the GPU decodes images; slices run on threads of their own elsewhere
        cuda = parts.streams.cuda
        self._pool = ThreadPoolExecutor(threads_here(), "gpuload-mask") if cuda else None

    @classmethod
    def column(cls, field: pa.Field, transform: Any, known: Known) -> Column | None:
        if not isinstance(transform, Mask):
            return None
        if not is_encoded(field.type):
            got = f"{field.name!r}: {field.type}"
            raise ConfigError(f"Expected a binary or struct<bytes, path> column for Mask, got {got}.")
        return Column(field.name, field.type, "mask", "int64[B, H, W]", transform, cls.make, follows=transform.of)

    @classmethod
    def make(cls, columns: list[Column], parts: Parts) -> list[Field]:
        return [cls(column, parts) for column in columns]

    def take(self, rows: Selection, draws: Draws, geometry: Mapping[str, Geometry]) -> Taken:
        found, errors, read = encoded.from_arrow(rows.table.column(self._name), rows.index)
        table = headers.read(found)
        headers.judge(found, table, self._parts.max_pixels, errors)
        fails: Fails = [(i, self._name, error) for i, error in errors.items()]
        work = _Work(self._name, found, table, set(errors), geometry[self._of], self._parts, self._pool)
        return Taken(fails=fails, work=work, read=read, refused=len(errors))


class _Work:
    """The masks of one batch."""

    def __init__(
        self,
        name: str,
        found: Encoded,
        table: NDArray[np.void],
        refused: set[int],
        seen: Geometry,
        parts: Parts,
        pool: ThreadPoolExecutor | None,
    ) -> None:
        self._name, self._encoded, self._headers, self._refused = name, found, table, refused
        self._seen, self._parts, self._pool = seen, parts, pool
        self._lock, self._left = threading.Lock(), len(found)
        self._made: dict[str, Any] = {}
        if seen.size is not None:
            self._made[name] = torch.zeros((len(found), seen.count, *seen.size), dtype=torch.int64)
        self._own: list[torch.Tensor | None] = [None] * (0 if self._made else len(found))
        self.cost, self.room = found.size, room.decoding(table, found.size, None)
        self.size = sum(made.nbytes for made in self._made.values())

    def run(self, lo: int, hi: int) -> tuple[Fails, Any]:
        rows = [i for i in range(lo, hi) if i not in self._refused]
        done = (map if self._pool is None else self._pool.map)(self._one, rows)
        fails: Fails = [(i, self._name, error) for i, error in zip(rows, done, strict=True) if error is not None]
        with self._lock:
            self._left -= hi - lo
            last = not self._left
        if not last:
            return fails, None
        if self._seen.size is None:
            self._made[self._name] = stacked(self._own, torch.zeros((1, 1), dtype=torch.int64))
        return fails, self._parts.streams.upload(self._made)

    def finish(self) -> dict[str, Any]:
        if self._seen.size is not None and self._seen.count == 1:
            self._made[self._name] = self._made[self._name][:, 0]
        return self._made

    def _one(self, i: int) -> DecodeError | None:
        seen = self._seen
        height, width = seen.sizes[i].tolist()
        if not height:
            return None  # its image could not be read, which says enough
        try:
            labels, orientation = pillow.labels(self._encoded, i, self._headers[i], self._parts.max_pixels)
            labels = oriented(labels, orientation if seen.orient else None, int(seen.orientation[i]), height, width)
        except DecodeError as error:
            return error
        views = seen.views[i * seen.count : (i + 1) * seen.count]
        if seen.size is None:
            whole = labels if labels.shape == (height, width) else nearest(labels, (0, 0, width, height), seen.sizes[i])
            flipped = whole[:, ::-1] if views["flip"][0] else whole
            self._own[i] = torch.from_numpy(flipped.astype(np.int64))
            return None
        out = self._made[self._name][i].numpy()  # i64[V, H, W]
        scale = np.array([labels.shape[1] / width, labels.shape[0] / height] * 2)
        for k, view in enumerate(views):
            found = nearest(labels, view["region"] * scale, seen.size)
            out[k] = found[:, ::-1] if view["flip"] else found
        return None


def oriented(labels: NDArray[Any], own: int | None, orientation: int, height: int, width: int) -> NDArray[Any]:
    """A stored mask as a person sees it.

    Parameters
    ----------
    labels : [h, w]
    own : int or None
        Its EXIF orientation, None without one.
    orientation : int
        Of its image.
    height, width : int
        Of its image as a person sees it.

    Raises
    ------
    DecodeError
        It has another shape than the image.
    """
    turned = pillow.turn(labels, orientation if own is None else own)
    for found in (turned, labels) if own is None else (turned,):
        one, other = found.shape[0] * width, found.shape[1] * height  # equal for one shape
        if abs(one - other) <= _NEAR * max(one, other):
            return found
    got = f"{turned.shape[0]}x{turned.shape[1]}"
    raise DecodeError(f"Expected a mask of its image's shape, {height}x{width}, got {got}")


def nearest(labels: NDArray[Any], region: Any, size: Any) -> NDArray[Any]:
    """[H, W]: for the centre of every output pixel, the label of the pixel it lies in, 0 outside; `region` is x0, y0,
    width, height."""
    x0, y0, w, h = (float(v) for v in region)
    height, width = (int(v) for v in size)
    rows = np.floor(y0 + (np.arange(height) + 0.5) * (h / height)).astype(np.intp)
    columns = np.floor(x0 + (np.arange(width) + 0.5) * (w / width)).astype(np.intp)
    outside = (rows < 0) | (rows >= labels.shape[0]), (columns < 0) | (columns >= labels.shape[1])
    rows, columns = np.clip(rows, 0, labels.shape[0] - 1), np.clip(columns, 0, labels.shape[1] - 1)
    found: NDArray[Any] = labels[rows[:, None], columns]
    if outside[0].any() or outside[1].any():
        found[outside[0]], found[:, outside[1]] = 0, 0
    return found
