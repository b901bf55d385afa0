"""Arrow's values as Python's: a column enters, a list leaves; what Python cannot hold is an error of its row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gpuload.errors import RowError


def to_python(column: pa.ChunkedArray, refused: type[RowError] = RowError) -> tuple[list[Any], dict[int, RowError]]:
    """The values, None for a null and for one that cannot be had, and why not, by index: bytes that are no UTF-8, a
    date after the year 9999."""
    try:
        return column.to_pylist(), {}
    except (ValueError, ArithmeticError, LookupError):
        pass
    values, errors = list[Any](), dict[int, RowError]()
    for i, scalar in enumerate(column):
        try:
            values.append(scalar.as_py())
        except (ValueError, ArithmeticError, LookupError) as error:
            errors[i] = refused(f"Expected a value of type {column.type} that Python can hold, got: {error}")
            values.append(None)
    return values, errors


def pick(column: pa.ChunkedArray, at: NDArray[np.float64] | None) -> pa.ChunkedArray:
    """One value of every list.

    Parameters
    ----------
    column : list, large_list or fixed_size_list, of N rows
    at : f64[N] or None
        Where in the list, from 0 to below 1, nulls inside it not counted; None for the first.

    Returns
    -------
    ChunkedArray [N]
        Null where the list is null, empty or of nulls alone.
    """
    rows = column.combine_chunks()
    if isinstance(rows, pa.ChunkedArray):  # no chunk at all
        return pa.chunked_array([], column.type.value_type)
    found = pc.list_flatten(rows)
    lengths = pc.fill_null(pc.list_value_length(rows), 0).to_numpy(zero_copy_only=False)
    there = found.is_valid().to_numpy(zero_copy_only=False)  # bool[values]
    counts = np.bincount(np.repeat(np.arange(len(rows)), lengths)[there], minlength=len(rows))  # i64[N]
    place = np.cumsum(counts) - counts
    if at is not None:
        place = place + np.minimum((at * counts).astype(np.int64), np.maximum(counts - 1, 0))
    return pa.chunked_array([found.filter(pa.array(there)).take(pa.array(place, mask=counts == 0))])
