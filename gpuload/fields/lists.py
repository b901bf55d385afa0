"""Anything else that Lance can store: an Arrow column enters, a list of Python values leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from gpuload.fields import Column, Field, Geometry, Known, Parts, Taken, is_text
from gpuload.order.draws import Draws
from gpuload.tables import Selection


class ListField:
    """Columns of any type, as ``list`` of B values."""

    transform: type | None = None

    def __init__(self, columns: list[Column]) -> None:
        self.columns = columns

    @classmethod
    def column(cls, field: pa.Field, transform: Any, known: Known) -> Column | None:
        form = "list[str]" if is_text(field.type) else "list"
        return Column(field.name, field.type, "list", form, None, cls.make)

    @classmethod
    def make(cls, columns: list[Column], parts: Parts) -> list[Field]:
        return [cls(columns)]

    def take(self, rows: Selection, draws: Draws, geometry: Mapping[str, Geometry]) -> Taken:
        return Taken({column.name: rows.column(column.name).to_pylist() for column in self.columns})
