"""Boxes: lists of four numbers enter, f32 boxes in pixels of the output leave; they move with the image they name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from gpuload.errors import ConfigError, RowError, expect, is_one_of
from gpuload.fields import Column, Field, Geometry, Known, Parts, Taken, storage_type
from gpuload.order.draws import Draws
from gpuload.tables import Selection

FORMATS = ("xyxy", "xywh", "cxcywh")
_F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Boxes:
    """A column of boxes moves with the pixels of a column of images: the same region, scale and flip.

    Every box stays, so that labels in other columns still fit: it is clipped to the output, and ``<name>_keep`` says
    whether it has area left there.

    Parameters
    ----------
    of : str
        The column of images.
    format : {"xyxy", "xywh", "cxcywh"}
        What the four numbers are, in pixels of the original image after its EXIF orientation: two corners; a corner,
        width and height; the centre, width and height. The output has the same format.
    pad : int, optional
        Boxes of every row: zeros fill up, with ``<name>_keep`` False. A row that has more is an error of that row.

    The column is ``list<list>`` or ``list<fixed_size_list[4]>`` of numbers; a null is a row without boxes. It becomes a
    list of B tensors f32[n, 4], and a list of B bool[n]; with V > 1 views, lists of B lists of V; with `pad`,
    f32[B, pad, 4] and bool[B, pad], or [B, V, pad, 4] and [B, V, pad].
    """

    of: str
    format: Literal["xyxy", "xywh", "cxcywh"] = "xyxy"
    pad: int | None = None

    def __post_init__(self) -> None:
        expect(isinstance(self.of, str) and bool(self.of), 'Boxes("name of a column of images")', self.of)
        expect(is_one_of(self.format, FORMATS), 'Boxes(format="xyxy"|"xywh"|"cxcywh")', self.format)
        good = self.pad is None or (isinstance(self.pad, int) and not isinstance(self.pad, bool) and self.pad > 0)
        expect(good, "Boxes(pad=...) as an int of at least 1, or None", self.pad)


class BoxesField:
    """One column of boxes."""

    transform: type | None = Boxes

    def __init__(self, column: Column) -> None:
        self.columns, self._name, self._boxes = [column], column.name, column.transform

    @classmethod
    def column(cls, field: pa.Field, transform: Any, known: Known) -> Column | None:
        if not isinstance(transform, Boxes):
            return None
        if not _is_boxes(field.type):
            got = f"{field.name!r}: {field.type}"
            raise ConfigError(
                f"Expected a list<list> or list<fixed_size_list[4]> column of numbers for Boxes, got {got}."
            )
        keep = f"{field.name}_keep"
        if keep in known.names:
            raise ConfigError(
                f"Expected no column {keep!r} beside Boxes for {field.name!r}, which writes it. Rename it."
            )
        form = "list of float32[n, 4]" if transform.pad is None else f"float32[B, {transform.pad}, 4]"
        return Column(field.name, field.type, "boxes", form, transform, cls.make, more=(keep,), follows=transform.of)

    @classmethod
    def make(cls, columns: list[Column], parts: Parts) -> list[Field]:
        return [cls(column) for column in columns]

    def take(self, rows: Selection, draws: Draws, geometry: Mapping[str, Geometry]) -> Taken:
        stored, counts, null, wrong = read(rows.column(self._name))
        most = self._boxes.pad
        if most is not None:
            for i in np.flatnonzero(counts > most).tolist():
                wrong.setdefault(i, f"Expected at most {most} boxes (pad={most}), got {counts[i]}")
        if wrong:  # rows that fail have no boxes
            good = ~np.isin(np.repeat(np.arange(len(counts)), counts), list(wrong))
            stored, counts = stored[good], counts.copy()
            counts[list(wrong)] = 0
        seen = geometry[self._boxes.of]
        boxes, keep = moved(stored, counts, seen, self._boxes.format)
        keep_name = f"{self._name}_keep"
        taken = Taken(fails=[(i, self._name, RowError(cause)) for i, cause in wrong.items()])
        taken.nulls = {self._name: null} if null.any() else {}
        if most is None:
            taken.values = {self._name: torch.from_numpy(boxes), keep_name: torch.from_numpy(keep)}
            split = functools.partial(_split, counts=counts.tolist(), views=seen.count)
            taken.last = {self._name: split, keep_name: split}
            return taken
        row = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        padded = np.zeros((len(counts), seen.count, most, 4), np.float32)
        padded_keep = np.zeros((len(counts), seen.count, most), np.bool_)
        padded[row, :, place], padded_keep[row, :, place] = boxes, keep
        if seen.count == 1:
            padded, padded_keep = padded[:, 0], padded_keep[:, 0]
        taken.values = {self._name: torch.from_numpy(padded), keep_name: torch.from_numpy(padded_keep)}
        return taken


def read(column: pa.ChunkedArray) -> tuple[_F64, NDArray[np.int64], NDArray[np.bool_], dict[int, str]]:
    """The boxes of all rows, one after the other.

    Returns
    -------
    boxes : f64[T, 4]
    counts : i64[B]
        How many each row has; 0 where it is null or wrong.
    null : bool[B]
    wrong : dict of int to str
        Row → why it has none: a box that is not four finite numbers.
    """
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ChunkedArray):  # no chunk at all
        array = pa.array([], column.type)
    null = array.is_null().to_numpy(zero_copy_only=False)
    counts = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    inner = pc.list_flatten(array)
    row = np.repeat(np.arange(len(array)), counts)
    lengths = pc.list_value_length(inner).fill_null(-1).to_numpy(zero_copy_only=False)
    wrong: dict[int, str] = {}
    for k in np.flatnonzero(lengths != 4).tolist():
        got = "a null" if lengths[k] < 0 else f"{lengths[k]} numbers"
        wrong.setdefault(int(row[k]), f"Expected boxes of 4 numbers, got one of {got}")
    if wrong:
        inner, row = inner.filter(pa.array(lengths == 4)), row[lengths == 4]
    # nulls become NaN; unsafe, as a number of more than 53 bits is rounded and no error
    flat = pc.list_flatten(inner).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    boxes = flat.reshape(-1, 4)
    finite = np.isfinite(boxes).all(axis=1)
    for k in np.flatnonzero(~finite).tolist():
        wrong.setdefault(int(row[k]), f"Expected boxes of 4 finite numbers, got {boxes[k].tolist()}")
    if wrong:
        good = ~np.isin(row, list(wrong))
        boxes, counts = boxes[good], np.bincount(row[good], minlength=len(counts)).astype(np.int64)
    return boxes, counts, null, wrong


def moved(
    boxes: _F64, counts: NDArray[np.int64], seen: Geometry, format: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes in pixels of the original images → of each view's output, clipped to it.

    Parameters
    ----------
    boxes : f64[T, 4]
        In `format`, one row's after the other's.
    counts : i64[B]
    seen : Geometry
    format : {"xyxy", "xywh", "cxcywh"}

    Returns
    -------
    boxes : f32[T, V, 4]
    keep : bool[T, V]
        Which have area left.
    """
    row = np.repeat(np.arange(len(counts)), counts)
    views = seen.views.reshape(-1, seen.count)[row]  # VIEW[T, V]
    region = views["region"]
    low, extent = region[..., :2], region[..., 2:]
    size = extent if seen.size is None else np.array(seen.size[::-1], np.float64)  # width, height of the output
    scale = size / extent
    with np.errstate(over="ignore"):  # infinite, and clipped below
        corners = _corners(boxes, format)[:, None]  # f64[T, 1, 4]
        first, last = (corners[..., :2] - low) * scale, (corners[..., 2:] - low) * scale
    width = np.broadcast_to(size, first.shape)[..., 0]
    mirrored = views["flip"]
    left = np.where(mirrored, width - last[..., 0], first[..., 0])
    right = np.where(mirrored, width - first[..., 0], last[..., 0])
    first[..., 0], last[..., 0] = left, right
    first, last = np.clip(first, 0, size), np.clip(last, 0, size)
    keep = ((last - first) > 0).all(axis=-1)
    last = np.maximum(first, last)
    if format == "xyxy":
        second = last
    else:
        second = last - first
        first = first + second / 2 if format == "cxcywh" else first
    return np.concatenate([first, second], axis=-1).astype(np.float32), keep


def _corners(boxes: _F64, format: str) -> _F64:
    if format == "xyxy":
        return boxes
    half = boxes[:, 2:] / 2
    first = boxes[:, :2] - half if format == "cxcywh" else boxes[:, :2]
    return np.concatenate([first, first + boxes[:, 2:]], axis=1)


def _split(values: torch.Tensor, counts: list[int], views: int) -> list[Any]:
    """[T, V, ...] → a list of rows, of each a tensor, or a list of V of them."""
    rows = torch.split(values, counts)
    return [row[:, 0] for row in rows] if views == 1 else [list(row.unbind(1)) for row in rows]


def _is_boxes(kind: pa.DataType) -> bool:
    for _ in range(2):
        kind = storage_type(kind)
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            return False
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
