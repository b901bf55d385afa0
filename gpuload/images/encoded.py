"""Pointers: an Arrow column of images enters, `Encoded` leaves; no object an image, and no byte is copied."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gpuload import kernels  # type: ignore[attr-defined, unused-ignore]  # mypy cannot follow package-dir
from gpuload.errors import DecodeError
from gpuload.images import Encoded

_OFFSETS = {pa.binary(): np.int32, pa.string(): np.int32, pa.large_binary(): np.int64, pa.large_string(): np.int64}


def from_arrow(
    column: pa.ChunkedArray, index: NDArray[np.int64] | None = None
) -> tuple[Encoded, dict[int, DecodeError], int]:
    """The images of a column of any stored form.

    Parameters
    ----------
    column : binary, large_binary, another binary type (cast, which copies), struct<bytes, path>, or an extension of one
    index : i64[N], optional
        The values that are wanted; all by default.

    Returns
    -------
    encoded : Encoded
        Keeps the Arrow buffers alive.
    errors : dict of int to DecodeError
        Rows that hold only a path, to no file.
    read : int
        Bytes of the files that were read, because a row holds only their path: Hugging Face stores images that were
        made from files so. They are not in the column's own ``nbytes``.
    """
    at, size, owner = np.zeros(len(column), np.uint64), np.zeros(len(column), np.int64), list[Any]()
    paths: dict[int, str] = {}
    start = 0
    for chunk in column.chunks:
        array = storage(chunk)
        if pa.types.is_struct(array.type):
            paths |= _paths(array, start)
            array = pc.struct_field(array, "bytes")
        if array.type not in _OFFSETS:
            array = array.cast(pa.large_binary())
        stop = start + len(array)
        _point(array, at[start:stop], size[start:stop])
        owner.append(array)
        start = stop
    encoded = Encoded(at, size, owner)
    if index is not None:
        encoded = encoded.take(index)
        paths = {k: paths[i] for k, i in enumerate(index.tolist()) if i in paths} if paths else {}
    errors, read = _read_files(encoded, paths, owner) if paths else ({}, 0)
    return encoded, errors, read


def is_encoded(kind: pa.DataType) -> bool:
    """Whether an Arrow type can hold files: a binary one, or struct<bytes, ...>."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def storage(array: pa.Array) -> pa.Array:
    """The array below an extension type."""
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _point(array: pa.Array, at: NDArray[np.uint64], size: NDArray[np.int64]) -> None:
    """Address u64[n] and size i64[n] of every value of a binary array, address 0 for a null."""
    _, offsets, data = array.buffers()
    if offsets is None or not len(array):
        return
    dtype = _OFFSETS[array.type]
    base = data.address if data is not None and data.size else 1  # every value is empty then, and none of them a null
    library = kernels.tables_library()
    if library is None:
        ends = np.frombuffer(offsets, dtype)[array.offset : array.offset + len(array) + 1].astype(np.int64)
        at[:], size[:] = ends[:-1] + base, np.diff(ends)
    else:
        width = np.dtype(dtype).itemsize
        kernels.run_pointers(library, offsets.address + array.offset * width, width, base, at, size)
    if array.null_count:
        null = array.is_null().to_numpy(zero_copy_only=False)
        at[null] = size[null] = 0


def _paths(array: pa.Array, start: int) -> dict[int, str]:
    """Row → path, of the rows of struct<bytes, path> that have no bytes."""
    if array.type.get_field_index("path") < 0:
        return {}
    missing = pc.is_null(pc.struct_field(array, "bytes")).to_numpy(zero_copy_only=False).nonzero()[0]
    if not len(missing):
        return {}
    found = pc.struct_field(array, "path").take(pa.array(missing)).to_pylist()
    return {start + int(i): path for i, path in zip(missing, found, strict=True) if path}


def _read_files(encoded: Encoded, paths: dict[int, str], owner: list[Any]) -> tuple[dict[int, DecodeError], int]:
    errors, read = dict[int, DecodeError](), 0
    for i, path in paths.items():
        if not os.path.isfile(path):
            cause = f"Expected image bytes or an existing file, got no bytes and the path {path!r}"
            errors[i] = DecodeError(cause)
            continue
        data = np.fromfile(path, np.uint8)
        owner.append(data)
        encoded.at[i], encoded.size[i] = data.ctypes.data or 1, len(data)
        read += len(data)
    return errors, read
