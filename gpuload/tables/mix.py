"""Several datasets as one: a `Mix` enters, a table that reads each source once a batch leaves.

An index counts through the rows that are used of one source after the other; a position is that within its source.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpuload.errors import ConfigError, expect, is_one_of
from gpuload.order import Ranges, coalesce, expand
from gpuload.tables.lance import LanceTable
from gpuload.tables.projection import near

_WORDS = ("uri", "version", "filter", "columns", "storage_options")


@dataclass(frozen=True)
class Mix:
    """Several datasets in one order, each as often as its weight says: ``LanceDataset(Mix({...}), batch_size)``.

    Parameters
    ----------
    sources : dict of str to source
        Name → a URI, a path, an opened ``lance.LanceDataset``, or a dict of ``uri`` and any of ``version``, ``filter``,
        ``columns`` and ``storage_options``. All must have the same columns of the same types; ``columns`` as a dict of
        output name → stored name (or SQL) renames them.
    weights : dict of str to float, optional
        Of each source; they need not sum to 1. By default their numbers of rows.
    stop : {"first", "last"} or int
        Where an epoch ends: with the last row of the source that is exhausted first, or last; or after so many rows.

    After every n rows of an epoch a source has come n times its weight, within 1. Each source has a shuffled order of
    its own, in which no row comes again before all have come; the next epoch goes on where the last one ended.
    `Batch.source` says where each row is from, `Batch.rows` its position there.

    Raises
    ------
    ConfigError
    """

    sources: Mapping[str, Any]
    weights: Mapping[str, float] | None = None
    stop: Literal["first", "last"] | int = "first"

    def __post_init__(self) -> None:
        named = isinstance(self.sources, Mapping) and all(isinstance(name, str) and name for name in self.sources)
        expect(named and bool(self.sources), "Mix as a dict of name to source, with at least one", self.sources)
        object.__setattr__(self, "sources", {name: _source(name, given) for name, given in self.sources.items()})
        if self.weights is not None:
            expect(isinstance(self.weights, Mapping), "Mix(weights=...) as a dict of name to number", self.weights)
            for name in [*self.weights, *self.sources]:
                if name not in self.sources or name not in self.weights:
                    raise ConfigError(
                        f"Expected weights for {list(self.sources)}, got them for {list(self.weights)}: "
                        f"{name!r} is in one alone."
                    )
            for name, weight in self.weights.items():
                good = isinstance(weight, Real) and not isinstance(weight, bool) and 0 < float(weight) < float("inf")
                expect(good, f"the weight of {name!r} above 0 and finite", weight)
            object.__setattr__(self, "weights", {name: self.weights[name] for name in self.sources})
        count = isinstance(self.stop, int) and not isinstance(self.stop, bool) and 0 < self.stop < 2**62
        expect(count or is_one_of(self.stop, ("first", "last")), 'Mix(stop="first"|"last"|rows)', self.stop)

    def places(self) -> list[Any]:
        """The URI, path or opened dataset of each source."""
        return [source["uri"] for source in self.sources.values()]


def _source(name: str, given: Any) -> dict[str, Any]:
    found = dict(given) if isinstance(given, Mapping) else {"uri": given}
    for word in found:
        if word not in _WORDS:
            raise ConfigError(f"Expected {_WORDS} of source {name!r}, got {word!r}.{near(str(word), _WORDS)}")
    expect(found.get("uri") is not None, f"the uri of source {name!r}", given)
    for word in ("version", "storage_options"):
        if word in found and not isinstance(found["uri"], (str, Path)):
            raise ConfigError(
                f"Expected {word} of source {name!r} beside a URI, got an opened dataset, which has its own."
            )
    return found


class MixTable:
    """The rows of several tables, one after the other.

    Parameters
    ----------
    mix : Mix
    opened : dict of str to lance.LanceDataset, optional
        Sources that are open already, at the version that all ranks have.
    columns : list of str or dict of str to str, optional
        Of the columns that the sources have in common; all by default.
    filter : str, optional
        For every source, beside its own; in the words of its stored columns.
    options : dict, optional
        Keywords of ``lance.dataset`` for every source that has none of its own; no version.
    **words
        Of `LanceTable`, for every source.

    Raises
    ------
    ConfigError
        A source that cannot be opened, that has no rows, or whose columns are others: names it.
    """

    version = 0  # every source has one of its own, which is part of `uri` and `fingerprint`

    def __init__(
        self,
        mix: Mix,
        opened: Mapping[str, Any] | None = None,
        columns: Sequence[str] | dict[str, str] | None = None,
        filter: str | None = None,
        options: Mapping[str, Any] | None = None,
        **words: Any,
    ) -> None:
        if "version" in (options or {}):
            raise ConfigError(f"Expected the version of each source in the Mix, got dataset_options={options!r}.")
        self.mix, words = mix, {**words, "open_blobs": False}
        self._tables = {
            name: _open(name, source, (opened or {}).get(name), columns, filter, options or {}, words)
            for name, source in mix.sources.items()
        }
        first = next(iter(self._tables.values()))
        self.schema: pa.Schema = first.schema
        for name, table in self._tables.items():
            _check(self.schema, next(iter(self._tables)), table.schema, name)
            if not table.rows:
                chosen = mix.sources[name].get("filter") or filter
                raise ConfigError(f"Expected rows of source {name!r}, got none with filter={chosen!r}.")
        self.lengths = np.array([table.rows for table in self._tables.values()], np.int64)  # i64[S]: rows of each
        self._ends = np.cumsum(self.lengths)
        self.starts = self._ends - self.lengths  # i64[S]: index of the first row of each
        self.rows = int(self._ends[-1])
        self.stored = sum(table.stored for table in self._tables.values())
        self.fragments: NDArray[np.int64] = np.concatenate([table.fragments for table in self._tables.values()])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources, in their order."""
        return tuple(self._tables)

    @property
    def uri(self) -> str:
        """Where each source is stored, and its version."""
        return ", ".join(f"{name}={table.uri}@{table.version}" for name, table in self._tables.items())

    @property
    def lance(self) -> dict[str, Any]:
        """The opened datasets by name."""
        return {name: table.lance for name, table in self._tables.items()}

    def source(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which source each of these rows is from: i64[N] into `names`."""
        return np.searchsorted(self._ends, index, "right").astype(np.int64)

    def positions(self, ranges: Ranges) -> NDArray[np.int64]:
        """The positions in their sources of the rows at these indices, in order: i64[sum of lengths]."""
        index = expand(ranges)
        which, found = self.source(index), np.empty_like(index)
        for s, table in enumerate(self._tables.values()):
            here = which == s
            found[here] = table.positions(coalesce(index[here] - self.starts[s]))
        return found

    def read(self, ranges: Ranges) -> pa.Table:
        """The rows at these indices, in order: one read of each source that is among them, and no copy."""
        index = expand(ranges)
        which = self.source(index)
        read, taken = dict[int, pa.Table](), dict[int, int]()
        for s, table in enumerate(self._tables.values()):
            rows = index[which == s] - self.starts[s]
            if len(rows) or not len(index):
                found = table.read(coalesce(rows))
                columns = [found.column(name) for name in self.schema.names]
                read[s], taken[s] = pa.Table.from_arrays(columns, schema=self.schema), 0
        parts = []
        for lo, hi in _runs(which):
            s = int(which[lo])
            parts.append(read[s].slice(taken[s], hi - lo))
            taken[s] += hi - lo
        return pa.concat_tables(parts or read.values())

    def small(self, column: str) -> NDArray[Any]:
        """The values of a column of numbers for all rows that are used: [rows]."""
        return np.concatenate([table.small(column) for table in self._tables.values()])

    def origin(self, column: str) -> str:
        """What an output column is in each source; equal for two that are the same in all of them."""
        return "\n".join(table.origin(column) for table in self._tables.values())

    def fingerprint(self) -> str:
        """Names these rows of these sources, wherever they are stored."""
        parts = [
            [name, table.fingerprint(), repr(self.mix.sources[name].get("filter"))]
            for name, table in self._tables.items()
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def values(self, name: str) -> Iterator[Any]:
        """Some values of a binary column that are neither null nor empty, of one source after the other."""
        return itertools.chain.from_iterable(table.values(name) for table in self._tables.values())

    @property
    def asked(self) -> pa.Schema:
        """Of the columns that were asked for."""
        return self.schema

    def blobs(self, table: pa.Table) -> dict[str, list[Any]]:
        """None: the blobs of a mix are read, and not opened."""
        return {}

    def hf_converter(self) -> Any:
        """Lance's converter of the first source, None where Hugging Face did not write it."""
        return next(iter(self._tables.values())).hf_converter()

    @property
    def cached(self) -> bool:
        """Whether reads come from a local copy."""
        return all(table.cached for table in self._tables.values())

    def use_cache(self, folder: str) -> None:
        """Copy the rows that are used of every source into `folder`, and read from there."""
        for s, table in enumerate(self._tables.values()):
            where = os.path.join(folder, str(s))
            os.mkdir(where)
            table.use_cache(where)


def _runs(which: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Runs of one source, half-open."""
    cuts = np.flatnonzero(np.diff(which)) + 1
    ends = [0, *cuts.tolist(), len(which)]
    return [(lo, hi) for lo, hi in itertools.pairwise(ends) if lo < hi]


def own_options(source: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ``lance.dataset`` that a source of a `Mix` has of its own."""
    return {word: source[word] for word in ("version", "storage_options") if source.get(word) is not None}


def _open(
    name: str,
    source: Mapping[str, Any],
    dataset: Any,
    columns: Sequence[str] | dict[str, str] | None,
    filter: str | None,
    options: Mapping[str, Any],
    words: Mapping[str, Any],
) -> LanceTable:
    both = [f"({text})" for text in (source.get("filter"), filter) if text is not None]
    opened = isinstance(source["uri"], (str, Path))
    try:
        return LanceTable(
            source["uri"] if dataset is None else dataset,
            _columns(source.get("columns"), columns),
            " AND ".join(both) or None,
            options={**options, **own_options(source)} if opened else None,
            **words,
        )
    except ConfigError as error:
        raise ConfigError(f"In source {name!r}: {error}") from error


def _columns(own: Any, wanted: Sequence[str] | dict[str, str] | None) -> Any:
    """The columns to read of a source: those that are wanted, by the names that the source gives them."""
    if wanted is None or isinstance(wanted, str):
        return own if wanted is None else wanted
    outputs = wanted if isinstance(wanted, Mapping) else {name: name for name in wanted}
    if own is None:
        return wanted
    known = own if isinstance(own, Mapping) else {name: name for name in own}
    for text in outputs.values():
        if text not in known:
            raise ConfigError(f"Expected columns among {list(known)}, got {text!r}.{near(text, known)}")
    return {name: known[text] for name, text in outputs.items()}


def _check(expected: pa.Schema, first: str, got: pa.Schema, name: str) -> None:
    """Raise unless a source has the columns of the first, by name and type; their order may be another."""
    lacks = [column for column in expected.names if column not in got.names]
    more = [column for column in got.names if column not in expected.names]
    kinds = [
        f"{column!r} is {got.field(column).type} and there {expected.field(column).type}"
        for column in expected.names
        if column in got.names and got.field(column).type != expected.field(column).type
    ]
    wrong = [f"lacks {lacks}"] * bool(lacks) + [f"has {more} as well"] * bool(more) + kinds
    if wrong:
        raise ConfigError(
            f"Expected the columns of source {first!r} in source {name!r}, which {', '.join(wrong)}. "
            f"Choose and rename them: Mix({{{name!r}: {{'uri': ..., 'columns': {{'name': 'stored name or SQL'}}}}}})."
        )
