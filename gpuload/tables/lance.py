"""Rows exist: a URI or an opened dataset enters, a pinned version with counts, positions and reads leaves.

The only file beside `ingest.py` that touches Lance. A position is the place of a row among the live rows of the
version, 0 to rows-1; an index is its place among the rows that the filter and the sample left. Without either they
are the same.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lance
import lance.sampler as lance_sampler
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.hf import HuggingFaceConverter
from numpy.typing import NDArray

from gpuload.errors import ConfigError, ReadError
from gpuload.order import Ranges, coalesce, expand
from gpuload.order.permutation import Permutation
from gpuload.order.split import Split, keep_in, positions_in
from gpuload.tables import malloc, reading, scattered
from gpuload.tables.fork import check_fork
from gpuload.tables.projection import Field, near, project
from gpuload.tables.write import write_stream

T = TypeVar("T")
_LOOK = 16  # values that tell what a binary column holds: some MB of photos
_KEEP_ROWS = 10_000  # in smaller tables it makes no difference
_KEEP_BYTES = 64 << 20  # of a table of numbers alone
_LOOKED_AT = 1000  # fragments, for the one that is broken


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
    split : (lo, hi), optional
        Only the rows whose hashed position lies there; what filter and samples choose from.
    with_row_id, with_row_address : bool
        Add the columns ``_rowid``, ``_rowaddr``.
    options : dict, optional
        Keywords of ``lance.dataset`` (version, storage_options, ...).
    open_blobs : bool
        Leave columns of blobs out of `schema` and reads, and give `blobs` instead; ``_rowid`` is read for it.

    Raises
    ------
    ConfigError
        No such dataset, unknown column, a filter or expression that Lance refuses.
    ReadError
        What is stored cannot be read.
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
        split: Split | None = None,
        open_blobs: bool = False,
    ) -> None:
        check_fork()
        malloc.tune()
        self.lance = open_dataset(dataset, options or {})
        self.uri, self.version = str(self.lance.uri), int(self.lance.version)
        self._limit = reading.limit(options)
        extra = ["_rowid"] * with_row_id + ["_rowaddr"] * with_row_address
        fields = project(self.lance, columns, extra)
        self.asked = pa.schema([pa.field(f.name, f.type) for f in fields], metadata=self.lance.schema.metadata)
        self._opened = [f for f in fields if f.blob] if open_blobs else []
        if self._opened:
            others = [f for f in fields if not f.blob and f.name != "_rowid"]
            fields = others + project(self.lance, [], ["_rowid"])
        self._choose(fields)
        counts = self._ask(lambda: [fragment.count_rows() for fragment in self.lance.get_fragments()])
        self._ends = np.cumsum(counts, dtype=np.int64)  # i64[F] positions where the fragments end
        self.stored = sum(counts)  # rows before the filter, the split and the sample
        self._split = split
        self._selected = self._select(filter, samples, seed, np.asarray(counts, np.int64))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if self._selected is not None:
            starts = np.searchsorted(self._selected, starts).astype(np.int64)
        self.fragments: NDArray[np.int64] = np.diff(starts)  # rows left in each fragment
        self.rows = int(starts[-1])
        widths = [_width(field.type) for field in self._fields]
        fits = None not in widths and self.rows * sum(width or 0 for width in widths) <= _KEEP_BYTES
        self._may_keep = fits and self.rows >= _KEEP_ROWS
        self._cache: lance.LanceDataset | None = None
        self._fingerprint: str | None = None
        self._kept: pa.Table | None = None  # all rows, where they are small and asked for in random order
        self._keep_lock, self._scattered = threading.Lock(), 0  # rows that were read in random order
        self._most_rows = sys.maxsize  # of a read; fewer once so many overflowed

    def __getstate__(self) -> dict[str, Any]:
        """For a DataLoader worker, which keeps rows of its own."""
        return {**self.__dict__, "_kept": None, "_keep_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _keep_lock=threading.Lock())

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
        kept = self._kept_rows(index)
        if kept is not None:
            return kept.take(pa.array(index))
        if len(index) <= self._most_rows:
            try:
                return self._ask(lambda: self._read(ranges), ranges)
            except ReadError as error:
                if "Offset overflow" not in str(error) or len(index) < 2:
                    raise
            self._most_rows = min(self._most_rows, len(index) // 2)
        half = len(index) // 2
        return pa.concat_tables([self.read(coalesce(index[:half])), self.read(coalesce(index[half:]))])

    def blobs(self, table: pa.Table) -> dict[str, list[Any]]:
        """For each column of blobs, those of the rows of a table that was read, as ``lance.BlobFile`` objects, opened
        and not read; None for a null. Empty where blobs are read."""
        if not self._opened:
            return {}
        ids = table.column("_rowid").to_pylist()
        return {field.name: self.lance.take_blobs(field.path[0], ids=ids) for field in self._opened}

    def _kept_rows(self, index: NDArray[np.int64]) -> pa.Table | None:
        """All rows, where they are in memory: numbers that fit are read once, in order, when a sixteenth of them was
        asked for in another one, which costs Lance 28 times as much (80 thousand against 2.2 million rows/s)."""
        if not self._may_keep or bool((np.diff(index) == 1).all()):
            return None
        with self._keep_lock:
            self._scattered += len(index)
            if self._kept is None and self._scattered * 16 >= self.rows:
                whole = np.array([[0, self.rows]])
                self._kept = self._ask(lambda: self._read(whole), whole).combine_chunks()
        return self._kept

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
        names, field = [field.name for field in self._fields], self._field(column)
        if not any(is_kind(field.type) for is_kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)):
            raise ConfigError(f"Expected a column of numbers, got column {column!r}, which is {field.type}.")
        if self._cache is not None and column in names:
            name = self._cache.schema.names[names.index(column)]
            values = self._cache.to_table(columns=[name]).column(0)
        else:
            values = self._ask(lambda: self.lance.to_table(columns={"value": field.expression})).column(0)
            values = values if self._selected is None else values.take(pa.array(self._selected))
        if values.null_count:
            first = int(np.flatnonzero(values.is_null().to_numpy())[0])
            where = int(self.positions(np.array([[first, first + 1]]))[0])
            raise ConfigError(
                f"Expected column {column!r} without nulls, got {values.null_count}, first at position {where}."
            )
        found: NDArray[Any] = values.to_numpy()
        return found

    def only(self, columns: Sequence[str]) -> LanceTable:
        """The same rows with other columns, each named as `small` takes it; read from where the dataset is stored."""
        found = copy.copy(self)
        found._choose([self._field(column) for column in columns])
        found._cache, found._kept, found._may_keep = None, None, False
        return found

    def _ask(self, call: Callable[[], T], ranges: Ranges | None = None) -> T:
        """What Lance answers; what goes wrong as a `ReadError` with the rows at these indices."""

        def rows() -> tuple[int, ...]:
            return () if ranges is None else tuple(self.positions(ranges).tolist())

        explain = lambda error: self._explain(error, rows())  # noqa: E731
        return reading.patiently(call, self.uri, rows, limit=self._limit, explain=explain)

    def _explain(self, error: BaseException, rows: tuple[int, ...]) -> tuple[str, str]:
        """What is wrong and what to do: looks whether the version is still there, and for the fragment that fails."""
        return reading.explained(error, self._broken(rows), self._gone(), self.version)

    def _gone(self) -> bool:
        """Whether this version was cleaned up. Its manifest goes with its files, and only then is it asked for."""
        try:
            return self.version not in {version["version"] for version in self.lance.versions()}
        except (OSError, ValueError):
            return False

    def _broken(self, rows: tuple[int, ...]) -> str:
        """The fragment, among those of these rows or all, of which no row can be read, with its files; else empty."""
        fragments = self.lance.get_fragments()
        which = np.searchsorted(self._ends, rows, side="right") if rows else np.arange(len(fragments))
        for f in np.unique(which)[:_LOOKED_AT].tolist():
            try:
                fragments[f].take([0], columns=self._roots or None)
            except BaseException as error:  # a panic of Lance's is no Exception
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                names = ", ".join(f"data/{file.path}" for file in fragments[f].data_files())
                return f"fragment {fragments[f].fragment_id} ({names})"
        return ""

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

    def _choose(self, fields: list[Field]) -> None:
        """These are the columns that are read."""
        self._fields = fields
        self.schema = pa.schema([pa.field(f.name, f.type) for f in fields], metadata=self.lance.schema.metadata)
        self._expressions = {f.name: f.expression for f in fields if not f.blob}
        self._plain = all(f.path for f in fields)
        self._roots = list(dict.fromkeys(f.path[0] for f in fields if f.path and not f.blob))

    def _field(self, column: str) -> Field:
        """An output column, else a stored one or an expression."""
        found = next((field for field in self._fields if field.name == column), None)
        return found or project(self.lance, {column: column}, [])[0]

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
        """Names this version's rows wherever the dataset is stored: a digest of its version, data files and split.

        Computed at the first call, 0.1 s for 1,500 fragments.
        """
        if self._fingerprint is None:
            split = "" if self._split is None else f"\nsplit {self._split}"
            found = digest(self.lance)
            self._fingerprint = hashlib.sha256(f"{found}{split}".encode()).hexdigest()[:16] if split else found
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

    def values(self, name: str) -> Iterator[Any]:
        """Up to sixteen values of a binary column that are neither null nor empty, as Arrow scalars.

        First that of the first row, then others, evenly spread over the rows that the filter leaves, whatever `samples`
        and `seed`; where all of them are null, Lance searches. Each is read when it is asked for.
        """
        field = next(f for f in self._fields if f.name == name)
        none = True
        for positions in (self._look[:1], self._look[1:]):
            for value in self._look_at(field, positions) if len(positions) else ():
                if len(value.as_py()):
                    none = False
                    yield value
        if none:
            yield from (value for value in self._search(field) if len(value.as_py()))

    def _look_at(self, field: Field, positions: NDArray[np.int64]) -> list[Any]:
        """The values of a field at these positions that are not null; those of a broken file are left out, as long as
        there is another: its rows are named when they are read."""

        def look() -> list[Any]:
            if field.blob:
                found = self.lance.read_blobs(field.path[0], indices=positions.tolist())
                return [pa.scalar(value, pa.large_binary()) for _, value in found if value is not None]
            rows = take_rows(self.lance, {field.name: field.expression}, coalesce(positions))
            return list(rows.column(0).drop_null())

        try:
            return self._ask(look)
        except ReadError:
            if len(positions) == 1 or reading.is_remote(self.uri):
                raise
        values, failed = list[Any](), list[ReadError]()
        for one in np.split(positions, len(positions)):
            try:
                values += self._look_at(field, one)
            except ReadError as error:
                failed.append(error)
        if len(failed) == len(positions):
            raise failed[0]
        return values

    def _search(self, field: Field) -> list[Any]:
        """The first values of a field that are not null, wherever they are."""
        known = f"{field.expression} IS NOT NULL"
        if field.blob:
            first = self.lance.scanner(columns=[], filter=known, with_row_address=True, limit=_LOOK).to_table()
            blobs = self.lance.read_blobs(field.path[0], addresses=first["_rowaddr"].to_pylist()) if len(first) else []
            return [pa.scalar(value, pa.large_binary()) for _, value in blobs]
        columns = {field.name: field.expression}
        return list(self._ask(lambda: self.lance.to_table(columns=columns, filter=known, limit=_LOOK)).column(0))

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
        if self._split is not None:
            every = int(counts.sum())
            selected = positions_in(self._split, every) if selected is None else keep_in(self._split, selected)
        left = int(counts.sum()) if selected is None else len(selected)
        spread = np.unique(np.linspace(0, max(left - 1, 0), min(left, _LOOK)).astype(np.int64))
        self._look = spread if selected is None else selected[spread]  # positions of rows to look at
        if not 0 < samples < left:
            return selected
        drawn = np.sort(Permutation(left, seed)(np.arange(samples)))
        chosen: NDArray[np.int64] = drawn if selected is None else selected[drawn]
        return chosen

    def _matching(self, filter: str, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the rows that match, from their addresses: (fragment id << 32) + offset before deletions."""

        def scan() -> pa.Table:
            try:
                return self.lance.scanner(columns=[], filter=filter, with_row_address=True).to_table()
            except (OSError, ValueError) as error:
                if reading.is_trouble(error):
                    raise
                raise ConfigError(f"Lance refused filter={filter!r}: {reading.words(error)}") from error

        address = np.sort(self._ask(scan).column("_rowaddr").to_numpy().astype(np.int64))
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


def _width(kind: pa.DataType) -> int | None:
    """Bytes of a value; None where they are not the same for all, or not numbers."""
    if pa.types.is_fixed_size_list(kind):
        inner = _width(kind.value_type)
        return None if inner is None else inner * kind.list_size
    return max(1, kind.bit_width // 8) if pa.types.is_primitive(kind) else None


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


def digest(dataset: lance.LanceDataset) -> str:
    """Names the rows of a version wherever it is stored: of its number and its data files."""
    files = [file.path for fragment in dataset.get_fragments() for file in fragment.data_files()]
    text = f"{dataset.version}\n{chr(10).join(files)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_dataset(dataset: str | Path | lance.LanceDataset, options: dict[str, Any]) -> lance.LanceDataset:
    """What the user named, opened; an opened dataset as it is.

    Raises
    ------
    ConfigError
        There is none, or not this version of it.
    """
    if isinstance(dataset, lance.LanceDataset):
        return dataset
    if not isinstance(dataset, (str, Path)):
        raise ConfigError(f"Expected a URI, a path or a lance.LanceDataset, got {type(dataset).__name__}.")
    uri = os.path.expanduser(str(dataset))

    def opened() -> lance.LanceDataset:
        try:
            return lance.dataset(uri, **reading.with_client(uri, options))
        except TypeError as error:
            raise ConfigError(
                f"Expected dataset_options as keywords of lance.dataset, got {options!r}: {error}."
            ) from error
        except (OSError, ValueError) as error:
            if reading.is_remote(uri) and reading.is_trouble(error) and "not found" not in str(error).lower():
                raise
            raise ConfigError(
                f"Expected a Lance dataset at {uri!r}, got: {reading.words(error)}.{_other(dataset, options, error)}"
            ) from error

    return reading.patiently(opened, uri, limit=reading.limit(options))


def _other(dataset: str | Path, options: dict[str, Any], error: Exception) -> str:
    """What to do where it is only another version that was wanted, with a space before it."""
    if "storage version" in str(error):
        return f" It is newer than pylance {lance.__version__}: upgrade pylance."
    version = options.get("version")
    if version is None:
        return ""
    try:
        latest = lance.dataset(dataset, **{**options, "version": None})
        there = [found["version"] for found in latest.versions()]
    except (OSError, ValueError):
        return ""
    if isinstance(version, str):
        return f" Its tags are {sorted(latest.tags.list())}."
    return (
        f" Version {version} was cleaned up or never written; there are {there[0]} to {there[-1]}. Tags keep a version "
        f"from being cleaned up: lance.dataset(uri).tags.create('training', {version})."
    )


LanceSampler = lance_sampler.Sampler
LanceFullScan = lance_sampler.FullScanSampler
LanceFragments = lance_sampler.ShardedFragmentSampler
LanceBatches = lance_sampler.ShardedBatchSampler
