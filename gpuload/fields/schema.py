"""What each column is: an Arrow schema and the transforms enter; the role, dtype and shape of every column leave."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from gpuload.errors import ConfigError
from gpuload.fields.columns import has_tensor, storage_type
from gpuload.images.decode.header import sniff
from gpuload.images.transform import Image, Text

Role = Literal["image", "text", "tensor", "list"]


@dataclass(frozen=True)
class Column:
    """One output column.

    Attributes
    ----------
    role : {"image", "text", "tensor", "list"}
        Decoded pixels; token ids and mask; an owned tensor; a list of Python values.
    transform : Image, Text or None
    form : str
        dtype and shape of a batch in words, B rows.
    """

    name: str
    type: pa.DataType
    role: Role
    transform: Image | Text | None
    form: str


def resolve(
    schema: pa.Schema, transforms: Mapping[str, Image | Text], first_value: Callable[[str], Any]
) -> list[Column]:
    """The role of every column of `schema`.

    Parameters
    ----------
    schema : pa.Schema
        With the dataset's metadata.
    transforms : mapping
        Column name → `Image` or `Text`.
    first_value : callable
        Name → first value that is not null as an Arrow scalar, or None. Asked for binary columns only.

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
        if not isinstance(transform, (Image, Text)):
            raise ConfigError(f"Expected gpuload.Image or gpuload.Text for column {name!r}, got {transform!r}.")
        mask = f"{name}_mask"
        if isinstance(transform, Text) and mask in schema.names:
            raise ConfigError(f"Expected the name {mask!r} free for an attention mask; rename that column.")
    features = _features(schema)
    return [_column(field, transforms.get(field.name), features, first_value) for field in schema]


def _column(
    field: pa.Field, transform: Image | Text | None, features: Mapping[str, Any], first_value: Callable[[str], Any]
) -> Column:
    kind = field.type
    if isinstance(transform, Text):
        if not _is_text(kind):
            raise ConfigError(f"Expected a string column for Text, got {field.name!r} of type {kind}.")
        length = transform.max_length if transform.padding == "max_length" else "L"
        return Column(field.name, kind, "text", transform, f"int64[B, {length}] and {field.name}_mask")
    if isinstance(transform, Image):
        if not _is_encoded(kind):
            raise ConfigError(f"Expected a binary or struct<bytes, path> column for Image, got {field.name!r}: {kind}.")
        return Column(field.name, kind, "image", transform, _image_form(transform))
    if _is_image(field, features, first_value):
        return Column(field.name, kind, "image", None, "uint8[B, 3, H, W], a list where sizes differ")
    if has_tensor(kind):
        return Column(field.name, kind, "tensor", None, _tensor_form(kind))
    return Column(field.name, kind, "list", None, "list[str]" if _is_text(kind) else "list")


def _image_form(image: Image) -> str:
    dtype = str(image.dtype).removeprefix("torch.")
    if image.shape is None:
        return f"{dtype}[B, {image.channels}, H, W], a list where sizes differ"
    return f"{dtype}[B, {', '.join(map(str, image.shape))}]" + (" channels_last" if image.channels_last else "")


def _tensor_form(kind: pa.DataType) -> str:
    shape: list[int] = []
    if isinstance(kind, pa.FixedShapeTensorType):
        order = kind.permutation or range(len(kind.shape))
        shape, kind = [kind.shape[i] for i in order], kind.value_type
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    name = "bfloat16" if isinstance(kind, pa.BaseExtensionType) else {"uint64": "int64"}.get(str(kind), str(kind))
    name = {"float": "float32", "double": "float64", "halffloat": "float16"}.get(name, name)
    return f"{name}[{', '.join(['B', *map(str, shape)])}]"


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """Hugging Face's own description of the columns, from the schema metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(raw)["info"]["features"] if raw else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_encoded(kind: pa.DataType) -> bool:
    kind = storage_type(kind)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_image(field: pa.Field, features: Mapping[str, Any], first_value: Callable[[str], Any]) -> bool:
    """Declared by Hugging Face or Lance, of Hugging Face's shape, or bytes that start like an image."""
    if not _is_encoded(field.type):
        return False
    feature = features.get(field.name)
    if isinstance(feature, dict) and "_type" in feature:
        return bool(feature["_type"] == "Image")
    if getattr(field.type, "extension_name", "") == "lance.arrow.encoded_image":
        return True
    kind = storage_type(field.type)
    if pa.types.is_struct(kind):
        return {f.name for f in kind} == {"bytes", "path"}
    value = first_value(field.name)
    return value is not None and sniff((value.value if hasattr(value, "value") else value).as_py()[:16]) is not None
