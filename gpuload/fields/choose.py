"""What each column is: an Arrow schema and the transforms enter; the columns and their fields leave."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa

from gpuload.errors import ConfigError
from gpuload.fields import Column, Field, Known, Parts
from gpuload.fields.bytes import BytesField
from gpuload.fields.image import ImageField
from gpuload.fields.lists import ListField
from gpuload.fields.numbers import NumberField
from gpuload.fields.raw import RawField
from gpuload.fields.text import TextField

FIELDS = (TextField, RawField, BytesField, ImageField, NumberField, ListField)  # the first that takes a column has it
_TRANSFORMS = tuple(kind.transform for kind in FIELDS if kind.transform is not None)


def resolve(
    schema: pa.Schema,
    transforms: Mapping[str, Any],
    values: Callable[[str], Iterable[Any]],
    formats: tuple[str, ...] = (),
) -> list[Column]:
    """What every column of `schema` becomes.

    Parameters
    ----------
    schema : pa.Schema
        With the dataset's metadata.
    transforms : mapping
        Column name → `Image`, `Text`, or the type `bytes` for a column as it is.
    values : callable
        Name → values that are not null, as Arrow scalars. Asked for binary columns only.
    formats : tuple of str
        Kinds of images that somebody else will decode; images then stay encoded.

    Raises
    ------
    ConfigError
        A transform for a column that is not read, or of a type it cannot be used on.
    """
    for name, transform in transforms.items():
        if name not in schema.names:
            near = difflib.get_close_matches(name, schema.names, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"Expected transforms for the columns read, {schema.names}; got {name!r}.{hint}")
        if transform is not bytes and not isinstance(transform, _TRANSFORMS):
            words = " or ".join(f"gpuload.{kind.__name__}" for kind in reversed(_TRANSFORMS))
            raise ConfigError(
                f"Expected {words} for column {name!r}, got {transform!r}. The type bytes leaves files as they are."
            )
    known = Known(tuple(schema.names), _features(schema), values, formats)
    return [_column(field, transforms.get(field.name), known) for field in schema]


def fields(columns: list[Column], parts: Parts) -> list[Field]:
    """The fields that make these columns."""
    groups: dict[Any, list[Column]] = {}
    for column in columns:
        groups.setdefault(column.make, []).append(column)
    return [field for make, group in groups.items() for field in make(group, parts)]


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
