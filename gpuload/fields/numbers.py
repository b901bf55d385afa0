"""Numbers: integers, floats, bools and fixed-size lists of them enter; an owned, writable tensor leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from gpuload.errors import RowError
from gpuload.fields import Column, Fails, Field, Geometry, Known, Parts, Taken
from gpuload.order.draws import Draws
from gpuload.tables import Selection


class NumberField:
    """Columns of numbers, as ``Tensor[B, ...]``."""

    transform: type | None = None

    def __init__(self, columns: list[Column]) -> None:
        self.columns = columns

    @classmethod
    def column(cls, field: pa.Field, transform: Any, known: Known) -> Column | None:
        if not has_tensor(field.type):
            return None
        return Column(field.name, field.type, "tensor", _form(field.type), None, cls.make)

    @classmethod
    def make(cls, columns: list[Column], parts: Parts) -> list[Field]:
        return [cls(columns)]

    def take(self, rows: Selection, draws: Draws, geometry: Mapping[str, Geometry]) -> Taken:
        taken = Taken()
        for column in self.columns:
            tensor, nulls = to_tensor(rows.column(column.name))
            taken.values[column.name] = tensor
            if nulls is not None:
                taken.nulls[column.name] = nulls
            if _leaf(column.type) == pa.uint64():
                taken.fails += _too_large(column.name, tensor)
        return taken


def _too_large(name: str, tensor: torch.Tensor) -> Fails:
    """The rows of a uint64 column, as int64, that hold a number above 2^63 - 1; their values become 0."""
    if not tensor.numel() or int(tensor.min()) >= 0:
        return []
    fails: Fails = []
    for i in torch.nonzero((tensor < 0).reshape(len(tensor), -1).any(dim=1)).flatten().tolist():
        largest = int(tensor[i].reshape(-1).numpy().view(np.uint64).max())
        fails.append((i, name, RowError(f"Expected at most 2^63 - 1, which int64 holds, got {largest}")))
        tensor[i] = 0
    return fails


def _leaf(kind: pa.DataType) -> pa.DataType:
    """The type of the numbers in a tensor or in fixed-size lists."""
    while isinstance(kind, pa.FixedShapeTensorType) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


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
        uint64 becomes int64, and above 2^63 - 1 a negative number. A null is NaN in a floating tensor, 0 or False in
        another.
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


def _form(kind: pa.DataType) -> str:
    """dtype and shape of a batch, in words."""
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
