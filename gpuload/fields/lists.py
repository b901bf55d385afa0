"""Anything else that Lance can store: an Arrow column enters, a list of Python values leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from gpuload.fields import Column, Field, Geometry, Known, Parts, Taken, is_text
from gpuload.fields.values import to_python
from gpuload.order.draws import Draws
from gpuload.tables import Selection


class ListField:
    """Columns of any type, as ``list`` of B values."""

    transform: type | None = None

    def __init__(self, columns: list[Column]) -> None:
        self.columns = columns

    @classmethod
    def column(cls, field: pa.Field, transform: Any, known: Known) -> Column | None:
        looked = known.looked.get(field.name)
        form = "list[str]" if is_text(field.type) else "list" if looked is None else "list[bytes]"
        if looked is not None and looked.count:
            form += f"; none of {looked.count} values looked at starts like an image"
        return Column(field.name, field.type, "list", form, None, cls.make)

    @classmethod
    def make(cls, columns: list[Column], parts: Parts) -> list[Field]:
        return [cls(columns)]

    def take(self, rows: Selection, draws: Draws, geometry: Mapping[str, Geometry]) -> Taken:
        taken = Taken()
        for column in self.columns:
            taken.values[column.name], errors = to_python(rows.column(column.name))
            taken.fails += [(i, column.name, error) for i, error in errors.items()]
        return taken
