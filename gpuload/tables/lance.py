"""Rows exist: a URI or an opened dataset enters, a pinned version with counts, positions and reads leaves.

The only file beside `ingest.py` that touches Lance. A position is the place of a row among the live rows of the
version, 0 to rows-1; an index is its place among the rows that the filter and the sample left. Without either they
are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lance
import lance.sampler as lance_sampler
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.hf import HuggingFaceConverter
from numpy.typing import NDArray

from gpuload.errors import ConfigError
from gpuload.order import Ranges, coalesce, expand
from gpuload.order.permutation import Permutation
from gpuload.tables import malloc, scattered
from gpuload.tables.fork import check_fork
from gpuload.tables.projection import Field, near, project
from gpuload.tables.write import write_stream


class LanceTable:
    """A pinned version of a Lance dataset, reduced to some columns and rows.

    Parameters
    ----------
    dataset : str, Path or lance.LanceDataset
    columns : list of str or dict of str to str, optional
        Names (``"a.b"`` for a field of a struct), or output name → SQL expression. All columns by default.
    filter : str, optional
        SQL condition; resolved once, here, without reading any other column.
    samples : int
        If above 0, keep this many rows, drawn with `seed`.
    with_row_id, with_row_address : bool
        Add the columns ``_rowid``, ``_rowaddr``.
    options : dict, optional
        Keywords of ``lance.dataset`` (version, storage_options, ...).

    Raises
    ------
    ConfigError
        No such dataset, unknown column, a filter or expression that Lance refuses.
    ForkError
        In a process forked after Lance was in use.
    """

    def __init__(
        self,
        dataset: str | Path | lance.LanceDataset,
        columns: Sequence[str] | dict[str, str] | None = None,
        filter: str | None = None,
        samples: int = 0,
        seed: int = 0,
        with_row_id: bool = False,
        with_row_address: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        check_fork()
        malloc.tune()
        self.lance = _open(dataset, options or {})
        self.uri, self.version = str(self.lance.uri), int(self.lance.version)
        extra = ["_rowid"] * with_row_id + ["_rowaddr"] * with_row_address
        self._fields: list[Field] = project(self.lance, columns, extra)
        self.schema = pa.schema([pa.field(f.name, f.type) for f in self._fields], metadata=self.lance.schema.metadata)
        self._expressions = {f.name: f.expression for f in self._fields if not f.blob}
        self._plain = all(f.path for f in self._fields)
        self._roots = list(dict.fromkeys(f.path[0] for f in self._fields if f.path and not f.blob))
        counts = [fragment.count_rows() for fragment in self.lance.get_fragments()]
        self._selected = self._select(filter, samples, seed, np.asarray(counts, np.int64))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if self._selected is not None:
            starts = np.searchsorted(self._selected, starts).astype(np.int64)
        self.fragments: NDArray[np.int64] = np.diff(starts)  # rows left in each fragment
        self.rows = int(starts[-1])
        self._cache: lance.LanceDataset | None = None
        self._fingerprint: str | None = None
        self._most_rows = sys.maxsize  # of a read; fewer once so many overflowed

    def positions(self, ranges: Ranges) -> NDArray[np.int64]:
        """Positions in the dataset of the rows at these indices, in order: i64[sum of lengths]."""
        index = expand(ranges)
        return index if self._selected is None else self._selected[index]

    def read(self, ranges: Ranges) -> pa.Table:
        """The rows at these indices, in order.

        A table and not one batch: where the rows come from several places its columns stay in chunks, because
        joining them would copy every image. What passes the 2 GiB that a chunk of ``binary`` can hold is read in parts.
        """
        index = expand(ranges)
        if len(index) <= self._most_rows:
            try:
                return self._read(ranges)
            except (OSError, pa.ArrowInvalid) as error:
                if "Offset overflow" not in str(error) or len(index) < 2:
                    raise
            self._most_rows = min(self._most_rows, len(index) // 2)
        half = len(index) // 2
        return pa.concat_tables([self.read(coalesce(index[:half])), self.read(coalesce(index[half:]))])

    def small(self, column: str) -> NDArray[Any]:
        """The values of a column for all rows that are used, in order: its own dtype, [rows].

        Parameters
        ----------
        column : str
            An output column, else a stored column (``"a.b"`` for a field of a struct) or an SQL expression.

        Raises
        ------
        ConfigError
            No such column, no column of numbers or bools, or a null in it.
        """
        names = [field.name for field in self._fields]
        field = self._fields[names.index(column)] if column in names else project(self.lance, {column: column}, [])[0]
        if not any(is_kind(field.type) for is_kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)):
            raise ConfigError(f"Expected a column of numbers, got column {column!r}, which is {field.type}.")
        if self._cache is not None and column in names:
            name = self._cache.schema.names[names.index(column)]
            values = self._cache.to_table(columns=[name]).column(0)
        else:
            values = self.lance.to_table(columns={"value": field.expression}).column(0)
            values = values if self._selected is None else values.take(pa.array(self._selected))
        if values.null_count:
            first = int(np.flatnonzero(values.is_null().to_numpy())[0])
            where = int(self.positions(np.array([[first, first + 1]]))[0])
            raise ConfigError(
                f"Expected column {column!r} without nulls, got {values.null_count}, first at position {where}."
            )
        found: NDArray[Any] = values.to_numpy()
        return found

    def origin(self, column: str) -> str:
        """The stored column or the expression that an output column is; equal for two that are the same.

        Raises
        ------
        ConfigError
            No such output column.
        """
        expressions = {field.name: field.expression for field in self._fields}
        if column not in expressions:
            raise ConfigError(
                f"Expected one of the columns {list(expressions)}, got {column!r}.{near(column, expressions)}"
            )
        return expressions[column]

    def _read(self, ranges: Ranges) -> pa.Table:
        if self._cache is not None:
            return _rows(self._cache, self._cache.schema.names, ranges).rename_columns(self.schema.names)
        if self._selected is not None:
            ranges = coalesce(self._selected[expand(ranges)])
        if self._plain:
            table = _rows(self.lance, self._roots, ranges) if self._roots else None
        else:
            table = take_rows(self.lance, self._expressions, ranges)
        columns = [self._column(f, table, ranges) for f in self._fields]
        return pa.table(columns, names=self.schema.names)

    def fingerprint(self) -> str:
        """Names this version's rows wherever the dataset is stored: a digest of its version and data files.

        Computed at the first call, 0.1 s for 1,500 fragments.
        """
        if self._fingerprint is None:
            files = [file.path for fragment in self.lance.get_fragments() for file in fragment.data_files()]
            text = f"{self.version}\n{chr(10).join(files)}"
            self._fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._fingerprint

    def request(self) -> list[str] | dict[str, str]:
        """The columns as Lance's own readers take them."""
        names = [f.name for f in self._fields if f.name != "_rowid"]
        if all(f.path == (f.name,) for f in self._fields):
            return names
        return {f.name: f.expression for f in self._fields if f.name != "_rowid"}

    def hf_converter(self) -> Any:
        """Lance's converter for datasets that Hugging Face wrote, None for others."""
        raw = (self.schema.metadata or {}).get(b"huggingface")
        return HuggingFaceConverter(json.loads(raw)) if raw else None

    def first_value(self, name: str) -> Any:
        """The first value of a binary column that is neither null nor empty, as an Arrow scalar; None without one.

        Looks at the first row, then at sixteen, then lets Lance search.
        """
        for rows in (1, 16):
            head = self.read(np.array([[0, min(self.rows, rows)]])).column(name)
            found = next((value for value in head.drop_null() if len(value.as_py())), None)
            if found is not None or self.rows <= rows:
                return found
        field = next(f for f in self._fields if f.name == name)
        known = f"{field.expression} IS NOT NULL"
        if field.blob:
            first = self.lance.scanner(columns=[], filter=known, with_row_address=True, limit=1).to_table()
            blobs = self.lance.read_blobs(field.path[0], addresses=first["_rowaddr"].to_pylist()) if len(first) else []
            return pa.scalar(blobs[0][1], pa.large_binary()) if blobs else None
        rest = self.lance.to_table(columns={name: field.expression}, filter=known, limit=1)
        return rest.column(0)[0] if len(rest) else None

    @property
    def cached(self) -> bool:
        """Whether reads come from a local copy."""
        return self._cache is not None

    def use_cache(self, folder: str) -> None:
        """Copy the selected rows into a local Lance dataset under `folder` and read from it from now on."""
        names = [f"c{i}" for i in range(len(self._fields))]  # neutral: Lance reserves names such as _rowid
        step = max(1, min(self.rows, 256))

        def batches() -> Any:
            for start in range(0, self.rows, step):
                rows = self.read(np.array([[start, min(start + step, self.rows)]]))
                yield from rows.rename_columns(names).to_batches()

        empty = self.read(np.empty((0, 2), np.int64)).rename_columns(names)
        self._cache = write_stream(batches(), empty.schema, os.path.join(folder, "cache.lance"), mode="create")

    def _column(self, field: Field, table: pa.Table | None, ranges: Ranges) -> pa.ChunkedArray:
        if field.blob:
            found = self.lance.read_blobs(field.path[0], indices=expand(ranges).tolist())
            return pa.chunked_array([pa.array([value for _, value in found], pa.large_binary())])
        assert table is not None
        if not self._plain:
            return table.column(field.name)
        column = table.column(field.path[0])
        return pc.struct_field(column, list(field.path[1:])) if len(field.path) > 1 else column

    def _select(
        self, filter: str | None, samples: int, seed: int, counts: NDArray[np.int64]
    ) -> NDArray[np.int64] | None:
        """Sorted positions of the rows that are used, None for all of them."""
        selected = None if filter is None else self._matching(filter, counts)
        left = int(counts.sum()) if selected is None else len(selected)
        if not 0 < samples < left:
            return selected
        drawn = np.sort(Permutation(left, seed)(np.arange(samples)))
        chosen: NDArray[np.int64] = drawn if selected is None else selected[drawn]
        return chosen

    def _matching(self, filter: str, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the rows that match, from their addresses: (fragment id << 32) + offset before deletions."""
        try:
            scan = self.lance.scanner(columns=[], filter=filter, with_row_address=True).to_table()
        except (OSError, ValueError) as error:
            raise ConfigError(f"Lance refused filter={filter!r}: {_first_line(error)}") from error
        address = np.sort(scan.column("_rowaddr").to_numpy().astype(np.int64))
        fragments = self.lance.get_fragments()
        ids = np.array([fragment.fragment_id for fragment in fragments], np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if len(counts) else counts
        by_id = np.argsort(ids)
        which = by_id[np.searchsorted(ids[by_id], address >> 32)]  # i64[M] index of each row's fragment
        offset = address & 0xFFFFFFFF
        for f in np.unique(which):
            if fragments[f].num_deletions:
                live = fragments[f].scanner(columns=[], with_row_address=True).to_table().column("_rowaddr")
                here = which == f
                offset[here] = np.searchsorted(np.sort(live.to_numpy().astype(np.int64)), address[here])
        return np.sort(np.asarray(starts[which] + offset, np.int64))


def take_rows(dataset: lance.LanceDataset, columns: list[str] | dict[str, str], ranges: Ranges) -> pa.Table:
    """The rows at these positions, in order and in one chunk: the cheaper call for scattered rows."""
    return dataset.take(expand(ranges).tolist(), columns=columns)


def scan_runs(dataset: lance.LanceDataset, columns: list[str], ranges: Ranges) -> pa.Table:
    """The rows at these positions, in order and a chunk for each range: the cheaper call for runs of neighbours.

    Lance's `take_scan` is not public; where a release lacks it, this is `take_rows`.
    """
    scan = getattr(dataset._ds, "take_scan", None)
    if scan is None or not len(ranges):
        return take_rows(dataset, columns, ranges)
    pairs = zip(*ranges.T.tolist(), strict=True)  # Lance asks for each when it needs it, on a thread of its own
    table: pa.Table = scan(pairs, columns=columns, batch_readahead=4).read_all()
    return table


def _rows(dataset: lance.LanceDataset, columns: list[str], ranges: Ranges) -> pa.Table:
    return (take_rows if scattered(ranges) else scan_runs)(dataset, columns, ranges)


def _open(dataset: str | Path | lance.LanceDataset, options: dict[str, Any]) -> lance.LanceDataset:
    if isinstance(dataset, lance.LanceDataset):
        return dataset
    if not isinstance(dataset, (str, Path)):
        raise ConfigError(f"Expected a URI, a path or a lance.LanceDataset, got {type(dataset).__name__}.")
    try:
        return lance.dataset(dataset, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Expected a Lance dataset at {str(dataset)!r}, got: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """Lance's own words without the place in its source code."""
    return str(error).splitlines()[0].split(", /")[0] if str(error) else type(error).__name__


LanceSampler = lance_sampler.Sampler
LanceFullScan = lance_sampler.FullScanSampler
LanceFragments = lance_sampler.ShardedFragmentSampler
LanceBatches = lance_sampler.ShardedBatchSampler
