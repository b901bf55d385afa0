"""Images that stay encoded, for who decodes elsewhere: u8[n] views leave, and the errors that headers give away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from gpuload.errors import DecodeError
from gpuload.fields import Column, Fails, Field, Geometry, Known, Parts, Taken
from gpuload.fields.image import is_image
from gpuload.images import KINDS, Encoded, encoded, headers, pillow
from gpuload.order.draws import Draws
from gpuload.tables import Selection

_WITH_END = ("JPEG", "PNG")


class BytesField:
    """A column of images as a list of B read-only u8[n] arrays, views of Arrow's memory; None for a broken one.

    `formats` are what the later decoder reads, in the words of `KINDS`; everything else falls under the policy.
    """

    transform: type | None = None

    def __init__(self, column: Column, max_pixels: int) -> None:
        self.columns, self._name, self._max_pixels = [column], column.name, max_pixels
        self._formats: tuple[str, ...] = column.ready

    @classmethod
    def column(cls, field: pa.Field, transform: Any, known: Known) -> Column | None:
        if not known.formats or not is_image(field, known):
            return None
        return Column(field.name, field.type, "bytes", "list of uint8[n]", None, cls.make, ready=known.formats)

    @classmethod
    def make(cls, columns: list[Column], parts: Parts) -> list[Field]:
        return [cls(column, parts.max_pixels) for column in columns]

    def take(self, rows: Selection, draws: Draws, geometry: Mapping[str, Geometry]) -> Taken:
        found, errors, read = encoded.from_arrow(rows.table.column(self._name), rows.index)
        self._judge(found, errors)
        values = [None if i in errors else found.view(i) for i in range(len(found))]
        fails: Fails = [(i, self._name, error) for i, error in errors.items()]
        return Taken({self._name: values}, fails=fails, read=read, refused=len(errors))

    def _judge(self, found: Encoded, errors: dict[int, DecodeError]) -> None:
        table = headers.read(found)
        headers.judge(found, table, self._max_pixels, errors)
        columns = (column.tolist() for column in (table["kind"], table["end"], found.size))
        for i, (kind, end, size) in enumerate(zip(*columns, strict=True)):
            if i in errors:
                continue
            if KINDS[kind] not in self._formats:
                first = bytes(found.view(i)[:4]).hex()  # type: ignore[index]
                got = f"a {KINDS[kind]} file" if kind else f"{size} bytes starting {first}"
                errors[i] = DecodeError(f"Expected an image as {', '.join(self._formats)}, got {got}")
            elif KINDS[kind] in _WITH_END and not end:
                what = f"a whole {KINDS[kind]} file"
                errors[i] = DecodeError(f"Expected {what}, got {size} bytes without its end marker")
        pillow.open_rest(found, table, self._max_pixels, errors)
        found.opened.clear()
