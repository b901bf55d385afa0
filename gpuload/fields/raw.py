"""Bytes on request: a binary column, or one of images, enters; a list of `bytes` leaves, whatever they may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from gpuload.errors import ConfigError
from gpuload.fields import Column, Fails, Field, Geometry, Known, Parts, Taken
from gpuload.images import encoded
from gpuload.images.encoded import is_encoded
from gpuload.order.draws import Draws
from gpuload.tables import Selection


class RawField:
    """A column as a list of B `bytes`, None for a null: ``transforms={"image": bytes}``."""

    transform: type | None = None  # `bytes` itself is the word, and not an object of that type

    def __init__(self, column: Column) -> None:
        self.columns, self._name = [column], column.name

    @classmethod
    def column(cls, field: pa.Field, transform: Any, known: Known) -> Column | None:
        if transform is not bytes:
            return None
        if not is_encoded(field.type):
            got = f"{field.name!r}: {field.type}"
            raise ConfigError(f"Expected a binary or struct<bytes, path> column for bytes, got {got}.")
        return Column(field.name, field.type, "list", "list[bytes]", transform, cls.make)

    @classmethod
    def make(cls, columns: list[Column], parts: Parts) -> list[Field]:
        return [cls(column) for column in columns]

    def take(self, rows: Selection, draws: Draws, geometry: Mapping[str, Geometry]) -> Taken:
        found, errors, read = encoded.from_arrow(rows.table.column(self._name), rows.index)
        views = [found.view(i) for i in range(len(found))]
        values = [None if view is None else view.tobytes() for view in views]
        fails: Fails = [(i, self._name, error) for i, error in errors.items()]
        return Taken({self._name: values}, fails=fails, read=read)
