"""What each column is: an Arrow schema and the transforms enter; the columns and their fields leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import pyarrow as pa

from gpuload.errors import ConfigError
from gpuload.fields import Column, Field, Known, Parts
from gpuload.fields.boxes import Boxes, BoxesField
from gpuload.fields.bytes import BytesField
from gpuload.fields.image import ImageField
from gpuload.fields.lists import ListField
from gpuload.fields.mask import Mask, MaskField
from gpuload.fields.numbers import NumberField
from gpuload.fields.text import Text, TextField
from gpuload.images.transform import Image
from gpuload.tables.projection import near

Transform: TypeAlias = Image | Text | Boxes | Mask  # what a user may ask of a column
# the first that takes a column has it
FIELDS = (TextField, BoxesField, MaskField, BytesField, ImageField, NumberField, ListField)
_TRANSFORMS = tuple(kind.transform for kind in FIELDS if kind.transform is not None)


def resolve(
    schema: pa.Schema,
    transforms: Mapping[str, Any],
    first_value: Callable[[str], Any],
    formats: tuple[str, ...] = (),
) -> list[Column]:
    """What every column of `schema` becomes.

    Parameters
    ----------
    schema : pa.Schema
        With the dataset's metadata.
    transforms : mapping
        Column name → `Image`, `Text`, `Boxes` or `Mask`.
    first_value : callable
        Name → first value that is not null as an Arrow scalar, or None. Asked for binary columns only.
    formats : tuple of str
        Kinds of images that somebody else will decode; images then stay encoded.

    Raises
    ------
    ConfigError
        A transform for a column that is not read, or of a type it cannot be used on.
    """
    for name, transform in transforms.items():
        if name not in schema.names:
            hint = near(name, schema.names)
            raise ConfigError(f"Expected transforms for the columns read, {schema.names}; got {name!r}.{hint}")
        if not isinstance(transform, _TRANSFORMS):
            *some, last = sorted(f"gpuload.{kind.__name__}" for kind in _TRANSFORMS)
            words = f"{', '.join(some)} or {last}"
            raise ConfigError(f"Expected {words} for column {name!r}, got {transform!r}.")
    known = Known(tuple(schema.names), _features(schema), first_value, formats)
    columns = [_column(field, transforms.get(field.name), known) for field in schema]
    images = [column.name for column in columns if column.role == "image"]
    for column in columns:
        if column.follows and column.follows not in images:
            raise ConfigError(
                f"Expected a column of images, one of {images}, for {column.name!r} to move with, got "
                f"{column.follows!r}.{near(column.follows, images)}"
            )
    return columns


def fields(columns: list[Column], parts: Parts) -> list[Field]:
    """The fields that make these columns."""
    groups: dict[Any, list[Column]] = {}
    for column in columns:
        groups.setdefault(column.make, []).append(column)
    made = [field for make, group in groups.items() for field in make(group, parts)]
    return sorted(made, key=lambda field: any(column.follows for column in field.columns))  # behind what they follow


def _column(field: pa.Field, transform: Any, known: Known) -> Column:
    found = (kind.column(field, transform, known) for kind in FIELDS)
    return next(column for column in found if column is not None)


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """Hugging Face's own description of the columns, from the schema metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(raw)["info"]["features"] if raw else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}
