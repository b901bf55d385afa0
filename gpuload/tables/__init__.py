"""Rows exist: a URI or an opened dataset enters; rows, a schema, reads, small columns and a fingerprint leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuload.order import Ranges

_SCAN_RUN = 4  # mean rows per run from which take_scan is the faster: 0.63 of take at 1, 0.98 at 2, 1.37 at 4, 1.7 at 8


class Table(Protocol):
    """Where rows come from: a pinned version of some rows and columns, the same whenever and wherever it is read.

    An index is the place of a row among those that are used, 0 to `rows`-1; a position is its place in what is stored.
    """

    @property
    def uri(self) -> str:
        """Where it is stored."""

    @property
    def version(self) -> int: ...

    @property
    def rows(self) -> int:
        """Rows that are used."""

    @property
    def stored(self) -> int:
        """Positions: rows that are stored, used or not."""

    @property
    def fragments(self) -> NDArray[np.int64]:
        """How many of them lie in each fragment, i64[F]; their sum is `rows`."""

    @property
    def schema(self) -> pa.Schema:
        """Of the tables that are read."""

    def read(self, ranges: Ranges) -> pa.Table:
        """The rows at these indices, in order; columns may come in several chunks."""

    def positions(self, ranges: Ranges) -> NDArray[np.int64]:
        """The positions of the rows at these indices, in order: i64[sum of lengths]."""

    def small(self, column: str) -> NDArray[Any]:
        """The values of a column of numbers for all rows that are used: its own dtype, [rows]."""

    def origin(self, column: str) -> str:
        """The stored column or the expression that an output column is; equal for two that are the same."""

    def fingerprint(self) -> str:
        """Names these rows wherever they are stored."""


@dataclass(frozen=True)
class Selection:
    """The rows of one batch in a table that may hold those of several.

    Attributes
    ----------
    table : pa.Table
    index : i64[B] or None
        Where in `table` the batch's rows are, in its order; None for all of them as they are.
    bucket : (int, int) or None
        Height and width of the batch's images, where its cut decides them.
    """

    table: pa.Table
    index: NDArray[np.int64] | None = None
    bucket: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """B, the number of rows."""
        return len(self.table) if self.index is None else len(self.index)

    @property
    def nbytes(self) -> int:
        """Bytes of the table, divided among the batches that share it."""
        return int(self.table.nbytes * self.size // max(1, len(self.table)))

    def column(self, name: str) -> pa.ChunkedArray:
        """The batch's values of a column; copied where the table is shared."""
        column = self.table.column(name)
        return column if self.index is None else column.take(pa.array(self.index))

    def head(self, rows: int) -> pa.Table:
        """The first `rows` rows as a table of their own."""
        return self.table.slice(0, rows) if self.index is None else self.table.take(pa.array(self.index[:rows]))


def scattered(ranges: Ranges) -> bool:
    """Whether so few neighbours are among the rows that they are taken one by one and not scanned."""
    return size(ranges) < max(_SCAN_RUN * len(ranges), 1)


def size(ranges: Ranges) -> int:
    """How many rows half-open ranges have."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def one_batch(table: pa.Table, limit: int = 2**31 - 1) -> pa.RecordBatch:
    """All rows of a table as one RecordBatch, its chunks joined.

    A column in chunks with more than `limit` bytes becomes its large type, inside structs and lists too: the offsets of
    ``binary`` end at 2 GiB. An extension type gives way to what it is stored as then.
    """
    arrays = [_joined(column, limit) for column in table.columns]
    fields = [field.with_type(array.type) for field, array in zip(table.schema, arrays, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields, metadata=table.schema.metadata))


def _joined(column: pa.ChunkedArray, limit: int) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    if column.nbytes > limit:
        stored = column.type.storage_type if isinstance(column.type, pa.BaseExtensionType) else column.type
        large = _large(stored)
        if large != stored:
            chunks = [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in column.chunks]
            column = pa.chunked_array(chunks, stored).cast(large)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _large(kind: pa.DataType) -> pa.DataType:
    """The same type with offsets of 64 bits."""
    if pa.types.is_binary(kind):
        return pa.large_binary()
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_large(kind.value_type)))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_large(kind.value_type)), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_large(field.type)) for field in kind])
    return kind
