"""A table of chunks enters, one RecordBatch leaves."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from gpuload.errors import ConfigError

_MOST = 2**31 - 1  # bytes behind the 32-bit offsets of `binary` and `string`


def joined(table: pa.Table) -> pa.RecordBatch:
    """All rows of `table` in one RecordBatch.

    Raises
    ------
    ConfigError
        A column holds more than its offsets can count: Arrow would make several batches of it.
    """
    if table.nbytes > _MOST:
        for name, column in zip(table.schema.names, table.columns, strict=True):
            if pa.types.is_binary(column.type) or pa.types.is_string(column.type):
                size = pc.sum(pc.binary_length(column).cast(pa.int64())).as_py() or 0
                if size > _MOST:
                    raise _too_large(table, f"{size:,} bytes in column `{name}` ({column.type})")
    if not len(table):
        return pa.RecordBatch.from_pylist([], schema=table.schema)
    try:
        batches = table.combine_chunks().to_batches()
    except pa.ArrowInvalid as error:  # a list of more elements than its offsets count
        raise _too_large(table, str(error)) from error
    if len(batches) > 1:
        raise _too_large(table, f"{table.nbytes:,} bytes")
    return batches[0]


def _too_large(table: pa.Table, got: str) -> ConfigError:
    return ConfigError(
        f"Expected at most 2 GiB of a column in one RecordBatch, got {got} in {len(table)} rows. "
        "Use a smaller batch_size, or store the column as large_binary or large_string."
    )
