"""Bytes, no copies: an Arrow column enters; byte views, strings, an owned tensor or Python values leave."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

Views = list[NDArray[np.uint8] | None]

_OFFSETS = {pa.binary(): np.int32, pa.string(): np.int32, pa.large_binary(): np.int64, pa.large_string(): np.int64}


def byte_views(column: pa.ChunkedArray) -> Views:
    """A read-only view u8[length] of every value, None for a null; no byte is copied.

    The views keep the Arrow buffers alive. `column` is binary, large_binary or a string of either width; other
    binary types are cast, which copies.
    """
    views: Views = []
    for chunk in column.chunks:
        array = storage(chunk)
        if array.type not in _OFFSETS:
            array = array.cast(pa.large_binary())
        _, offsets, data = array.buffers()
        if offsets is None or not len(array):
            views.extend([None] * len(array))
            continue
        ends = np.frombuffer(offsets, _OFFSETS[array.type])[array.offset : array.offset + len(array) + 1].tolist()
        payload = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
        here: Views = [payload[a:b] for a, b in itertools.pairwise(ends)]
        if array.null_count:
            here = [view if ok else None for view, ok in zip(here, array.is_valid().to_pylist(), strict=True)]
        views.extend(here)
    return views


def image_bytes(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[str | None] | None]:
    """(the binary column, the paths beside it if there are any) of an image column of any stored form."""
    chunks = [storage(chunk) for chunk in column.chunks]
    kind = storage_type(column.type)
    plain = pa.chunked_array(chunks, kind)
    if not pa.types.is_struct(kind):
        return plain, None
    data = pc.struct_field(plain, "bytes")
    if kind.get_field_index("path") < 0 or not data.null_count:
        return data, None
    return data, pc.struct_field(plain, "path").to_pylist()


def strings(column: pa.ChunkedArray) -> list[str | None]:
    """The texts of a string column, plain or dictionary-encoded."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    texts: list[str | None] = column.to_pylist()
    return texts


def has_tensor(kind: pa.DataType) -> bool:
    """Whether `to_tensor` knows the type."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return has_tensor(kind.value_type)
    if _is_bfloat16(kind):
        return True
    if pa.types.is_fixed_size_list(kind):
        return has_tensor(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def to_tensor(column: pa.ChunkedArray) -> tuple[torch.Tensor, NDArray[np.bool_] | None]:
    """An owned, writable tensor whose dtype follows from the Arrow type alone.

    Parameters
    ----------
    column : integer, floating (bfloat16 too), bool, or fixed-size lists of these, nested ones and tensors included

    Returns
    -------
    tensor : Tensor[B, ...]
        uint64 becomes int64. A null is NaN in a floating tensor, 0 or False in another.
    nulls : bool[B] or None
        Rows that are null or hold a null and had to become 0 or False; None where there are none.
    """
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ChunkedArray):  # no chunk at all
        array = pa.array([], column.type)
    tensor, null = _values(array)
    if null is None:
        return tensor, None
    if tensor.is_floating_point():
        tensor[torch.from_numpy(null)] = float("nan")
        return tensor, None
    tensor.numpy()[null] = 0  # torch's own masked_fill does not know uint16, uint32 and uint64
    return tensor, np.asarray(null.reshape(len(null), -1).any(axis=1), np.bool_)


def storage(array: pa.Array) -> pa.Array:
    """The array below an extension type."""
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def storage_type(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_bfloat16(kind: pa.DataType) -> bool:
    return getattr(kind, "extension_name", None) == "lance.bfloat16"


def _values(array: pa.Array) -> tuple[torch.Tensor, NDArray[np.bool_] | None]:
    """(owned values with anything at all under the nulls, bool mask of the nulls or None), both [B, ...]."""
    kind = array.type
    if isinstance(kind, pa.FixedShapeTensorType):
        tensor, null = _values(array.storage)
        return _permuted(tensor, kind), None if null is None else _permuted(torch.from_numpy(null), kind).numpy()
    if pa.types.is_fixed_size_list(kind):
        return _list_values(array)
    null = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
    if _is_bfloat16(kind):
        raw = np.frombuffer(array.storage.buffers()[1], np.int16)[array.storage.offset :][: len(array)]
        return torch.from_numpy(raw.copy()).view(torch.bfloat16), null
    if pa.types.is_boolean(kind):
        array = array.cast(pa.uint8()) if null is None else array.fill_null(False).cast(pa.uint8())
        return torch.from_numpy(array.to_numpy(zero_copy_only=False).astype(np.bool_)), null
    dtype = np.dtype(kind.to_pandas_dtype())
    data = array.buffers()[1]
    if data is None:
        return torch.zeros(len(array), dtype=torch.from_numpy(np.empty(0, dtype)).dtype), null
    raw = np.frombuffer(data, dtype)[array.offset : array.offset + len(array)]
    return torch.from_numpy(raw.astype(np.int64) if dtype == np.uint64 else raw.copy()), null


def _list_values(array: pa.Array) -> tuple[torch.Tensor, NDArray[np.bool_] | None]:
    size = array.type.list_size
    inner = array.values.slice(array.offset * size, len(array) * size)
    tensor, null = _values(inner)
    tensor = tensor.reshape(len(array), size, *tensor.shape[1:])
    if null is not None:
        null = null.reshape(tensor.shape)
    if array.null_count:
        rows = array.is_null().to_numpy(zero_copy_only=False)
        null = np.zeros(tuple(tensor.shape), np.bool_) if null is None else null
        null[rows] = True
    return tensor, null


def _permuted(tensor: torch.Tensor, kind: Any) -> torch.Tensor:
    """Stored order to logical order: logical dimension i is stored dimension ``permutation[i]`` (Arrow's columnar
    specification, canonical extension arrow.fixed_shape_tensor)."""
    tensor = tensor.reshape(len(tensor), *kind.shape)
    if kind.permutation is None:
        return tensor
    return tensor.permute(0, *[1 + p for p in kind.permutation]).contiguous()
